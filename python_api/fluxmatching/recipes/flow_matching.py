"""Closed-form target of flow matching with the linear path, over a set of points with weights."""

from __future__ import annotations

from torch import Tensor

from fluxkernels import kernel_average
from fluxkernels.checks import can_check_values, check_points
from fluxmatching.fields import per_sample
from fluxmatching.flows.closed_form import check_refs
from fluxmatching.flows.paths import check_times


def flow_matching_target(
    x: Tensor, t: float | Tensor, data: Tensor, *, log_weights: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Compute the marginal velocity E[x1 - x0 | x] of x = t x1 + (1 - t) x0, x0 standard normal.

    v(x) = (m(x) - x)/(1 - t), with m the mean of the points under weights softmax_j(b_j - |x - t r_j|²/2(1 - t)²). As a
    target in place of x1 - x0 it has no variance (closed-form and stable flow matching). `marginal_velocity` is the
    same for every path and at both ends of time.

    Args:
        x: `[N, *event]`.
        t: times with 0 < t < 1, one number or `[N]`.
        data: points r, `[M, *event]`: the dataset, or a large minibatch.
        log_weights: b, `[M]`, log of the weight of a point; -inf for one that is absent, such as one of another class.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[N, *event]`, in units of x.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
    """
    function = "flow_matching_target"
    check_points(function, "x", x)
    check_refs(function, data, x, "x", name="data")
    time = check_times(function, t, x)
    if can_check_values(time) and not bool(((time > 0) & (time < 1)).all()):
        raise ValueError(f"{function}: t must lie between 0 and 1; marginal_velocity takes both ends")
    at = per_sample(time, x).to(x.dtype)
    mean, _ = kernel_average(
        (x / at).flatten(1), data.flatten(1), ((1 - time) / time).square(), log_weights=log_weights, backend=backend
    )
    return (mean.reshape(x.shape) - x) / (1 - at)
