"""Trajectories of two masses between springs (Sec. 4.5, B.5): the effect of a causal mask on both objectives."""

from experiments.springs.experiment import EXPERIMENT as EXPERIMENT
