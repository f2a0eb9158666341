"""Flux Matching: train vector fields whose diffusion leaves the data distribution in place.

>>> import torch
>>> from fluxmatching import flux_matching_loss
>>> field = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
>>> loss = flux_matching_loss(field, torch.randn(256, 2), sigma2=0.1, backend="torch").mean()
>>> loss.backward()
"""

from fluxmatching.draws import Draws
from fluxmatching.horizon import Horizon, LearnedHorizon, TruncatedExponentialHorizon, UniformHorizon
from fluxmatching.losses import (
    AnnealedLoss,
    FluxTarget,
    dsm_loss,
    flux_matching_loss,
    flux_target,
    noise_annealed_flux_loss,
)
from fluxmatching.noise import LogNormalNoise, LogUniformNoise, LossNormalizer
from fluxmatching.preconditioning import EDMField, UNet
from fluxmatching.samplers import log_sigma_grid, reverse_ve, unadjusted_langevin
from fluxmatching.training import Trainer, TrainingError, TrainingOptions

__all__ = [
    "AnnealedLoss",
    "Draws",
    "EDMField",
    "FluxTarget",
    "Horizon",
    "LearnedHorizon",
    "LogNormalNoise",
    "LogUniformNoise",
    "LossNormalizer",
    "Trainer",
    "TrainingError",
    "TrainingOptions",
    "TruncatedExponentialHorizon",
    "UNet",
    "UniformHorizon",
    "dsm_loss",
    "flux_matching_loss",
    "flux_target",
    "log_sigma_grid",
    "noise_annealed_flux_loss",
    "reverse_ve",
    "unadjusted_langevin",
]
