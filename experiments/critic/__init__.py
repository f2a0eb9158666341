from experiments.critic.experiment import EXPERIMENT as EXPERIMENT
