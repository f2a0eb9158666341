"""Random calls of the cpu backend's kernels against the formulas of the torch backend in float64.

Shapes, strides, dtypes, groups, instruction set and number of threads are drawn, and numbers from tiny to huge. A
result must be finite where that of the formulas is, and as close to it as rounding in float64 allows (`rounding.py`).
Entries whose logits have no correct digit are not compared.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxkernels import cpu, reference
from tests.support import rounding
from tests.support.ops import KERNELS, Inputs
from tests.support.rounding import Comparison

# Error of the kernels that compute in float32 in many dimensions, relative to the largest entry.
FLOAT32 = 4e-6
# Roundings that may add up, in units of the bounds, beside the square root of the number of reference points for a sum.
# The largest of 10⁵ calls were 15 of them, with 549 reference points.
SLACK = 16.0
DTYPES = {torch.float32: 0.4, torch.float64: 0.4, torch.bfloat16: 0.1, torch.float16: 0.1}
LARGEST_EXPONENT = {torch.float64: 100.0, torch.float32: 30.0, torch.bfloat16: 30.0, torch.float16: 3.0}


@contextmanager
def direct_differences() -> Iterator[None]:
    """Let the formulas take distances from differences in every dimension: a matrix product has half of the digits."""
    module = reference.kde.__globals__  # the function shadows its module's name
    before = module["DIRECT_DIMENSIONS"]
    module["DIRECT_DIMENSIONS"] = 1 << 30
    try:
        yield
    finally:
        module["DIRECT_DIMENSIONS"] = before


def strided(rng: np.random.Generator, t: Tensor) -> Tensor:
    """Lay out the numbers of `t` at random; sometimes take those of its first group for all groups."""
    kind = rng.integers(6)
    if kind == 0 and t.ndim == 3:
        return t[:1].expand(t.shape)
    if kind == 1:
        order = list(rng.permutation(t.ndim))
        return t.permute(order).contiguous().permute(list(np.argsort(order)))
    if kind == 2:
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]
    if kind == 3:
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
        wide[..., ::2] = t
        return wide[..., ::2]
    if kind == 4:
        return torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape)
    return t


@dataclass
class Draw:
    """Random sizes and scales of one problem, and what is drawn from them."""

    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.dtype = list(DTYPES)[self.rng.choice(len(DTYPES), p=list(DTYPES.values()))]
        self.wide_dtype = torch.promote_types(self.dtype, torch.float32)
        self.B, self.N, self.E, self.V = self.size(5), self.size(100), self.size(60), self.size(40)
        self.D = self.size(70) if self.chance(0.9) else int(self.rng.integers(20, 30))
        self.M = self.size(400) if self.chance(0.9) else self.size(1500)
        if self.chance(0.05):
            self.N, self.B = self.size(400), 1
        pairs = max(1, 400_000 // (self.B * self.M * self.D))  # what the formulas do in milliseconds
        self.N, self.E = min(self.N, pairs), min(self.E, pairs)
        largest = LARGEST_EXPONENT[self.dtype]
        self.spread = 10 ** (self.rng.uniform(-largest, largest) if self.chance(0.3) else self.rng.uniform(-2, 2))
        self.largest = float(torch.finfo(self.dtype).max) / 8
        self.refs = self.draw_refs()
        self.sigma = self.spread * 10 ** (self.rng.uniform(-4, 0) if self.chance(0.8) else self.rng.uniform(-30, 30))

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def size(self, most: int) -> int:
        return int(most ** self.rng.random())

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)

    def draw_refs(self) -> np.ndarray:
        """Reference points `[B, M, D]`: with duplicates, on a grid, sorted, with an outlier, all equal, or far away."""
        rng, chance, M, D = self.rng, self.chance, self.M, self.D
        scales = self.spread * 10 ** (rng.uniform(-3, 0, D) if chance(0.3) else np.zeros(D))
        refs: np.ndarray = scales * self.normal(self.B, M, D)
        if chance(0.3):
            refs = np.take(refs, rng.integers(0, M, M), axis=1)  # duplicates
        if chance(0.1):
            refs = scales * np.round(refs / scales)  # equal coordinates, equal distances
        if chance(0.1):
            refs.sort(axis=1)
        if chance(0.1):
            refs[:, rng.integers(M)] *= 10 ** rng.uniform(0, 3)
        if chance(0.05):
            refs[:] = refs[:, :1]
        if chance(0.3):
            refs += self.spread * 10 ** rng.uniform(0, 5) * self.normal(D)
        return refs.clip(-self.largest, self.largest)

    def variance(self, *shape: int) -> Tensor:
        with np.errstate(over="ignore"):
            factors = self.rng.uniform(-1, 1, shape) if self.chance(0.5) else np.zeros(shape)
            values = (self.sigma * 10**factors) ** 2
        limits = torch.finfo(self.wide_dtype)
        clamped = torch.from_numpy(np.asarray(values)).clamp(limits.tiny, limits.max).to(self.wide_dtype)
        return clamped[..., :1].expand(shape) if self.chance(0.3) else clamped

    def queries(self, count: int) -> np.ndarray:
        at = np.take(self.refs, self.rng.integers(0, self.M, count), axis=1)
        at = at + min(self.sigma, 1e3 * self.spread) * self.normal(self.B, count, self.D)
        if self.chance(0.2):
            at += self.spread * 10 ** self.rng.uniform(-1, 3) * self.normal(self.D)
        return at.clip(-self.largest, self.largest)

    def time(self) -> float:
        if self.chance(0.4):
            return float(self.rng.choice([0.0, 1e-9, 1e-3, 4.0, 60.0, 1e20]))
        return float(self.rng.uniform(0, 4))


def draw(rng: np.random.Generator) -> Inputs:
    """The inputs of every kernel in one dtype, with any strides."""
    problem = Draw(rng)
    B, N, D, E = problem.B, problem.N, problem.D, problem.E
    normal, tau = problem.normal, problem.time()
    force = 10 ** rng.uniform(-3, 3)
    num_steps = int(rng.integers(1, 4))
    arrays = {
        "x": problem.queries(N),
        "refs": problem.refs,
        "field": force * normal(B, N, D),
        "xt": problem.queries(E),
        "values": force * normal(B, E, problem.V),
        "pass_noise": normal(1 + num_steps, B, N, D),
        "g_log_density": normal(B, N) * problem.chance(0.7),
    }
    inputs: dict[str, Any] = {k: strided(rng, torch.from_numpy(v).to(problem.dtype)) for k, v in arrays.items()}
    inputs["per_query"] = strided(rng, problem.variance(B, N))
    inputs["per_group"] = strided(rng, problem.variance(B))
    inputs["seed"] = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 1))[0]
    return inputs | {
        "tau": torch.full((B,), tau, dtype=problem.wide_dtype),
        "num_steps": num_steps,
        "chain_noise": inputs["pass_noise"][1:],
        "g_shift": inputs["field"],
        "g_mean": inputs["pass_noise"][0],
        "shift": inputs["field"] * 1e-2,
    }


@dataclass
class Report:
    """Counts, worst error and failures of a run."""

    problems: int = 0
    calls: int = 0
    entries: int = 0
    compared: int = 0
    worst: float = 0.0  # error over the bound without its slack
    worst_of: str = ""
    failures: list[str] = field(default_factory=list)

    def compare(self, comparison: Comparison, slack: float, where: str) -> None:
        name, got, truth, bound, certain = comparison
        bound, certain = bound.expand(truth.shape), certain.expand(truth.shape)
        dtype, limits = got.dtype, torch.finfo(got.dtype)
        # Half a unit in the last place of the dtype, for numbers below its normal range half of its least number; half
        # precision is rounded by way of float32, as PyTorch does it.
        of_dtype = (
            0.5 * torch.clamp(limits.eps * truth.abs(), min=limits.tiny * limits.eps) if dtype != torch.float64 else 0
        )
        error = (got.double() - truth).abs() - of_dtype * (1 + 1e-4)
        sure = truth.isfinite() & bound.isfinite()
        inside = truth.to(dtype).isfinite() & ((truth.abs() + slack * bound) < limits.max)
        lost = sure & inside & ~got.isfinite()
        if lost.any():
            self.failures.append(f"{name}: {int(lost.sum())} entries not finite where the formula's are; {where}")
        compared = sure & inside & certain & got.isfinite()
        ratio = torch.where(compared & (error > 0), error / bound.clamp_min(1e-320), 0.0)
        self.entries += truth.numel()
        self.compared += int(compared.sum())
        if ratio.max().item() > self.worst:
            self.worst, self.worst_of = ratio.max().item(), f"{name}; {where}"
        if not ratio.max().item() <= slack:
            at = np.unravel_index(int(ratio.argmax()), ratio.shape)
            self.failures.append(
                f"{name}{list(map(int, at))}: {got[at].item():.17g} for {truth[at].item():.17g}, "
                f"{ratio.max().item():.1e} roundings; {where}"
            )


def bound_in_float32(comparison: Comparison, slack: float) -> Tensor:
    """The bound of a kernel that computes in float32: it is relative to the largest entry."""
    truth, bound = comparison.truth, comparison.bound
    largest = torch.where(truth.isfinite(), truth.abs(), 0.0).max()
    return bound + FLOAT32 * largest / slack


def check(problem: Inputs, report: Report, where: str) -> None:
    """Compare every kernel on one problem."""
    slack = SLACK + math.sqrt(problem["refs"].shape[1])
    exact = rounding.Exact(problem)
    in_float32 = problem["x"].dtype != torch.float64 and problem["x"].shape[-1] > rounding.FEW_DIMENSIONS
    for kernel in KERNELS:
        for variant, arguments in kernel.variants(problem).items():
            seeded = variant != kernel.name
            # A pass draws its noise as a chain does.
            if seeded and (kernel.name != "langevin_chain" or not noise_is_cheap(problem)):
                continue
            results = getattr(cpu, kernel.name)(*arguments)
            got = (results,) if isinstance(results, Tensor) else results
            bounds = getattr(rounding, kernel.name)
            for comparison in bounds(exact.with_noise_of_seed() if seeded else exact, got):
                name = f"{comparison.name} of a seed" if seeded else comparison.name
                if in_float32:
                    comparison = comparison._replace(bound=bound_in_float32(comparison, slack))
                report.compare(comparison._replace(name=name), slack, where)
            report.calls += 1


def noise_is_cheap(problem: Inputs) -> bool:
    """True if the formulas draw the noise of a seed fast enough."""
    return bool(problem["x"].numel() * problem["num_steps"] < 20_000)


def run(seed: int, cases: Iterator[int], *, seconds: float = math.inf) -> Report:
    """Run these cases; case k of a seed is always the same. Instruction set and thread count are restored."""
    report = Report()
    before, threads = cpu._kernels.target(), torch.get_num_threads()
    targets = cpu._kernels.targets()
    end = time.monotonic() + seconds
    try:
        with direct_differences():
            for k in cases:
                if time.monotonic() > end:
                    break
                rng = np.random.default_rng([seed, k])
                problem = draw(rng)
                cpu._kernels.use(targets[rng.integers(len(targets))])
                torch.set_num_threads(int(rng.choice([1, 1, 1, 2, 3])))
                (B, N, D), M = problem["x"].shape, problem["refs"].shape[1]
                where = (
                    f"case {k} of seed {seed}: B={B} N={N} M={M} D={D} {problem['x'].dtype} "
                    f"on {cpu._kernels.target()}, {torch.get_num_threads()} threads"
                )
                check(problem, report, where)
                report.problems += 1
    finally:
        cpu._kernels.use(before)
        torch.set_num_threads(threads)
    return report
