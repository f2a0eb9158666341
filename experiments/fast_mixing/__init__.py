"""Fields trained to mix fast (Sec. 4.4, B.4, Fig. 6), on a mixture with exact answers and on images."""

from experiments.fast_mixing.experiment import EXPERIMENT as EXPERIMENT
