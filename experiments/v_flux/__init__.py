"""One path of marginals, several fields that carry it: v-Flux Matching (Appendix E, Fig. 17)."""

from experiments.v_flux.experiment import EXPERIMENT as EXPERIMENT
