"""Penalties at the boundary of a constrained domain (Appendix C.2)."""

from experiments.constrained.experiment import EXPERIMENT as EXPERIMENT
