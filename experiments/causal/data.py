"""Stationary diffusions with a sparse drift, and their samples under interventions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Drift = Callable[[Tensor], Tensor]
KINDS = ("linear", "tanh", "perceptron")
HIDDEN = 3  # units per variable of a drift of kind "perceptron"


@dataclass(frozen=True)
class System:
    """Diffusion dx = f(x) dt + σ dW with f_i(x) = c_i - a_i x_i + g_i(parents of i).

    Attributes:
        kind: g is a sum of w_ij x_j ("linear") or of w_ij tanh x_j ("tanh"), or a perceptron with one
            hidden layer over the parents ("perceptron").
        parents: entry [i, j] is True if x_j enters f_i, bool `[d, d]`, False on the diagonal.
        decay: a, `[d]`.
        offset: c, `[d]`.
        weights: w, `[d, d]`; for "perceptron" the weights of the second layer, `[d, HIDDEN]`.
        inner: weights `[d, HIDDEN, d]` and biases `[d, HIDDEN]` of the first layer of a "perceptron", else None.
        noise: σ.
    """

    kind: str
    parents: Tensor
    decay: Tensor
    offset: Tensor
    weights: Tensor
    inner: tuple[Tensor, Tensor] | None
    noise: float

    def single(self) -> System:
        """Return the system in float32, in which simulation takes a third of the time."""
        inner = None if self.inner is None else (self.inner[0].float(), self.inner[1].float())
        decay, offset, weights = self.decay.float(), self.offset.float(), self.weights.float()
        return dataclasses.replace(self, decay=decay, offset=offset, weights=weights, inner=inner)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the drift at x `[..., d]`."""
        own = self.offset - self.decay * x
        if self.inner is None:
            return own + (x if self.kind == "linear" else x.tanh()) @ self.weights.T
        first, second = self.inner
        hidden = torch.tanh((x @ first.flatten(0, 1).T).unflatten(-1, self.weights.shape) + second)
        return own + (hidden * self.weights).sum(-1)


@dataclass(frozen=True)
class Environment:
    """Samples under an intervention that adds a constant to one entry of the drift.

    Attributes:
        target: index of the shifted variable; None for observational data.
        shift: size of the shift.
        x: independent stationary samples, `[n, d]`.
    """

    target: int | None
    shift: float
    x: Tensor


def make_system(kind: str, d: int, num_parents: int, noise: float, generator: torch.Generator) -> System:
    """Draw a system whose variables have `num_parents` parents each, cycles included.

    Raises:
        ValueError: an unknown kind, or not 1 ≤ num_parents < d.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 1 <= num_parents < d:
        raise ValueError(f"num_parents must be at least 1 and below d = {d}, got {num_parents}")

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def signed(low: float, high: float, *shape: int) -> Tensor:
        return uniform(low, high, *shape) * (2.0 * (uniform(0, 1, *shape) < 0.5) - 1)

    order = torch.rand(d, d, generator=generator).fill_diagonal_(2).argsort(1).argsort(1)
    parents = order < num_parents
    decay, offset = uniform(0.8, 1.2, d), uniform(-0.5, 0.5, d)
    if kind == "perceptron":
        inner = signed(0.5, 1.5, d, HIDDEN, d) * parents[:, None], uniform(-0.5, 0.5, d, HIDDEN)
        return System(kind, parents, decay, offset, signed(0.4, 1.2, d, HIDDEN), inner, noise)
    weights = parents * (signed(0.3, 0.8, d, d) if kind == "linear" else signed(0.5, 1.2, d, d))
    if kind == "linear":
        # Every mode decays at least as fast as exp(-0.4 t).
        while torch.linalg.eigvals(weights - decay.diag()).real.max() > -0.4:
            weights = 0.9 * weights
    return System(kind, parents, decay, offset, weights, None, noise)


def simulate(
    drift: Drift, start: Tensor, shifts: Tensor, noise: float, time: float, step: float, generator: torch.Generator
) -> Tensor:
    """Run one independent chain per start by the stochastic Heun method, and return where the chains end.

    For additive noise the law of the chain has an error of order step² (Euler-Maruyama: step).

    Args:
        drift: f(x), x `[..., d]`.
        start: `[..., d]`; its dtype is that of the work. Further leading dimensions of the drift have the same noise.
        shifts: what is added to the drift; broadcasts against start.
        noise: σ.
        time: length of the chains; several relaxation times, so that ends are stationary.
        step: length of a step.
        generator: of the noise, on the CPU.
    """
    x, scale = start, noise * step**0.5
    for _ in range(round(time / step)):
        xi = scale * torch.randn(start.shape, generator=generator, dtype=x.dtype)
        first = drift(x) + shifts
        second = drift(x + step * first + xi) + shifts
        x = x + (0.5 * step) * (first + second) + xi
    return x


def shift_of(target: int | None, size: float, d: int) -> Tensor:
    """Return the vector that an intervention adds to the drift, `[d]`."""
    shift = torch.zeros(d, dtype=torch.float64)
    if target is not None:
        shift[target] = size
    return shift


def make_environments(
    system: System, targets: list[int | None], samples: int, time: float, step: float, generator: torch.Generator
) -> list[Environment]:
    """Draw an environment per target, its shift uniform in size between 1.5 and 2.5 and of random sign."""
    d = len(system.decay)
    sizes = [0.0 if target is None else _size(generator) for target in targets]
    shifts = torch.stack([shift_of(target, size, d) for target, size in zip(targets, sizes, strict=True)])
    start = torch.randn(len(targets), samples, d, generator=generator)
    x = simulate(system.single(), start, shifts[:, None].float(), system.noise, time, step, generator).double()
    return [Environment(*found) for found in zip(targets, sizes, x, strict=True)]


def _size(generator: torch.Generator) -> float:
    size, sign = torch.rand(2, generator=generator).tolist()
    return (1.5 + size) * (1 if sign < 0.5 else -1)
