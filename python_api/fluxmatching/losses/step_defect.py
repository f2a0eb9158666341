"""The error of one Langevin step of finite size: a term that keeps a fast field stable."""

from __future__ import annotations

from torch import Tensor

from fluxkernels.checks import check_finite, check_positive
from fluxkernels.devices import no_autocast
from fluxmatching.fields import Field, call_field, finite_field
from fluxmatching.losses.dual import as_points


def step_defect_loss(field: Field, x: Tensor, step_size: float) -> Tensor:
    """Measure how much a field changes along its own step, one number per sample.

        ℓ = h/(2D) |f(x + h f(x)) - f(x)|²,   x ~ p, h the step size.

    An Euler step of size h follows dx = f dt well where f hardly changes along it, and is stable there. A field that is
    made faster without this term becomes too large for any step of useful size. For a linear field f = Bx and E xxᵀ = Σ
    the mean loss is h³/(2D) tr(B² Σ B²ᵀ).

    Args:
        field: f(x), x `[n, *event]`; at a noise level σ it is `lambda z: f(z, sigma)`.
        x: samples of p, `[N, *event]`; at a noise level σ samples of p_σ.
        step_size: h > 0, in squared units of x; at a noise level σ about σ²/2, a step that a sampler would take.

    Returns:
        `[N]`, without units. Differentiable in the parameters of the field, through both of its evaluations; x is
        constant.

    Raises:
        ValueError: step_size is not positive, or x or the field, at x or after the step, is not finite.
        TypeError: an argument of the wrong type.
    """
    function = "step_defect_loss"
    D = as_points(function, field, x, 1).shape[1]
    step_size = check_positive(function, "step_size", step_size)
    start = x.detach()
    here = finite_field(function, field, start.clone())
    with no_autocast(x.device):
        moved = start + step_size * here
    there = call_field(field, moved)
    check_finite(function, **{f"field after a step of {step_size:g}": there})
    with no_autocast(x.device):
        return step_size / (2 * D) * (there - here).square().flatten(1).sum(1)
