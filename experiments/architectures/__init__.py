"""Architectures and their input derivatives (Appendix D.3)."""

from experiments.architectures.experiment import EXPERIMENT as EXPERIMENT
