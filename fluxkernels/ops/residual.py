"""The closed-form part of the residual's gradient."""

import math
from numbers import Real

import torch
from torch import Tensor

from fluxkernels.checks import Groups, check_finite, check_same_shape, check_tensor
from fluxkernels.devices import on_device
from fluxkernels.ops.kde import prepare
from fluxkernels.ops.registration import Op, register_recomputed_autograd


def _fake(z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor, factor: Tensor | None, backend: str) -> Tensor:
    return z.new_empty(z.shape)


residual_gradient_op = Op(
    "residual_gradient",
    "(Tensor z, Tensor field, Tensor refs, Tensor sigma2, Tensor? factor, str backend) -> Tensor",
    _fake,
)
register_recomputed_autograd(residual_gradient_op)


def residual_gradient(
    z: Tensor,
    field: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    *,
    factor: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """J_s f - c ∇(Δp̂/p̂), with c = 1 the part of ∇r that needs no derivative of the field.

    The residual of a field f is r = ∇·u + u·s with u = f - s (Sec. 3.2), which is ∇·f + f·s - Δp̂/p̂. Hence
    ∇r = [∇(∇·f) + J_fᵀ s] + J_s f - ∇(Δp̂/p̂), and only the bracket needs the network. With a_j = |z - r_j|² and
    moments under the weights of `kde_score`, J_s f = (Cov(r) f/σ² - f)/σ² and
    ∇(Δp̂/p̂) = [2(z - m) + Cov(a, r)/σ²]/σ⁴.

    For u = f - w with a field w = a z + c s in place of the score, the part is J_s (f - a z) - c ∇(Δp̂/p̂) - a s.

    Args:
        z: `[..., N, D]`, the points.
        field: f(z), shape of z.
        refs: `[..., M, D]`, the reference points; leading dimensions broadcast.
        sigma2: σ² > 0: a float, or a tensor of shape `[]`, `[...]` or `[..., N]`.
        factor: c, of any sign, in the shapes of sigma2.
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
    factors = _factors(factor, groups, z)
    return groups.unflatten(residual_gradient_op(points, groups.points(field), refs, variance, factors, name))


def _factors(factor: float | Tensor, groups: Groups, z: Tensor) -> Tensor | None:
    """Check the factor and flatten it to `[B, N]`; None for 1."""
    function, dtype = "residual_gradient", torch.promote_types(z.dtype, torch.float32)
    if isinstance(factor, Tensor):
        check_tensor(function, "factor", factor)
        if factor.device != z.device and factor.ndim:
            raise ValueError(f"{function}: factor must be on {z.device} like the first argument, got {factor.device}")
        number = on_device(f"{function}: factor", factor, z.device, dtype)
        check_finite(function, factor=number)
    elif isinstance(factor, bool) or not isinstance(factor, Real):
        raise TypeError(f"{function}: factor must be a number or a floating tensor, got {type(factor).__name__}")
    elif not torch.compiler.is_compiling() and not math.isfinite(factor):
        raise ValueError(f"{function}: factor must be finite, got {factor}")
    elif factor == 1:
        return None
    else:
        number = torch.full((), float(factor), dtype=dtype, device=z.device)
    return groups.per_query("factor", number, z.shape[-2])
