"""Flux Matching: train vector fields whose diffusion leaves the data distribution in place.

>>> import torch
>>> from fluxmatching import flux_matching_loss
>>> field = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
>>> loss = flux_matching_loss(field, torch.randn(256, 2), sigma=0.3).mean()
>>> loss.backward()
"""

from fluxmatching.augmented import AugmentedField
from fluxmatching.edm import EDMField
from fluxmatching.examples import Example, load_example
from fluxmatching.fields import (
    field_from_denoiser,
    field_from_noise_prediction,
    field_from_velocity,
)
from fluxmatching.flows.closed_form import marginal_velocity
from fluxmatching.flows.couplings import Coupling, ExactCoupling, IndependentCoupling, SinkhornCoupling, couple
from fluxmatching.flows.guidance import GuidedField
from fluxmatching.flows.losses import FlowMatching, FlowOptions, conditional_flow_matching_loss
from fluxmatching.flows.paths import CosinePath, LinearPath, VarianceExplodingPath, VariancePreservingPath
from fluxmatching.flows.times import LogitNormalTimes, UniformTimes
from fluxmatching.flows.v_flux import VFluxMatching, v_flux_loss
from fluxmatching.from_diffusers import field_from_diffusers
from fluxmatching.losses.annealed import LossNormalizer, noise_annealed_flux_loss
from fluxmatching.losses.augmentation import augmentation_loss
from fluxmatching.losses.autocorrelation import autocorrelation_loss
from fluxmatching.losses.draws import Draws
from fluxmatching.losses.dsm import DSMOptions, dsm_loss
from fluxmatching.losses.dual import (
    CosineFeatures,
    LinearFeatures,
    QuadraticFeatures,
    dual_flux_loss,
    quadratic_flux_loss,
)
from fluxmatching.losses.flux import flux_matching_loss
from fluxmatching.losses.horizons import Horizon, LearnedHorizon, TruncatedExponentialHorizon, UniformHorizon
from fluxmatching.losses.mixing import mixing_loss, sinkhorn_divergence
from fluxmatching.losses.modules import (
    DenoisingScoreMatching,
    DualFluxMatching,
    FluxMatching,
    NoiseAnnealedFluxMatching,
)
from fluxmatching.losses.noise_levels import LogNormalNoise, LogUniformNoise
from fluxmatching.losses.options import FluxOptions
from fluxmatching.losses.reference_set import ReferenceSet
from fluxmatching.losses.smoothing import SmoothedField, effective_centers
from fluxmatching.losses.step_defect import step_defect_loss
from fluxmatching.losses.target import FluxTarget, MatchedField, flux_target
from fluxmatching.sampling.flow import (
    SDEOptions,
    flow_log_likelihood,
    integrate_flow,
    rectified_pairs,
    stochastic_flow,
    straightness,
)
from fluxmatching.sampling.langevin import unadjusted_langevin
from fluxmatching.sampling.likelihood import bits_per_dim, log_likelihood
from fluxmatching.sampling.ode import ODESolver, edm_heun, probability_flow
from fluxmatching.sampling.reverse import predictor_corrector, reverse_ve
from fluxmatching.sampling.schedules import exponential_schedule, karras_schedule
from fluxmatching.training import Trainer, TrainingError, TrainingOptions
from fluxmatching.unet import UNet

__all__ = [
    "AugmentedField",
    "CosineFeatures",
    "CosinePath",
    "Coupling",
    "DSMOptions",
    "DenoisingScoreMatching",
    "Draws",
    "DualFluxMatching",
    "EDMField",
    "ExactCoupling",
    "Example",
    "FlowMatching",
    "FlowOptions",
    "FluxMatching",
    "FluxOptions",
    "FluxTarget",
    "GuidedField",
    "Horizon",
    "IndependentCoupling",
    "LearnedHorizon",
    "LinearFeatures",
    "LinearPath",
    "LogNormalNoise",
    "LogUniformNoise",
    "LogitNormalTimes",
    "LossNormalizer",
    "MatchedField",
    "NoiseAnnealedFluxMatching",
    "ODESolver",
    "QuadraticFeatures",
    "ReferenceSet",
    "SDEOptions",
    "SinkhornCoupling",
    "SmoothedField",
    "Trainer",
    "TrainingError",
    "TrainingOptions",
    "TruncatedExponentialHorizon",
    "UNet",
    "UniformHorizon",
    "UniformTimes",
    "VFluxMatching",
    "VarianceExplodingPath",
    "VariancePreservingPath",
    "augmentation_loss",
    "autocorrelation_loss",
    "bits_per_dim",
    "conditional_flow_matching_loss",
    "couple",
    "dsm_loss",
    "dual_flux_loss",
    "edm_heun",
    "effective_centers",
    "exponential_schedule",
    "field_from_denoiser",
    "field_from_diffusers",
    "field_from_noise_prediction",
    "field_from_velocity",
    "flow_log_likelihood",
    "flux_matching_loss",
    "flux_target",
    "integrate_flow",
    "karras_schedule",
    "load_example",
    "log_likelihood",
    "marginal_velocity",
    "mixing_loss",
    "noise_annealed_flux_loss",
    "predictor_corrector",
    "probability_flow",
    "quadratic_flux_loss",
    "rectified_pairs",
    "reverse_ve",
    "sinkhorn_divergence",
    "step_defect_loss",
    "stochastic_flow",
    "straightness",
    "unadjusted_langevin",
    "v_flux_loss",
]
