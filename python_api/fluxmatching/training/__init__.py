"""Training loop on Lightning Fabric, with exact resume."""

from fluxmatching.training.checkpoint import TrainingError as TrainingError
from fluxmatching.training.data import Samples as Samples
from fluxmatching.training.engine import mixed_precision as mixed_precision
from fluxmatching.training.options import TrainingOptions as TrainingOptions
from fluxmatching.training.trainer import Trainer as Trainer
