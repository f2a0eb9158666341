"""Transition weights of the linearised chain (Eq. 52) and the average they define (Eq. 9)."""

from torch import Tensor

from fluxkernels.checks import Groups, as_number_tensor, check_finite, check_points, choose, group, shape_of
from fluxkernels.ops.kde import kde
from fluxkernels.ops.registration import Op, register_recomputed_autograd


def _weights_fake(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor, backend: str) -> Tensor:
    return x0.new_empty((*x0.shape[:2], xt.shape[1]))


def _average_fake(
    x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor, backend: str
) -> Tensor:
    return values.new_empty((*x0.shape[:2], values.shape[-1]))


weights = Op(
    "transition_weights",
    "(Tensor x0, Tensor shift0, Tensor xt, Tensor sigma2, Tensor tau, str backend) -> Tensor",
    _weights_fake,
)
weighted_sum = Op(
    "transition_average",
    "(Tensor x0, Tensor shift0, Tensor xt, Tensor values, Tensor sigma2, Tensor tau, str backend) -> Tensor",
    _average_fake,
)


register_recomputed_autograd(weights)
register_recomputed_autograd(weighted_sum)


def _prepare(
    function: str,
    x0: Tensor,
    xt: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    tau: float | Tensor,
    backend: str | None,
) -> tuple[Groups, tuple[Tensor, ...], str]:
    """Check and flatten: (groups, (x0, shift0, xt, sigma2, tau), backend), shift0 = m(x0) - x0."""
    check_points(function, "x0", x0)
    check_points(function, "xt", xt, like=x0)
    check_points(function, "refs", refs, like=x0)
    check_finite(function, x0=x0, xt=xt, refs=refs)
    variance = as_number_tensor(function, "sigma2", sigma2, like=x0)
    time = as_number_tensor(function, "tau", tau, like=x0, zero=True)
    groups = group(function, x0=x0, xt=xt, refs=refs)
    name = choose(backend, x0.device)
    start, variance, time = (
        groups.points(x0),
        groups.per_group("sigma2", variance),
        groups.per_group("tau", time),
    )
    shift0, _, _ = kde(start, groups.points(refs), variance.unsqueeze(-1).expand(start.shape[:2]), name)
    return groups, (start, shift0, groups.points(xt), variance, time), name


def average(
    function: str,
    groups: Groups,
    x0: Tensor,
    shift0: Tensor,
    xt: Tensor,
    values: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    backend: str,
) -> Tensor:
    """`transition_average` once everything but `values` is flat."""
    check_points(function, "values", values, like=x0)
    check_finite(function, values=values)
    if values.shape[:-1] != (*groups.batch, xt.shape[1]):
        raise ValueError(
            f"{function}: values must have shape {[*groups.batch, xt.shape[1]]} + [V], one row for each end of a "
            f"chain, got {shape_of(values)}"
        )
    return groups.unflatten(weighted_sum(x0, shift0, xt, groups.points(values), sigma2, tau, backend))


def transition_weights(
    x0: Tensor,
    xt: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    tau: float | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Gaussian transition weights between starts and ends of chains (Eq. 52).

    w_ij = softmax over i of -|x_τ^j - μ_i|²/2v, with μ_i = e^{-τ} x0_i + (1-e^{-τ}) m(x0_i) and v = σ²(1-e^{-2τ}):
    the importance weight of end j for start i. At τ = 0 each end belongs to the nearest start.

    Args:
        x0: `[..., N, D]`, starts.
        xt: `[..., N', D]`, ends.
        refs: `[..., M, D]`, the centres that define m; leading dimensions broadcast.
        sigma2: σ² > 0, a float or a tensor of shape `[]` or `[...]` (one a group).
        tau: τ = t/σ² ≥ 0, dimensionless, same shapes as sigma2.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[..., N, N']`; columns sum to one. Differentiable in every tensor it takes.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the backend named cannot run here.
    """
    groups, tensors, name = _prepare("transition_weights", x0, xt, refs, sigma2, tau, backend)
    return groups.unflatten(weights(*tensors, name))


def transition_average(
    x0: Tensor,
    xt: Tensor,
    values: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    tau: float | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Σ_j w_ij values_j with the weights of `transition_weights`, which are never held (Eq. 9).

    Args:
        values: `[..., N', V]`, what each chain found at its end.
        The others: as in `transition_weights`.

    Returns:
        `[..., N, V]`. Differentiable in every tensor it takes.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the backend named cannot run here.
    """
    groups, (start, shift0, end, variance, time), name = _prepare(
        "transition_average", x0, xt, refs, sigma2, tau, backend
    )
    return average("transition_average", groups, start, shift0, end, values, variance, time, name)
