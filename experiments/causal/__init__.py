from experiments.causal.experiment import EXPERIMENT as EXPERIMENT
