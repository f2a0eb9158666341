"""Images without any imposed structure (Sec. 4.3, B.3, Table 1): Flux Matching beside score matching."""

from experiments.images.experiment import EXPERIMENT as EXPERIMENT
