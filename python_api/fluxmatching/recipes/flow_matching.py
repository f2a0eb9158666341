"""Closed-form target of flow matching with the linear path, over a set of points with weights."""

from __future__ import annotations

from torch import Tensor

from fluxkernels import kernel_average
from fluxmatching.fields import per_sample


def flow_matching_target(
    x: Tensor, t: Tensor, data: Tensor, *, log_weights: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Compute the marginal velocity E[x1 - x0 | x] of x = t x1 + (1 - t) x0, x0 standard normal.

    v(x) = (m(x) - x)/(1 - t), with m the mean of the points under weights softmax_j(b_j - |x - t r_j|²/2(1 - t)²). As a
    target in place of x1 - x0 it has no variance (closed-form and stable flow matching). `marginal_velocity` is the
    same for every path and at both ends of time.

    Args:
        x: `[N, D]`.
        t: times with 0 < t < 1, `[N]`.
        data: points r, `[M, D]`: the dataset, or a large minibatch.
        log_weights: b, `[M]`, log of the weight of a point; -inf for one that is absent, such as one of another class.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[N, D]`, in units of x.
    """
    at = per_sample(t, x)
    mean, _ = kernel_average(x / at, data, ((1 - t) / t).square(), log_weights=log_weights, backend=backend)
    return (mean - x) / (1 - at)
