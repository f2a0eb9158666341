"""Training loop with exact resume."""

from fluxmatching.training.checkpoint import TrainingError as TrainingError
from fluxmatching.training.options import TrainingOptions as TrainingOptions
from fluxmatching.training.trainer import Loss as Loss
from fluxmatching.training.trainer import Samples as Samples
from fluxmatching.training.trainer import Trainer as Trainer
