"""A field added to a saved pipeline of diffusers, on images whose law is known (Appendix C.4, Eq. 48)."""

from experiments.augment_images.experiment import EXPERIMENT as EXPERIMENT
