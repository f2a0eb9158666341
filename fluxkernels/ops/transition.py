"""Transition weights of the linearized chain (Eq. 52) and the average they define (Eq. 9)."""

from typing import NamedTuple

from torch import Tensor

from fluxkernels.checks import (
    Groups,
    as_number_tensor,
    check_finite,
    check_groups,
    check_points,
    pick_backend,
    shape_of,
)
from fluxkernels.ops.kde import kde_op
from fluxkernels.ops.registration import Op, register_recomputed_autograd


def _weights_fake(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor, backend: str) -> Tensor:
    return x0.new_empty((*x0.shape[:2], xt.shape[1]))


def _average_fake(
    x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor, backend: str
) -> Tensor:
    return values.new_empty((*x0.shape[:2], values.shape[-1]))


transition_weights_op = Op(
    "transition_weights",
    "(Tensor x0, Tensor shift0, Tensor xt, Tensor sigma2, Tensor tau, str backend) -> Tensor",
    _weights_fake,
)
transition_average_op = Op(
    "transition_average",
    "(Tensor x0, Tensor shift0, Tensor xt, Tensor values, Tensor sigma2, Tensor tau, str backend) -> Tensor",
    _average_fake,
)
register_recomputed_autograd(transition_weights_op)
register_recomputed_autograd(transition_average_op)


class Transition(NamedTuple):
    """Arguments of the transition ops, checked and flattened into B groups.

    Attributes:
        groups: the leading dimensions of the user's tensors.
        x0: starts `[B, N, D]`.
        shift0: m(x0) - x0 `[B, N, D]`.
        xt: ends `[B, N', D]`.
        sigma2: σ² `[B]`.
        tau: τ `[B]`.
        backend: name of the backend.
    """

    groups: Groups
    x0: Tensor
    shift0: Tensor
    xt: Tensor
    sigma2: Tensor
    tau: Tensor
    backend: str

    def weights(self) -> Tensor:
        """`[..., N, N']`"""
        return self.groups.unflatten(
            transition_weights_op(self.x0, self.shift0, self.xt, self.sigma2, self.tau, self.backend)
        )

    def average(self, function: str, values: Tensor) -> Tensor:
        """`[..., N, V]` of values `[..., N', V]`, which it checks; error messages name `function`."""
        check_points(function, "values", values, like=self.x0)
        check_finite(function, values=values)
        if values.shape[:-1] != (*self.groups.batch, self.xt.shape[1]):
            raise ValueError(
                f"{function}: values must have shape {[*self.groups.batch, self.xt.shape[1]]} + [V], one row for each "
                f"end of a chain, got {shape_of(values)}"
            )
        flat = self.groups.points(values)
        return self.groups.unflatten(
            transition_average_op(self.x0, self.shift0, self.xt, flat, self.sigma2, self.tau, self.backend)
        )


def _prepare(
    function: str,
    x0: Tensor,
    xt: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    tau: float | Tensor,
    backend: str | None,
) -> Transition:
    groups = check_groups(function, x0=x0, xt=xt, refs=refs)
    variance = as_number_tensor(function, "sigma2", sigma2, like=x0)
    time = as_number_tensor(function, "tau", tau, like=x0, zero=True)
    name = pick_backend(backend, x0.device)
    start, variance, time = (
        groups.points(x0),
        groups.per_group("sigma2", variance),
        groups.per_group("tau", time),
    )
    shift0, _, _ = kde_op(
        start, groups.points(refs), variance.unsqueeze(-1).expand(start.shape[:2]), name, results=("shift",)
    )
    return Transition(groups, start, shift0, groups.points(xt), variance, time, name)


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
        refs: `[..., M, D]`, the reference points that define m; leading dimensions broadcast.
        sigma2: σ² > 0, a float or a tensor of shape `[]` or `[...]` (one per group).
        tau: τ = t/σ² ≥ 0, dimensionless, same shapes as sigma2.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[..., N, N']`; columns sum to one. Differentiable in every tensor argument.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the requested backend cannot run here.
    """
    return _prepare("transition_weights", x0, xt, refs, sigma2, tau, backend).weights()


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
    """Σ_j w_ij values_j with the weights of `transition_weights`, which are never materialized (Eq. 9).

    Args:
        values: `[..., N', V]`, one row per end of a chain.
        x0, xt, refs, sigma2, tau, backend: as in `transition_weights`.

    Returns:
        `[..., N, V]`. Differentiable in every tensor argument.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the requested backend cannot run here.
    """
    return _prepare("transition_average", x0, xt, refs, sigma2, tau, backend).average("transition_average", values)
