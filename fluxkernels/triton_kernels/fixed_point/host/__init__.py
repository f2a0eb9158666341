"""Kernels for many dimensions of float32 points: fixed-point words, exact products on the matrix units.

Distances of queries from reference points come from inner products, which are exact in integers; sums of reference
points are exact products again. A chain runs in Gram space. Float64 arithmetic is per coordinate, never per pair, but
for rows whose weights need it. Queries are taken in blocks, so that matrices of pairs stay small.
"""

from fluxkernels.triton_kernels.fixed_point.host.kde import kde as kde
from fluxkernels.triton_kernels.fixed_point.host.kde import kde_backward as kde_backward
from fluxkernels.triton_kernels.fixed_point.host.kde import residual_gradient as residual_gradient
from fluxkernels.triton_kernels.fixed_point.host.kernel_average import kernel_average as kernel_average
from fluxkernels.triton_kernels.fixed_point.host.kernel_average import (
    kernel_average_backward as kernel_average_backward,
)
from fluxkernels.triton_kernels.fixed_point.host.langevin import flux_pass as flux_pass
from fluxkernels.triton_kernels.fixed_point.host.langevin import langevin_chain as langevin_chain
from fluxkernels.triton_kernels.fixed_point.host.transition import transition_average as transition_average
from fluxkernels.triton_kernels.fixed_point.host.transition import transition_weights as transition_weights
