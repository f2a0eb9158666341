"""The mixing proxy: fields whose Langevin dynamics reach the noised data in few steps (Sec. 4.4, B.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fluxkernels import philox
from fluxkernels.checks import (
    as_number_tensor,
    check_finite,
    check_num_steps,
    check_positive,
    check_seed,
    check_tensor,
    read_numbers,
)
from fluxkernels.devices import no_autocast
from fluxmatching.fields import NoisyField, finite_field
from fluxmatching.losses.annealed import LossNormalizer


def mixing_loss(
    field: NoisyField,
    x: Tensor,
    sigma: float | Tensor,
    normalizer: LossNormalizer | None = None,
    *,
    step_size: float = 0.2,
    epsilon: float = 0.05,
    iterations: int = 50,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Measure how far one Langevin step returns perturbed samples to p_σ (Eq. 43, 44); a term of Eq. 45.

    Half of the noised minibatch x0 = x + σ n0 is the reference. The other half is perturbed and moved:

        x_noise = x0 + σ z,   x_mix = x_noise + h f(x_noise, σ) + √(2h) z',   h = step_size · σ²,
        ratio = S(x_mix, reference) / sg[S(x_noise, reference)].

    >>> total = flux + 0.01 * mixing_loss(field, x, sigma, mixing_normalizer)  # doctest: +SKIP

    Args:
        field: f(z, σ), z `[n, *event]`, σ of shape `[]`.
        x: clean minibatch, `[N, *event]` with N ≥ 4; for odd N the last sample is not used.
        sigma: σ > 0, one number.
        normalizer: s_mixing, separate from that of the flux loss; None returns the ratio itself.
        step_size: h/σ²; the paper's is 0.2.
        epsilon, iterations: see `sinkhorn_divergence`.
        seed: makes n0, z and z' by Philox, n0 equal to that of the flux loss; None uses torch's generator.

    Returns:
        ratio / exp(s_mixing(σ)) + s_mixing(σ), one number per minibatch, repeated for every sample: `[N]`.
        Differentiable in the parameters of field and normalizer.

    Raises:
        ImportError: geomloss is not installed.
    """
    function = "mixing_loss"
    check_tensor(function, "x", x)
    check_finite(function, x=x)
    check_seed(function, seed)
    if len(x) < 4:
        raise ValueError(f"{function}: x must have at least 4 samples, got {len(x)}")
    level = as_number_tensor(function, "sigma", sigma, like=x).detach()
    if level.ndim:
        raise ValueError(f"{function}: sigma must be one number, got shape {list(level.shape)}")
    step_size = check_positive(function, "step_size", step_size)
    half = len(x) // 2
    if seed is None:
        start, pushes = torch.randn_like(x), torch.randn(2, half, *x.shape[1:], dtype=x.dtype, device=x.device)
    else:
        key = philox.as_seed(seed, x.device)
        start = philox.normal(key, (1, *x.shape), philox.START, level.dtype)[0].to(x.dtype)
        pushes = philox.normal(key, (2, half, *x.shape[1:]), philox.MIXING, level.dtype).to(x.dtype)
    noised = (x + level * start).detach()
    reference, off = noised[:half], noised[half : 2 * half] + level * pushes[0]
    h = step_size * level.square()
    mixed = off + h * finite_field("mixing_loss", field, off, level) + (2 * h).sqrt() * pushes[1]
    with torch.no_grad():
        before = sinkhorn_divergence(off, reference, epsilon=epsilon, iterations=iterations)
    after = sinkhorn_divergence(mixed, reference, epsilon=epsilon, iterations=iterations)
    # Where all points coincide, both are zero up to rounding, and their ratio is 1 in the limit.
    rounding = 100 * torch.finfo(before.dtype).eps * epsilon
    ratio = torch.where(before > rounding, after / before.clamp_min(rounding), torch.ones_like(after))
    loss = ratio if normalizer is None else normalizer(ratio, level)
    return loss.expand(len(x))


def sinkhorn_divergence(x: Tensor, y: Tensor, *, epsilon: float = 0.05, iterations: int = 50) -> Tensor:
    """Compute the debiased entropic transport cost S = OT_ε(x, y) - OT_ε(x, x)/2 - OT_ε(y, y)/2 with geomloss.

    The cost is |x - y|²/2 and ε its temperature; geomloss calls them p = 2 and blur = √ε. The iterations start at a
    temperature of the squared diameter of both sets and cool down to ε by equal factors; `scaling` of geomloss is
    chosen to give that number of iterations. 50 with cooling are enough where 50 at ε alone are far from converged, as
    on images, where ε is 10⁻⁴ of the cost.

    Args:
        x, y: samples of equal weight, `[n, *event]` and `[m, *event]`.
        epsilon: ε > 0, in squared units of x.
        iterations: at least 4; two are made where the diameter is below √ε, since no cooling is needed.

    Returns:
        `[]`, about W2²/2 for small ε; differentiable in x and y.

    Raises:
        ImportError: geomloss is not installed.
    """
    function = "sinkhorn_divergence"
    check_tensor(function, "x", x)
    check_tensor(function, "y", y, like=x)
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"{function}: x and y must be samples of one shape, got {list(x.shape)} and {list(y.shape)}")
    epsilon = check_positive(function, "epsilon", epsilon)
    if check_num_steps(function, iterations, "iterations") < 4:
        raise ValueError(f"{function}: iterations must be at least 4, got {iterations}")
    try:
        from geomloss import SamplesLoss
    except ImportError as error:
        raise ImportError(f"fluxmatching.{function} needs geomloss: pip install geomloss") from error
    # geomloss expands |x - y|², which loses digits far from the origin.
    center = y.detach().flatten(1).mean(0)
    x, y = x.flatten(1) - center, y.flatten(1) - center
    both = torch.cat([x.detach(), y.detach()])
    blur = math.sqrt(epsilon)
    (diameter,) = read_numbers(function, "x and y", (both.amax(0) - both.amin(0)).norm().reshape(1))
    if not math.isfinite(diameter):
        raise ValueError(f"{function}: x and y must be finite, got points {diameter} apart")
    # geomloss: one iteration at the diameter, those of the descent, one at blur.
    scaling = (blur / diameter) ** (1 / (iterations - 2.5)) if diameter > blur else 0.5
    loss = SamplesLoss("sinkhorn", p=2, blur=blur, diameter=max(diameter, blur), scaling=scaling, backend="tensorized")
    # geomloss makes its weights on the default device, and leaves gradients enabled, whatever they were before.
    with x.device, no_autocast(x.device), torch.set_grad_enabled(torch.is_grad_enabled()):
        found: Tensor = loss(x, y)
    return found
