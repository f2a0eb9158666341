"""The ops: user checks, one `torch.library` registration for all backends, autograd and fake implementations."""

from fluxkernels.ops.kde import kde_log_density, kde_mean, kde_score
from fluxkernels.ops.langevin import FluxPass, flux_pass, langevin_chain, langevin_step
from fluxkernels.ops.residual import residual_gradient
from fluxkernels.ops.transition import transition_average, transition_weights

__all__ = [
    "FluxPass",
    "flux_pass",
    "kde_log_density",
    "kde_mean",
    "kde_score",
    "langevin_chain",
    "langevin_step",
    "residual_gradient",
    "transition_average",
    "transition_weights",
]
