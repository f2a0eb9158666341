"""Deterministic sampling: the probability-flow ODE with fixed and with adaptive steps (Sec. 3.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fluxkernels.checks import check_choice, check_positive, check_sigma_range
from fluxkernels.devices import has_values
from fluxmatching.fields import NoisyField, call_field
from fluxmatching.sampling.langevin import Callback, check_samples
from fluxmatching.sampling.reverse import field_at
from fluxmatching.sampling.schedules import check_levels

ADAPTIVE = ("adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8")  # of torchdiffeq, by their order


@dataclass(frozen=True)
class ODESolver:
    """Adaptive solver of torchdiffeq and its tolerances. Construction checks them.

    Attributes:
        method: "adaptive_heun", "fehlberg2", "bosh3", "dopri5" or "dopri8".
        rtol, atol: relative and absolute tolerance per step, as a root mean square over the whole state.
    """

    method: str = "adaptive_heun"
    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        check_choice("ODESolver", "method", self.method, ADAPTIVE)
        check_positive("ODESolver", "rtol", self.rtol)
        check_positive("ODESolver", "atol", self.atol)


def edm_heun(field: NoisyField, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """Sample by Heun's method on dx/dσ = -σ f(x, σ) (Karras et al. 2022, Algorithm 1).

    Takes two evaluations of the field per step, one for a last step to σ = 0.

    Args:
        field: f(x, σ), x `[N, *event]`, σ of shape `[]`.
        x: `[N, *event]`, drawn from N(0, σ_0² I).
        sigmas: decreasing noise levels `[K + 1]`, such as those of `karras_schedule(K)`.
        callback: called as `callback(k, x)` after step k = 1 … K.

    Returns:
        `[N, *event]`, at noise level σ_K.
    """
    levels = check_levels("edm_heun", x, sigmas)
    with torch.no_grad():
        for k, (sigma, lower) in enumerate(pairwise(levels), start=1):
            slope = -sigma * field_at(field, x, sigma)
            following = x + (lower - sigma) * slope
            if lower > 0:
                slope = (slope - lower * field_at(field, following, lower)) / 2
                following = x + (lower - sigma) * slope
            x = following
            if callback is not None:
                callback(k, x)
    return x


def probability_flow(
    field: NoisyField,
    x: Tensor,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    solver: ODESolver = ODESolver(),
) -> Tensor:
    """Sample by the probability-flow ODE dx/dσ = -σ f(x, σ) with error control (Sec. 3.5, Table 4).

    Args:
        field: f(x, σ), x `[N, *event]`, σ of shape `[]`.
        x: `[N, *event]`, drawn from N(0, σ_max² I).
        sigma_min, sigma_max: ends of the integration, 0 < sigma_min < sigma_max.
        solver: method and tolerances.

    Returns:
        `[N, *event]`, at noise level sigma_min.

    Raises:
        ImportError: torchdiffeq is not installed.
        RuntimeError: the tolerance cannot be met, as with a field that is not finite.
    """
    function = "probability_flow"
    check_samples(function, x)
    check_sigma_range(function, sigma_min, sigma_max)
    with torch.no_grad():
        end: Tensor = integrate(
            function,
            lambda sigma, z: -sigma.to(z.dtype) * call_field(field, z, sigma.to(z.dtype)),
            x,
            (sigma_max, sigma_min),
            solver,
        )
    return end


def integrate(
    function: str,
    velocity: Callable[..., Any],
    state: Any,
    ends: tuple[float, float],
    solver: ODESolver,
) -> Any:
    """Return the solution at ends[1] of d state/dσ = velocity(σ, state); state is a tensor or a tuple of tensors.

    Raises:
        ImportError: torchdiffeq is not installed.
        RuntimeError: the tolerance cannot be met.
    """
    if not isinstance(solver, ODESolver):
        raise TypeError(f"{function}: solver must be an ODESolver, got {solver!r}")
    rtol, atol = float(solver.rtol), float(solver.atol)
    try:
        # Its tableaus are tensors that are made at the import, for good.
        with torch.device("cpu"):
            from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(f"fluxmatching.{function} needs torchdiffeq: pip install torchdiffeq") from error
    first = state if isinstance(state, Tensor) else state[0]
    if not torch.compiler.is_compiling() and not has_values(first):
        raise RuntimeError(
            f"{function}: x must have values, by which the solver chooses its steps; a tensor on meta, a fake tensor "
            f"and one in a graph that is traced have none; edm_heun takes fixed steps"
        )
    sigmas = torch.tensor(ends, dtype=torch.float64, device=first.device)
    # Without this the last step of torchdiffeq passes the end, to negative σ, and the interpolated result can be wrong.
    options = {"step_t": sigmas[1:]}
    reached = [ends[0]]

    def traced(sigma: Tensor, state: Any) -> Any:
        reached.append(sigma.item())
        return velocity(sigma, state)

    try:
        path = odeint(traced, state, sigmas, rtol=rtol, atol=atol, method=solver.method, options=options)
    except AssertionError as error:  # of torchdiffeq, when its step underflows
        raise RuntimeError(
            f"{function}: no step meets rtol {rtol:g} and atol {atol:g} at sigma {reached[-1]:.4g}; is the field "
            f"finite there?"
        ) from error
    return path[-1] if isinstance(state, Tensor) else tuple(part[-1] for part in path)
