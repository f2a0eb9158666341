"""Flux Matching: train vector fields whose diffusion leaves the data distribution in place.

>>> import torch
>>> from fluxmatching import flux_matching_loss
>>> field = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
>>> loss = flux_matching_loss(field, torch.randn(256, 2), sigma=0.3).mean()
>>> loss.backward()
"""

from fluxmatching.edm import EDMField
from fluxmatching.fields import (
    field_from_denoiser,
    field_from_diffusers,
    field_from_noise_prediction,
    field_from_velocity,
)
from fluxmatching.losses.annealed import LossNormalizer, noise_annealed_flux_loss
from fluxmatching.losses.draws import Draws
from fluxmatching.losses.dsm import DSMOptions, dsm_loss
from fluxmatching.losses.flux import flux_matching_loss
from fluxmatching.losses.horizons import Horizon, LearnedHorizon, TruncatedExponentialHorizon, UniformHorizon
from fluxmatching.losses.mixing import mixing_loss, sinkhorn_divergence
from fluxmatching.losses.modules import DenoisingScoreMatching, FluxMatching, NoiseAnnealedFluxMatching
from fluxmatching.losses.noise_levels import LogNormalNoise, LogUniformNoise
from fluxmatching.losses.options import FluxOptions
from fluxmatching.losses.reference_set import ReferenceSet
from fluxmatching.losses.target import FluxTarget, flux_target
from fluxmatching.sampling.langevin import unadjusted_langevin
from fluxmatching.sampling.likelihood import bits_per_dim, log_likelihood
from fluxmatching.sampling.ode import ODESolver, edm_heun, probability_flow
from fluxmatching.sampling.reverse import predictor_corrector, reverse_ve
from fluxmatching.sampling.schedules import exponential_schedule, karras_schedule
from fluxmatching.training import Trainer, TrainingError, TrainingOptions
from fluxmatching.unet import UNet

__all__ = [
    "DSMOptions",
    "DenoisingScoreMatching",
    "Draws",
    "EDMField",
    "FluxMatching",
    "FluxOptions",
    "FluxTarget",
    "Horizon",
    "LearnedHorizon",
    "LogNormalNoise",
    "LogUniformNoise",
    "LossNormalizer",
    "NoiseAnnealedFluxMatching",
    "ODESolver",
    "ReferenceSet",
    "Trainer",
    "TrainingError",
    "TrainingOptions",
    "TruncatedExponentialHorizon",
    "UNet",
    "UniformHorizon",
    "bits_per_dim",
    "dsm_loss",
    "edm_heun",
    "exponential_schedule",
    "field_from_denoiser",
    "field_from_diffusers",
    "field_from_noise_prediction",
    "field_from_velocity",
    "flux_matching_loss",
    "flux_target",
    "karras_schedule",
    "log_likelihood",
    "mixing_loss",
    "noise_annealed_flux_loss",
    "predictor_corrector",
    "probability_flow",
    "reverse_ve",
    "sinkhorn_divergence",
    "unadjusted_langevin",
]
