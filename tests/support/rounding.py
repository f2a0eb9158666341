"""Rounding errors that arithmetic may cause in each result of each kernel: the bounds of the fuzz run.

A function per kernel of `tests/support/ops.py`, found by its name. It takes the inputs in float64 and the kernel's
results, and yields a `Comparison` per result. Bounds are worked out for every entry from the numbers themselves: logits
a/2σ² have correct digits only as far as a/σ² is small against 2⁵².
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxkernels import philox, reference
from tests.support.ops import value_of

# Spacing of numbers at 1, and the part of all weights together that may be left out, in float64 and in float32.
WIDE, NARROW = (2.0**-52, 1e-18), (2.0**-23, 2e-11)
FEW_DIMENSIONS = 24  # up to which kernels compute in float32 what is not in float64
# Logits less certain than this leave nothing to compare.
UNCERTAIN = 1e-3


class Comparison(NamedTuple):
    """A result beside its truth.

    Attributes:
        bound: the error that one rounding may cause, broadcast against the result.
        certain: where the result can be compared.
    """

    name: str
    got: Tensor
    truth: Tensor
    bound: Tensor
    certain: Tensor


def of_points(name: str, got: Tensor, truth: Tensor, bound: Tensor, certain: Tensor) -> Comparison:
    """A comparison of vectors `[B, N, D]` whose bounds are `[B, N]`."""
    return Comparison(name, got, truth, bound.unsqueeze(-1), certain.unsqueeze(-1))


@dataclass
class Conditions:
    """Effect of one rounding, for queries `[B, N, D]` among reference points `[B, M, D]`."""

    w: Tensor  # [B, N, M]
    delta: Tensor  # [B, N], what rounding does to logits that matter
    near: Tensor  # [B, N], squared distance of the furthest reference point that matters
    size: Tensor  # [B, 1], of the coordinates about the mean of the reference points
    sigma2: Tensor  # [B, N]
    covariance: Tensor  # [B, N], its trace
    arithmetic: tuple[float, float]

    @property
    def eps(self) -> float:
        return self.arithmetic[0]

    @property
    def dropped(self) -> Tensor:
        """Part of a weight that may be left out: all of one that is below rounding."""
        return self.w.clamp_max(self.arithmetic[1] / self.w.shape[-1])

    @property
    def certain(self) -> Tensor:
        return self.delta < UNCERTAIN

    @property
    def reach(self) -> Tensor:
        """Diameter of the reference points that matter."""
        return 2 * self.near.sqrt()

    @property
    def of_mean(self) -> Tensor:
        return self.delta * self.reach + self.eps * self.size


def conditions(
    z: Tensor, refs: Tensor, sigma2: Tensor, arithmetic: tuple[float, float], log_weights: Tensor | None = None
) -> Conditions:
    eps, least = arithmetic
    difference = refs.unsqueeze(1) - z.unsqueeze(2)
    a = difference.square().sum(-1)
    logits = -(a - a.amin(-1, keepdim=True)) / (2 * sigma2.unsqueeze(-1))
    if log_weights is not None:
        logits = logits + (log_weights - log_weights.amax(-1, keepdim=True)).unsqueeze(1)
    w = logits.softmax(-1)
    origin = refs.mean(1, keepdim=True)
    D, M = z.shape[-1], refs.shape[1]
    matters = w > 0.01 * least / M
    near = torch.where(matters, a, 0.0).amax(-1)
    size = torch.cat([z - origin, refs - origin, eps * M * refs], 1).abs().amax((1, 2)).unsqueeze(-1) * math.sqrt(D)
    delta = eps * (math.sqrt(D) * near + near.sqrt() * size + sigma2) / sigma2
    if log_weights is not None:
        # They are relative to the largest; a logit far below that loses digits of both of its terms.
        relative = log_weights.amax(-1, keepdim=True) - log_weights
        delta = delta + eps * torch.where(matters, relative.unsqueeze(1), 0.0).amax(-1)
    mean = (w.unsqueeze(-1) * difference).sum(2, keepdim=True)
    covariance = (w * (difference - mean).square().sum(-1)).sum(-1)
    return Conditions(w, delta, near, size, sigma2, covariance, arithmetic)


def length(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=-1)


class Exact:
    """The inputs of a problem in float64, and the arithmetic of the kernels on them."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        few = inputs["x"].shape[-1] <= FEW_DIMENSIONS
        self.arithmetic = NARROW if few and inputs["x"].dtype != torch.float64 else WIDE
        self.inputs = {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }

    def __getitem__(self, name: str) -> Any:
        return self.inputs[name]

    @cached_property
    def conditions(self) -> Conditions:
        return conditions(self["x"], self["refs"], self["per_query"], self.arithmetic)

    @cached_property
    def far(self) -> Tensor:
        """Rounding of the reference points' own coordinates, `[B, 1]`."""
        return self.eps * self["refs"].abs().amax((1, 2)).unsqueeze(-1)

    @cached_property
    def distance(self) -> Tensor:
        """Between queries and reference points, `[B, N, M]`."""
        return (self["refs"].unsqueeze(1) - self["x"].unsqueeze(2)).square().sum(-1).sqrt()

    @cached_property
    def transition(self) -> tuple[Tensor, Tensor]:
        """(bound of the weights `[B, N, E]`, where they are certain `[B, E]`)."""
        tau, sigma2 = self["tau"], self["per_group"]
        variance = sigma2 * (-torch.expm1(-2 * tau)).clamp_min(WIDE[0] ** 2)
        mu = self["x"] - torch.expm1(-tau).view(-1, 1, 1) * self["shift"]
        c = conditions(self["xt"], mu, variance.unsqueeze(-1).expand(self["xt"].shape[:2]), self.arithmetic)
        size = torch.maximum(c.size, length(self["shift"]).amax(1, keepdim=True))
        delta = self.eps * (c.near + c.near.sqrt() * size + c.sigma2) / c.sigma2
        return (c.w * delta.unsqueeze(-1) + c.dropped).mT, delta < UNCERTAIN

    @property
    def eps(self) -> float:
        return self.arithmetic[0]

    def with_noise_of_seed(self) -> "Exact":
        """These inputs with the noise of a chain that their seed makes."""
        shape = (self["num_steps"], *self["x"].shape)
        noise = philox.normal(self["seed"], shape, philox.CHAIN, torch.float64)
        result = Exact({**self.inputs, "chain_noise": noise})
        result.arithmetic = self.arithmetic
        return result


def kde(q: Exact, got: tuple[Tensor, ...]) -> Iterator[Comparison]:
    c, D = q.conditions, q["x"].shape[-1]
    truth = reference.kde(q["x"], q["refs"], q["per_query"])
    yield of_points("shift", got[0], truth[0], c.of_mean, c.certain)
    yield of_points("mean", got[1], truth[1], c.of_mean + q.far, c.certain)
    parts = c.near / c.sigma2 + D * (1 + q["per_query"].log().abs()) + 10
    yield Comparison("log_density", got[2], truth[2], c.delta + q.eps * parts, c.certain)


def kde_backward(q: Exact, got: tuple[Tensor, ...]) -> Iterator[Comparison]:
    c, D, distance = q.conditions, q["x"].shape[-1], q.distance
    cotangents = q["g_shift"], q["g_mean"], q["g_log_density"]
    truth = reference.kde_backward(*cotangents, q["x"], q["refs"], q["per_query"])
    v, g = length(q["g_shift"] + q["g_mean"]), q["g_log_density"].abs()
    force = c.reach * v + g
    of_c = c.delta * force + q.eps * c.size * v
    of_z = (of_c * c.near.sqrt() + q.eps * c.size * (force + of_c)) / c.sigma2 + q.eps * length(q["g_shift"])
    variance = c.sigma2.unsqueeze(-1)
    whole = v.unsqueeze(-1) + ((distance + c.reach.unsqueeze(-1)) * v.unsqueeze(-1) + g.unsqueeze(-1)) * (
        distance / variance
    )
    dropped = c.dropped * whole
    of_z = of_z + dropped.sum(-1)
    yield of_points("g_z", got[0], truth[0], of_z, c.certain)
    of_refs = (c.w * (c.delta * v + q.eps * v + of_z).unsqueeze(-1) + dropped).sum(1)
    yield of_points("g_refs", got[1], truth[1], of_refs, c.certain.all(1, keepdim=True))
    of_square = q.eps * (c.near + c.near.sqrt() * c.size)  # of a distance, from coordinates rounded about the origin
    bound = ((of_c * c.near + of_square * force) / c.sigma2 + q.eps * g * (D + c.near / c.sigma2)) / c.sigma2
    bound = bound + (dropped * distance / variance).sum(-1)
    yield Comparison("g_sigma2", got[2], truth[2], bound, c.certain)


def averaging(q: Exact) -> tuple[Conditions, Tensor]:
    """(conditions with the weights of reference points, largest value of each group `[B, 1]`)."""
    c = conditions(q["x"], q["refs"], q["per_query"], q.arithmetic, value_of(q.inputs, "log_weights"))
    return c, length(value_of(q.inputs, "ref_values")).amax(1, keepdim=True)


def kernel_average(q: Exact, got: tuple[Tensor, ...]) -> Iterator[Comparison]:
    c, largest = averaging(q)
    weights = value_of(q.inputs, "ref_values"), value_of(q.inputs, "log_weights"), False, "gaussian"
    _, average, log_sum = reference.kernel_average(q["x"], q["refs"], q["per_query"], *weights)
    bound = (c.delta + q.eps) * largest + c.dropped.sum(-1) * largest
    yield of_points("average", got[1], average, bound, c.certain)
    parts = c.near / c.sigma2 + log_sum.abs() + weights[1].abs().amax(-1, keepdim=True) + 10
    yield Comparison("log_sum", got[2], log_sum, c.delta + q.eps * parts, c.certain)


def kernel_average_backward(q: Exact, got: tuple[Tensor, ...]) -> Iterator[Comparison]:
    c, largest = averaging(q)
    weights = value_of(q.inputs, "ref_values"), value_of(q.inputs, "log_weights"), False, "gaussian"
    g_shift, g_average = value_of(q.inputs, "g_no_shift"), value_of(q.inputs, "g_average")
    truth = reference.kernel_average_backward(
        g_shift, g_average, q["g_log_density"], q["x"], q["refs"], q["per_query"], *weights
    )
    y, variance = length(g_average), c.sigma2.unsqueeze(-1)
    force = 2 * largest * y + q["g_log_density"].abs()
    of_c = c.delta * force + q.eps * largest * y
    along = force.unsqueeze(-1) * q.distance / variance
    of_z = (of_c * c.near.sqrt() + q.eps * c.size * (force + of_c)) / c.sigma2
    dropped = c.dropped * along
    yield of_points("g_z", got[0], truth[0], of_z + dropped.sum(-1), c.certain)
    sound = c.certain.all(1, keepdim=True)
    of_refs = (c.w * of_z.unsqueeze(-1) + dropped).sum(1)
    yield of_points("g_refs", got[1], truth[1], of_refs, sound)
    of_square = q.eps * (c.near + c.near.sqrt() * c.size)
    # In this order nothing leaves the range of numbers.
    of_variance = (of_c * (c.near / c.sigma2) + of_square / c.sigma2 * force) / c.sigma2
    of_variance = of_variance + (dropped * q.distance / variance).sum(-1)
    yield Comparison("g_sigma2", got[2], truth[2], of_variance, c.certain)
    of_values = ((c.w * (c.delta + q.eps).unsqueeze(-1) + c.dropped) * y.unsqueeze(-1)).sum(1)
    yield of_points("g_values", got[3], truth[3], of_values, sound)
    of_logs = (c.w * (of_c + q.eps * force).unsqueeze(-1) + c.dropped * force.unsqueeze(-1)).sum(1)
    yield Comparison("g_log_weights", got[4], truth[4], of_logs, sound)


def residual_gradient(q: Exact, got: tuple[Tensor, ...]) -> Iterator[Comparison]:
    c, f, distance = q.conditions, length(q["field"]), q.distance
    variance = c.sigma2.unsqueeze(-1)
    force = c.reach * f + 2 * c.near / c.sigma2
    of_c = c.delta * force + q.eps * c.size * f + c.delta
    bound = ((of_c * c.reach + q.eps * c.size * (force + of_c) + 2 * c.of_mean) / c.sigma2 + q.eps * f) / c.sigma2
    bound = bound + (
        c.dropped * (distance / variance) * (distance * f.unsqueeze(-1) + distance.square() / variance) / variance
    ).sum(-1)
    # Beyond, σ⁴ overflows or underflows in the formula.
    square_exists = (q["per_query"] > 1e-140) & (q["per_query"] < 1e140)
    truth = reference.residual_gradient(q["x"], q["field"], q["refs"], q["per_query"])
    yield of_points("residual", got[0], truth, bound, c.certain & square_exists)


def langevin_chain(q: Exact, got: tuple[Tensor, ...]) -> Iterator[Comparison]:
    truth, bound, certain = chain(q["x"], q, q["chain_noise"])
    yield of_points("chain", got[0], truth, bound, certain)


def chain(x: Tensor, q: Exact, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_τ, what one rounding per step does to it `[B, N]`, where that is certain) of the formulas in float64."""
    B, N, _ = x.shape
    h = (q["tau"] / q["num_steps"]).view(-1, 1, 1)
    variance = q["per_group"].unsqueeze(-1).expand(B, N)
    error, certain = torch.zeros(B, N, dtype=torch.float64), torch.ones(B, N, dtype=torch.bool)
    pull = -torch.expm1(-h)
    for k in range(q["num_steps"]):
        c = conditions(x, q["refs"], variance, q.arithmetic)
        certain = certain & c.certain & (error * c.reach < UNCERTAIN * variance)
        shift, _, _ = reference.kde(x, q["refs"], variance)
        gain = (variance.unsqueeze(-1) * -torch.expm1(-2 * h)).sqrt()  # normal numbers have an absolute error
        x = x + pull * shift + gain * noise[k]
        # The mean moves by Cov/σ² times what x does.
        growth = 1 + pull[..., 0] * c.covariance / variance
        error = (
            growth * error
            + pull[..., 0] * c.of_mean
            + q.eps * (length(x) + c.size + gain[..., 0] * (1 + length(noise[k])))
            + q.far
        )
    return x, error, certain


def flux_pass(q: Exact, got: tuple[Tensor, ...]) -> Iterator[Comparison]:
    x0, shift0, xt, shift_t = got
    start = q["x"] + q["per_group"].view(-1, 1, 1).sqrt() * q["pass_noise"][0]
    bound = 4 * q.eps * (start.abs() + q.far.unsqueeze(-1) + q["x"].abs())
    yield Comparison("x0", x0, start, bound, start.isfinite())
    if not (x0.isfinite().all() and xt.isfinite().all()):  # the rest starts from them
        return
    truth, bound, certain = chain(x0.double(), q, q["pass_noise"][1:])
    yield of_points("xt", xt, truth, bound, certain)
    per_query = q["per_group"].unsqueeze(-1).expand(x0.shape[:2])
    for name, at, shift in (("shift0", x0, shift0), ("shift_t", xt, shift_t)):
        c = conditions(at.double(), q["refs"], per_query, q.arithmetic)
        yield of_points(name, shift, reference.kde(at.double(), q["refs"], per_query)[0], c.of_mean, c.certain)


def transition_weights(q: Exact, got: tuple[Tensor, ...]) -> Iterator[Comparison]:
    bound, certain = q.transition
    truth = reference.transition_weights(q["x"], q["shift"], q["xt"], q["per_group"], q["tau"])
    yield Comparison("weights", got[0], truth, bound, certain.unsqueeze(1))


def transition_average(q: Exact, got: tuple[Tensor, ...]) -> Iterator[Comparison]:
    bound, certain = q.transition
    truth = reference.transition_average(q["x"], q["shift"], q["xt"], q["values"], q["per_group"], q["tau"])
    yield Comparison("average", got[0], truth, bound @ q["values"].abs(), certain.all(1).view(-1, 1, 1))
