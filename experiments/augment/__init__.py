"""A field added to a frozen score model so that its chains mix faster (Appendix C.4, Eq. 48)."""

from experiments.augment.experiment import EXPERIMENT as EXPERIMENT
