"""Flow matching of images: pairs by optimal transport and rectified flow, by number of evaluations."""

from experiments.flow_images.experiment import EXPERIMENT as EXPERIMENT
