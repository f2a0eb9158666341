"""Deterministic sampling: the probability-flow ODE with fixed and with adaptive steps (Sec. 3.5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fluxkernels.checks import check_choice, check_num_steps, check_positive, check_sigma_range
from fluxkernels.devices import has_values
from fluxmatching.fields import NoisyField, call_field
from fluxmatching.sampling.langevin import Callback, check_samples
from fluxmatching.sampling.reverse import field_at
from fluxmatching.sampling.schedules import check_levels

ADAPTIVE = ("adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8")  # of torchdiffeq, by their order
FIXED = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk4": "rk4"}  # and their names in torchdiffeq


@dataclass(frozen=True)
class ODESolver:
    """Solver of torchdiffeq: adaptive with its tolerances, or of fixed steps with their number. Construction checks it.

    Attributes:
        method: adaptive: "adaptive_heun", "fehlberg2", "bosh3", "dopri5" or "dopri8"; fixed steps: "euler" (order 1,
            one evaluation per step), "midpoint" (2, two), "heun" (2, two) or "rk4" (4, four). "euler" and "midpoint"
            never evaluate the field at the end of the integration.
        rtol, atol: relative and absolute tolerance per step, as a root mean square over the whole state; not used by
            methods of fixed steps.
        num_steps: number of equal steps; required for methods of fixed steps, and for those alone.
    """

    method: str = "adaptive_heun"
    rtol: float = 1e-5
    atol: float = 1e-5
    num_steps: int | None = None

    def __post_init__(self) -> None:
        check_choice("ODESolver", "method", self.method, (*ADAPTIVE, *FIXED))
        check_positive("ODESolver", "rtol", self.rtol)
        check_positive("ODESolver", "atol", self.atol)
        if not self.is_adaptive:
            check_num_steps("ODESolver", self.num_steps, f"num_steps of method {self.method!r}")
        elif self.num_steps is not None:
            raise ValueError(
                f"ODESolver: num_steps must be None for method {self.method!r}, which chooses its steps by rtol and "
                f"atol, got {self.num_steps!r}; {', '.join(map(repr, FIXED))} take fixed steps"
            )

    @property
    def is_adaptive(self) -> bool:
        """Return whether the method chooses its steps."""
        return self.method in ADAPTIVE


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
        solver: an adaptive method and its tolerances.

    Returns:
        `[N, *event]`, at noise level sigma_min.

    Raises:
        ImportError: torchdiffeq is not installed.
        ValueError: the solver takes equal steps of σ, which are far too long at small σ; `edm_heun` takes the steps
            of a schedule.
        RuntimeError: the tolerance cannot be met, as with a field that is not finite.
    """
    function = "probability_flow"
    check_samples(function, x)
    check_sigma_range(function, sigma_min, sigma_max)
    check_adaptive(function, solver)
    with torch.no_grad():
        states = integrate(
            function,
            lambda sigma, z: -sigma.to(z.dtype) * call_field(field, z, sigma.to(z.dtype)),
            x,
            (sigma_max, sigma_min),
            solver,
        )
    end: Tensor = states[-1]
    return end


def check_solver(function: str, solver: object) -> ODESolver:
    """Return the solver if it is an `ODESolver`."""
    if not isinstance(solver, ODESolver):
        raise TypeError(f"{function}: solver must be an ODESolver, got {solver!r}")
    return solver


def check_adaptive(function: str, solver: object) -> ODESolver:
    """Return the solver if it is an `ODESolver` of an adaptive method, as an integration over σ needs."""
    checked = check_solver(function, solver)
    if not checked.is_adaptive:
        raise ValueError(
            f"{function}: solver must be adaptive, got method {checked.method!r}, whose equal steps in sigma are far "
            f"too long at small sigma; edm_heun samples by the steps of a schedule"
        )
    return checked


def integrate(
    function: str,
    velocity: Callable[..., Any],
    state: Any,
    times: Sequence[float],
    solver: ODESolver,
    variable: str = "sigma",
) -> list[Any]:
    """Return the solutions of d state/dt = velocity(t, state) at all times; state is a tensor or a tuple of tensors.

    Each section between two times is an integration by itself, so that none of the solutions is interpolated. Of the
    steps of a fixed method, each section gets its share by length, rounded up. The velocity is evaluated at times of
    the section only.

    Args:
        function: name of the caller, for messages.
        velocity: see above; t of shape `[]`.
        state: the state at times[0].
        times: at least two, increasing or decreasing.
        solver: method and tolerances, or number of steps from the first to the last time.
        variable: name of t in messages.

    Raises:
        ImportError: torchdiffeq is not installed.
        RuntimeError: the tolerance cannot be met.
    """
    check_solver(function, solver)
    first = state if isinstance(state, Tensor) else state[0]
    if not torch.compiler.is_compiling() and not has_values(first):
        hint = "; edm_heun takes fixed steps" if variable == "sigma" else ""
        raise RuntimeError(
            f"{function}: x must have values, by which the solver {'chooses' if solver.is_adaptive else 'counts'} its "
            f"steps; a tensor on meta, a fake tensor and one in a graph that is traced have none{hint}"
        )
    states = [state]
    for section in pairwise(times):
        share = (section[1] - section[0]) / (times[-1] - times[0])
        states.append(_integrate_section(function, velocity, states[-1], section, solver, share, variable))
    return states


def _integrate_section(
    function: str,
    velocity: Callable[..., Any],
    state: Any,
    section: tuple[float, float],
    solver: ODESolver,
    share: float,
    variable: str,
) -> Any:
    """Return the solution at the end of a section, which is that share of all times."""
    try:
        # Its tableaus are tensors that are made at the import, for good.
        with torch.device("cpu"):
            from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(f"fluxmatching.{function} needs torchdiffeq: pip install torchdiffeq") from error
    start, end, rtol, atol = *section, float(solver.rtol), float(solver.atol)
    first = state if isinstance(state, Tensor) else state[0]
    ends = torch.tensor(section, dtype=torch.float64, device=first.device)
    # Without step_t the last step of torchdiffeq passes the end, to negative σ, and the interpolated result can be
    # wrong.
    options: dict[str, Any] = {"step_t": ends[1:]}
    if solver.num_steps is not None:
        count = max(1, math.ceil(share * solver.num_steps - 1e-6))  # a share of 3 steps may be rounded to above 3
        grid = torch.linspace(start, end, count + 1, dtype=ends.dtype, device=ends.device)
        options = {"grid_constructor": lambda function, state, t: grid}
    reached = [ends[0]]

    def traced(t: Tensor, state: Any) -> Any:
        # The trial step for the size of the first step may be far longer than the section, or NaN if the field is, and
        # a fixed step can pass the end by a rounding.
        reached[0] = t.nan_to_num(nan=start).clamp(min(section), max(section))
        return velocity(reached[0], state)

    method = FIXED.get(solver.method, solver.method)
    try:
        path = odeint(traced, state, ends, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:  # of torchdiffeq, when its step underflows
        raise RuntimeError(
            f"{function}: no step meets rtol {rtol:g} and atol {atol:g} at {variable} {reached[0].item():.4g}; is the "
            f"field finite there?"
        ) from error
    return path[-1] if isinstance(state, Tensor) else tuple(part[-1] for part in path)
