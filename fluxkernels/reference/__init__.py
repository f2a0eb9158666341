"""The `torch` backend, the reference implementation: every formula once, in plain PyTorch.

It computes in float64 for every input dtype (in float32 on devices that have no float64) and returns the input's
dtype. Shapes are flat, as in `fluxkernels.implementation`.
"""

from fluxkernels.philox import normal
from fluxkernels.reference.kde import kde, kde_backward
from fluxkernels.reference.kernel_average import kernel_average, kernel_average_backward
from fluxkernels.reference.langevin import flux_pass, langevin_chain
from fluxkernels.reference.residual import residual_gradient
from fluxkernels.reference.sample_reference import sample_reference
from fluxkernels.reference.transition import transition_average, transition_weights

__all__ = [
    "flux_pass",
    "kde",
    "kde_backward",
    "kernel_average",
    "kernel_average_backward",
    "langevin_chain",
    "normal",
    "residual_gradient",
    "sample_reference",
    "transition_average",
    "transition_weights",
]
