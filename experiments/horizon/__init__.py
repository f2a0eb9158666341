"""Horizon and variance of the flux loss (Sec. D.1.1, D.2, Fig. 16) on a mixture of three Gaussians."""

from experiments.horizon.experiment import EXPERIMENT as EXPERIMENT
