"""Images of two parts, the right of which follows the left (Appendix C.3)."""

from experiments.regions.experiment import EXPERIMENT as EXPERIMENT
