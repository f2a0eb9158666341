"""The `torch` backend: every formula once, in plain PyTorch. What these functions return is the definition of right.

They compute in float64 whatever the input's dtype (float32 on devices that have no float64) and return the
input's dtype. Shapes here are always flat: queries `[B, N, D]`, centres `[B, M, D]`, B groups.
"""

from fluxkernels.philox import normal
from fluxkernels.reference.kde import kde, kde_backward
from fluxkernels.reference.langevin import flux_pass, langevin_chain
from fluxkernels.reference.residual import residual_gradient
from fluxkernels.reference.transition import transition_average, transition_weights

__all__ = [
    "flux_pass",
    "kde",
    "kde_backward",
    "langevin_chain",
    "normal",
    "residual_gradient",
    "transition_average",
    "transition_weights",
]
