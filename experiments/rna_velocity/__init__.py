"""RNA velocity: the splicing model fitted by Flux Matching on real cells, beside scVelo's own fits."""

from experiments.rna_velocity.experiment import EXPERIMENT as EXPERIMENT
