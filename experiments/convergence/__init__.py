"""Convergence: the default way to differentiate the network learns what exact double backward learns."""

from experiments.convergence.experiment import EXPERIMENT as EXPERIMENT
