"""Log-likelihood of data under a learned field: change of variables along the probability-flow ODE (Sec. 3.5)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fluxkernels.checks import check_choice, check_positive, check_sigma_range, check_tensor
from fluxmatching.engines import without_engine
from fluxmatching.field_modules import DetachedParameters, check_no_cached_parametrizations, pull_back
from fluxmatching.fields import NoisyField, call_field
from fluxmatching.losses.second_derivatives import basis
from fluxmatching.sampling.langevin import check_generator, check_samples
from fluxmatching.sampling.ode import ODESolver, check_adaptive, integrate


def log_likelihood(
    field: NoisyField,
    x: Tensor,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    divergence: str = "hutchinson",
    generator: torch.Generator | None = None,
    solver: ODESolver = ODESolver(),
) -> Tensor:
    """Compute log p(x) in nats, p the distribution that `probability_flow` samples from.

    The ODE dx/dσ = -σ f(x, σ) carries x from sigma_min up to sigma_max, where the density is N(0, σ_max² I), and

        log p(x) = log N(x(σ_max); 0, σ_max² I) - ∫ σ ∇·f(x(σ), σ) dσ.

    For a field that is not the score this is the density of that ODE's samples, which may
    differ from the stationary distribution of the field's Langevin dynamics.

    Args:
        field: f(x, σ), x `[N, *event]`, σ of shape `[]`; differentiable in x.
        x: data, `[N, *event]`, assumed at noise level sigma_min. Add uniform noise of the width of a level to digital
            data first; their density is unbounded otherwise.
        sigma_min, sigma_max: ends of the integration, 0 < sigma_min < sigma_max.
        divergence: "hutchinson" (one probe of random signs for the whole path: unbiased, one backward pass per
            evaluation) or "exact" (one backward pass per coordinate).
        generator: makes the probe, on the device of x; None uses torch's own.
        solver: an adaptive method and its tolerances.

    Returns:
        `[N]`, dtype of x. In float32 the rounding of a step is about 10⁻⁷ of D log(σ_max/σ_min) nats.

    Raises:
        ImportError: torchdiffeq is not installed.
        ValueError: the solver takes equal steps of σ, as in `probability_flow`.
        RuntimeError: the field's derivatives cannot be taken, or the tolerance cannot be met.
    """
    function = "log_likelihood"
    check_samples(function, x)
    check_sigma_range(function, sigma_min, sigma_max)
    check_adaptive(function, solver)
    inner, probe = prepare_divergence(function, field, x, divergence, generator)

    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        return -sigma * call_field(inner, z, sigma)

    return integrate_density(function, velocity, x, (sigma_min, sigma_max), solver, base_std=sigma_max, probe=probe)


def prepare_divergence(
    function: str, field: NoisyField, x: Tensor, divergence: str, generator: torch.Generator | None
) -> tuple[NoisyField, Tensor | None]:
    """Return the field to differentiate, without an engine's wrapper, and the probe: None for the exact divergence."""
    check_choice(function, "divergence", divergence, ("hutchinson", "exact"))
    check_no_cached_parametrizations(function, field)
    field = without_engine(function, field)
    if divergence == "exact":
        return field, None
    check_generator(generator)
    return field, torch.empty_like(x).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def integrate_density(
    function: str,
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    ends: tuple[float, float],
    solver: ODESolver,
    *,
    base_std: float,
    probe: Tensor | None,
    variable: str = "sigma",
) -> Tensor:
    """Compute log p(x) at time ends[0], where the flow dx/dt = v(x, t) carries p to N(0, base_std² I) at ends[1].

        log p(x) = log N(x(ends[1]); 0, base_std² I) + ∫ ∇·v(x(t), t) dt from ends[0] to ends[1].

    Args:
        function: name of the caller, for messages.
        velocity: v(x, t), t of shape `[]`, made of a field of `prepare_divergence`.
        x: `[N, *event]`.
        ends: times of x and of the base distribution.
        solver: see `ODESolver`.
        base_std: standard deviation of the base distribution.
        probe: of `prepare_divergence`.
        variable: name of t in messages.

    Returns:
        `[N]`.
    """

    def rates(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with DetachedParameters():
            return _divergence(function, velocity, state[0], t.to(x.dtype), probe)

    with torch.no_grad():
        z, gain = integrate(function, rates, (x, x.new_zeros(len(x))), ends, solver, variable)[-1]
    norm = math.log(base_std * math.sqrt(2 * math.pi))
    result: Tensor = gain - (z.square() / (2 * base_std**2) + norm).flatten(1).sum(1)
    return result


def _divergence(
    function: str, velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return v and ∇·v, or its estimate εᵀ J_v ε, both detached."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x.clone(), t)  # some networks begin with an operation in place
        # Otherwise the divergence of a field that works under no_grad would silently count as zero.
        if not v.requires_grad:
            raise RuntimeError(
                f"{function}: the field's result does not depend on x differentiably; does it use torch.no_grad(), "
                "detach() or torch.inference_mode()?"
            )
        total = x.new_zeros(len(x))
        for direction in basis(x, grouped=False) if probe is None else (probe,):
            pulled = pull_back(v, x, direction, retain_graph=probe is None)
            total = total + (pulled * direction).flatten(1).sum(1)
    return v.detach(), total


def bits_per_dim(log_likelihood: Tensor, dimensions: int, width: float = 2 / 255) -> Tensor:
    """Return -log₂ P/D of digital data, P ≈ p(x) · width^D: bits per coordinate.

    Args:
        log_likelihood: log p(x) in nats, any shape.
        dimensions: D, such as 3072 for CIFAR-10.
        width: distance between levels in the units of x; 2/255 for bytes scaled to [-1, 1].

    Returns:
        Shape of log_likelihood.
    """
    check_tensor("bits_per_dim", "log_likelihood", log_likelihood)
    if isinstance(dimensions, bool) or not isinstance(dimensions, int) or dimensions < 1:
        raise ValueError(f"bits_per_dim: dimensions must be a positive integer, got {dimensions!r}")
    width = check_positive("bits_per_dim", "width", width)
    return -log_likelihood / (dimensions * math.log(2)) - math.log2(width)
