"""Sampling by flows dx/dt = v(x, t) from noise (t = 0) to data (t = 1), their likelihoods, and rectified flows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor
from tqdm import tqdm

from fluxkernels.checks import (
    check_choice,
    check_finite,
    check_num_steps,
    check_positive,
    check_tensor,
    read_numbers,
    shape_of,
)
from fluxmatching.fields import NoisyField, call_field
from fluxmatching.flows.guidance import split_field
from fluxmatching.flows.paths import PREDICTIONS, Path, check_path
from fluxmatching.sampling.langevin import Callback, check_samples, noise_like
from fluxmatching.sampling.likelihood import integrate_density, prepare_divergence
from fluxmatching.sampling.ode import ODESolver, check_solver, integrate


@dataclass(frozen=True)
class SDEOptions:
    """Options of `stochastic_flow`. Construction checks them.

    Attributes:
        diffusion: g(t) ≥ 0: one number for all times, or a function of t as a float. Near a time where σ(t) = 0, a g
            that does not vanish there makes the steps unstable for some data; see `stochastic_flow`.
        num_steps: number of equal steps.
        prediction: what the field returns: "velocity", "score", "noise" or "denoiser"; see `Path.convert`.
    """

    diffusion: float | Callable[[float], float]
    num_steps: int
    prediction: str = "velocity"

    def __post_init__(self) -> None:
        if not callable(self.diffusion):
            _check_diffusion("SDEOptions", self.diffusion)
        check_num_steps("SDEOptions", self.num_steps)
        check_choice("SDEOptions", "prediction", self.prediction, PREDICTIONS)

    def diffusion_at(self, t: float) -> float:
        """Return g(t)."""
        if not callable(self.diffusion):
            return float(self.diffusion)
        return _check_diffusion("SDEOptions", self.diffusion(t), f" at t = {t:g}")


def integrate_flow(
    field: NoisyField,
    x: Tensor,
    *,
    start: float = 0.0,
    end: float = 1.0,
    solver: ODESolver = ODESolver("dopri5"),
    times: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Integrate dx/dt = v(x, t) from one time to another, forward or backward (Lipman et al. 2023, Eq. 1).

    A marginal velocity need not be finite at t = 1, nor a network trained there. Methods "euler" and "midpoint" do
    not evaluate it at `end`; for others an end slightly below 1 avoids that time.

    Args:
        field: v(x, t), x `[N, *event]`, t `[N]`, all equal.
        x: `[N, *event]`, at time `start`, or times[0] if times are given.
        start, end: times in [0, 1]; start > end integrates backward.
        solver: method and tolerances, or method and number of steps. The result of a method of fixed steps is not
            finite where the field is not.
        times: increasing or decreasing times in [0, 1], `[K]` with K ≥ 2, in place of start and end: the result is
            the trajectory. Each section between two of them is an integration by itself; see `ODESolver.num_steps` for
            the sum of all.
        chunk_size: number of samples per integration, which bounds the memory; None takes all at once. An adaptive
            method then has steps of its own in each chunk. A `GuidedField` keeps its label per sample.

    Returns:
        `[N, *event]`, at time `end`; with times `[K, N, *event]`, of which the first is x. Without gradients.

    Raises:
        ImportError: torchdiffeq is not installed.
        RuntimeError: the tolerance cannot be met, as with a field that is not finite.
        ValueError, TypeError: an argument of wrong shape, dtype or value; the message names it.
    """
    function = "integrate_flow"
    check_samples(function, x)
    if times is None:
        return _integrate(function, field, x, _check_ends(function, start, end), solver, chunk_size)[-1]
    if (start, end) != (0.0, 1.0):
        raise ValueError(f"{function}: give times or start and end, not both, got start {start} and end {end}")
    return torch.stack(_integrate(function, field, x, _read_times(function, times), solver, chunk_size))


def stochastic_flow(
    field: NoisyField,
    x: Tensor,
    path: Path,
    options: SDEOptions,
    *,
    start: float = 0.0,
    end: float = 1.0,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by the diffusion that has the marginals p_t of a flow, with equal steps of Euler and Maruyama.

    With the marginal velocity v and the score s of p_t, which follow from each other (`Path.convert`), the diffusion

        dx = [v(x, t) + ½ g(t)² s(x, t)] dt + g(t) dW

    has the marginals of dx/dt = v for every g ≥ 0 (Song et al. 2021, Sec. 4.3; Albergo et al. 2023, stochastic
    interpolants). A step of length h is x ← x + h v + ½ |h| g² s + g √|h| ξ, with v, s and g at its beginning: an
    integration that ends at t = 1 never needs the score there. A backward step (h < 0) is one of the diffusion that
    runs from data to noise with the same marginals.

    The step that ends at t = 1 adds no noise, as the last one of `reverse_ve`: no step would remove it from the data.
    Steps are stable while g² |h| < 4 V, with V = α² S + σ² and S the smallest variance of the data in any direction.
    For data near a surface, S ≈ 0, no number of steps suffices near t = 1 unless g vanishes there, as with g² = σ(t).

    Args:
        field: the prediction named by the options, of (x, t), x `[N, *event]`, t `[N]`, all equal.
        x: `[N, *event]`, at time `start`; for start = 0 σ(0) times standard normal noise, which is 1 on most paths.
        path: of which the field is a prediction, such as `LinearPath()`.
        options: diffusion, number of steps and prediction; see `SDEOptions`.
        start, end: times in [0, 1]; start > end runs backward.
        generator: makes the noise, on the device of x; None uses torch's own.
        callback: called as `callback(k, x)` after step k = 1 … num_steps.

    Returns:
        `[N, *event]`, at time `end`. Without gradients.

    Raises:
        ValueError: the prediction does not determine the velocity or the score at a time, such as the velocity from
            the score of a `LinearPath` at t = 0; or an argument of wrong shape or value.
        TypeError: an argument of wrong type or dtype.
    """
    function = "stochastic_flow"
    check_samples(function, x)
    check_path(function, path)
    if not isinstance(options, SDEOptions):
        raise TypeError(f"{function}: options must be an SDEOptions, got {options!r}")
    grid = torch.linspace(*_check_ends(function, start, end), options.num_steps + 1, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for k, (t, following) in enumerate(pairwise(grid.tolist()), start=1):
            step, g = following - t, options.diffusion_at(t)
            found = _at_time(field, x, torch.tensor(t, dtype=x.dtype, device=x.device))
            change = step * path.convert(found, x, t, source=options.prediction, target="velocity")
            if g > 0:
                score = path.convert(found, x, t, source=options.prediction, target="score")
                change = change + abs(step) * g**2 / 2 * score
            x = x + change
            if g > 0 and following < 1:
                x = x + g * math.sqrt(abs(step)) * noise_like(x, generator)
            if callback is not None:
                callback(k, x)
    return x


def flow_log_likelihood(
    field: NoisyField,
    x: Tensor,
    *,
    base_std: float = 1.0,
    end: float = 1.0,
    divergence: str = "hutchinson",
    generator: torch.Generator | None = None,
    solver: ODESolver = ODESolver("dopri5"),
) -> Tensor:
    """Compute log p(x) in nats, p the distribution to which `integrate_flow` carries N(0, base_std² I).

    The flow carries x back from t = 1 to t = 0, and (Chen et al. 2018, Theorem 1)

        log p(x) = log N(x(0); 0, base_std² I) - ∫_0^1 ∇·v(x(t), t) dt.

    Args:
        field: v(x, t), x `[N, *event]`, t `[N]`, all equal; differentiable in x.
        x: data, `[N, *event]`. Add uniform noise of the width of a level to digital data first; their density is
            unbounded otherwise.
        base_std: standard deviation at t = 0, such as sigma_max for a `VarianceExplodingPath`.
        end: time of the data in (0, 1], in place of 1; the field may not be finite there.
        divergence: "hutchinson" (one probe of random signs for the whole path: unbiased, one backward pass per
            evaluation) or "exact" (one backward pass per coordinate).
        generator: makes the probe, on the device of x; None uses torch's own.
        solver: method and tolerances, or method and number of steps.

    Returns:
        `[N]`, dtype of x.

    Raises:
        ImportError: torchdiffeq is not installed.
        RuntimeError: the field's derivatives cannot be taken, or the tolerance cannot be met.
        ValueError, TypeError: an argument of wrong shape, dtype or value; the message names it.
    """
    function = "flow_log_likelihood"
    check_samples(function, x)
    ends = _check_ends(function, 0.0, end)[::-1]
    base_std = check_positive(function, "base_std", base_std)
    inner, probe = prepare_divergence(function, field, x, divergence, generator)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        return _at_time(inner, z, t)

    return integrate_density(function, velocity, x, ends, solver, base_std=base_std, probe=probe, variable="t")


def rectified_pairs(
    field: NoisyField,
    x0: Tensor,
    *,
    solver: ODESolver = ODESolver("dopri5"),
    chunk_size: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute pairs (x0, x1) with x1 the sample to which a flow carries x0: "reflow" (Liu et al. 2023, Algorithm 1).

    A flow trained on such pairs has the same marginals at t = 0 and t = 1 and straighter trajectories, and hence
    needs fewer steps; `straightness` measures them.

    Args:
        field: v(x, t), x `[n, *event]`, t `[n]`, all equal, each sample by itself.
        x0: noise, `[N, *event]`.
        solver: see `integrate_flow`.
        chunk_size: number of samples per integration; see `integrate_flow`.
        progress: whether to show a progress bar over the chunks.

    Returns:
        (x0, x1), both `[N, *event]`, without gradients.

    Raises:
        As `integrate_flow`.
    """
    function = "rectified_pairs"
    check_samples(function, x0, "x0")
    return x0.detach(), _integrate(function, field, x0, (0.0, 1.0), solver, chunk_size, progress)[-1]


def straightness(trajectory: Tensor, times: Tensor) -> Tensor:
    """Measure how far trajectories are from straight lines at constant speed, 0 for those (Liu et al. 2023).

        S = E ∫_0^1 |(x(1) - x(0)) - dx/dt|² dt,

    with dx/dt constant between two times: a lower bound of S that converges as the squared distance of the times.

    Args:
        trajectory: x(t), `[K, N, *event]`, such as from `integrate_flow` with times.
        times: its times, `[K]` with K ≥ 2, increasing or decreasing in [0, 1]. Where they do not cover [0, 1], the
            integral is over the interval that they cover, and the difference is divided by its length.

    Returns:
        `[]`, the mean over the samples.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or value; the message names it.
    """
    function = "straightness"
    check_tensor(function, "trajectory", trajectory)
    points = _read_times(function, times)
    if trajectory.ndim < 3 or len(trajectory) != len(points):
        raise ValueError(
            f"{function}: trajectory must have shape [K, N, *event] with K = {len(points)} times, got "
            f"{shape_of(trajectory)}"
        )
    check_finite(function, trajectory=trajectory)
    states = trajectory.flatten(2)
    lengths = torch.tensor(points, dtype=torch.float64, device="cpu").diff().to(states).reshape(-1, 1, 1)
    mean_velocity = (states[-1] - states[0]) / (points[-1] - points[0])
    deviation = (states.diff(dim=0) / lengths - mean_velocity).square().sum(-1, keepdim=True)
    return (deviation * lengths.abs()).sum(0).mean()


def _at_time(field: NoisyField, x: Tensor, t: Tensor) -> Tensor:
    """Return v(x, t) at one time `[]`, for a field that takes one per sample, as in training."""
    return call_field(field, x, t.expand(len(x)))


def _integrate(
    function: str,
    field: NoisyField,
    x: Tensor,
    times: tuple[float, ...],
    solver: ODESolver,
    chunk_size: int | None,
    progress: bool = False,
) -> list[Tensor]:
    """Return the solutions of dx/dt = v(x, t) at all times, computed in chunks."""
    check_solver(function, solver)
    size = len(x) if chunk_size is None else check_num_steps(function, chunk_size, "chunk_size")
    chunks = list(zip(split_field(field, len(x), size), x.detach().split(size), strict=True))
    found = []
    with torch.no_grad():
        for part, start in tqdm(chunks, disable=not progress, unit="chunk", dynamic_ncols=True):
            velocity = partial(_velocity, part)
            found.append(integrate(function, velocity, start, times, solver, "t"))
    return found[0] if len(found) == 1 else [torch.cat(states) for states in zip(*found, strict=True)]


def _velocity(field: NoisyField, t: Tensor, x: Tensor) -> Tensor:
    """Return v(x, t) for a solver."""
    return _at_time(field, x, t.to(x.dtype))


def _check_ends(function: str, start: object, end: object) -> tuple[float, float]:
    """Return two different times in [0, 1]."""
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{function}: {name} must be a number in [0, 1], got {type(value).__name__}")
        if not 0 <= float(value) <= 1:
            raise ValueError(f"{function}: {name} must be a number in [0, 1], got {value}")
    assert isinstance(start, Real)
    assert isinstance(end, Real)
    if float(start) == float(end):
        raise ValueError(f"{function}: start and end must be different, got {start} for both")
    return float(start), float(end)


def _read_times(function: str, times: Tensor) -> tuple[float, ...]:
    """Return checked times of a trajectory as numbers."""
    check_tensor(function, "times", times)
    found = read_numbers(function, "times", times) if times.ndim == 1 else []
    increasing = all(before < after for before, after in pairwise(found))
    decreasing = all(before > after for before, after in pairwise(found))
    if len(found) < 2 or not all(0 <= t <= 1 for t in found) or not (increasing or decreasing):
        raise ValueError(
            f"{function}: times must be at least two increasing or decreasing numbers in [0, 1], got {times}"
        )
    return tuple(found)


def _check_diffusion(function: str, value: object, where: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{function}: diffusion must be a number or a function of t, got {type(value).__name__}{where}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{function}: diffusion must be a non-negative finite number, got {value}{where}")
    return float(value)
