"""Flux Matching: train vector fields whose diffusion leaves the data distribution in place.

>>> import torch
>>> from fluxmatching import flux_matching_loss
>>> field = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
>>> loss = flux_matching_loss(field, torch.randn(256, 2), sigma2=0.1, backend="torch").mean()
>>> loss.backward()
"""

from fluxmatching.draws import Draws
from fluxmatching.dsm import dsm_loss
from fluxmatching.horizon import Horizon, LearnedHorizon, TruncatedExponentialHorizon, UniformHorizon
from fluxmatching.likelihood import bits_per_dim, log_likelihood
from fluxmatching.losses import (
    AnnealedLoss,
    FluxTarget,
    flux_matching_loss,
    flux_target,
    noise_annealed_flux_loss,
)
from fluxmatching.mixing import mixing_loss, sinkhorn_divergence
from fluxmatching.noise import LogNormalNoise, LogUniformNoise, LossNormalizer
from fluxmatching.preconditioning import EDMField, UNet
from fluxmatching.samplers import (
    edm_heun,
    edm_sigma_grid,
    log_sigma_grid,
    predictor_corrector,
    probability_flow,
    reverse_ve,
    unadjusted_langevin,
)
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
    "bits_per_dim",
    "dsm_loss",
    "edm_heun",
    "edm_sigma_grid",
    "flux_matching_loss",
    "flux_target",
    "log_likelihood",
    "log_sigma_grid",
    "mixing_loss",
    "noise_annealed_flux_loss",
    "predictor_corrector",
    "probability_flow",
    "reverse_ve",
    "sinkhorn_divergence",
    "unadjusted_langevin",
]
