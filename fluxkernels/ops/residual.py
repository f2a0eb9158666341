"""The closed-form part of the residual's gradient."""

from torch import Tensor

from fluxkernels.checks import check_finite, check_same_shape
from fluxkernels.ops.kde import prepare
from fluxkernels.ops.registration import Op, register_recomputed_autograd


def _fake(z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor, backend: str) -> Tensor:
    return z.new_empty(z.shape)


residual_gradient_op = Op(
    "residual_gradient", "(Tensor z, Tensor field, Tensor refs, Tensor sigma2, str backend) -> Tensor", _fake
)
register_recomputed_autograd(residual_gradient_op)


def residual_gradient(
    z: Tensor, field: Tensor, refs: Tensor, sigma2: float | Tensor, *, backend: str | None = None
) -> Tensor:
    """J_s f - ∇(Δp̂/p̂): the part of ∇r that needs no derivative of the field.

    The residual of a field f is r = ∇·u + u·s with u = f - s (Sec. 3.2), which is ∇·f + f·s - Δp̂/p̂. Hence
    ∇r = [∇(∇·f) + J_fᵀ s] + J_s f - ∇(Δp̂/p̂), and only the bracket needs the network. With a_j = |z - r_j|² and
    moments under the weights of `kde_score`, J_s f = (Cov(r) f/σ² - f)/σ² and
    ∇(Δp̂/p̂) = [2(z - m) + Cov(a, r)/σ²]/σ⁴.

    Args:
        z: `[..., N, D]`, the points.
        field: f(z), shape of z.
        refs: `[..., M, D]`, the reference points; leading dimensions broadcast.
        sigma2: σ² > 0: a float, or a tensor of shape `[]`, `[...]` or `[..., N]`.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[..., N, D]`. Differentiable in every tensor argument.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the requested backend cannot run here.
    """
    groups, points, refs, variance, name = prepare("residual_gradient", z, refs, sigma2, backend, points="z")
    check_same_shape("residual_gradient", "field", field, "z", z)
    check_finite("residual_gradient", field=field)
    return groups.unflatten(residual_gradient_op(points, groups.points(field), refs, variance, name))
