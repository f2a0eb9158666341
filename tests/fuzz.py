"""Random calls of the cpu backend's kernels against the formulas of the torch backend in float64.

    python -m tests.fuzz --seconds 60 --seed 0

Shapes, strides, dtypes, groups, instruction set and number of threads are drawn, and numbers from tiny to huge. A
result must be finite where the formulas' is, and as close to it as rounding in float64 allows. What rounding allows is
worked out for every entry from the numbers themselves: logits a/2σ² know their digits only as far as a/σ² is small
against 2⁵². Entries whose logits know none are not compared; the output says how many were.
"""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxkernels import cpu, reference

EPS = 2.0**-52
# Roundings that may add up, in units of the bounds below, beside the square root of the number of centres for a sum.
# The largest of 10⁵ calls were 15 of them, with 549 centres.
SLACK = 16.0
# Logits less certain than this say nothing that could be compared.
UNCERTAIN = 1e-3
DTYPES = {torch.float32: 0.4, torch.float64: 0.4, torch.bfloat16: 0.1, torch.float16: 0.1}
LARGEST_EXPONENT = {torch.float64: 100.0, torch.float32: 30.0, torch.bfloat16: 30.0, torch.float16: 3.0}


@contextmanager
def direct_differences() -> Iterator[None]:
    """Distances of the formulas from differences in every dimension: a matrix product has only half of the digits."""
    module = reference.kde.__globals__  # the function shadows its module's name
    before = module["DIRECT_DIMENSIONS"]
    module["DIRECT_DIMENSIONS"] = 1 << 30
    try:
        yield
    finally:
        module["DIRECT_DIMENSIONS"] = before


@dataclass
class Problem:
    """Flat arguments of every op, in the dtype drawn, with any strides."""

    z: Tensor  # [B, N, D]
    refs: Tensor  # [B, M, D]
    sigma2: Tensor  # [B, N]
    per_group: Tensor  # [B]
    tau: Tensor  # [B]
    field: Tensor  # [B, N, D]
    ends: Tensor  # [B, E, D]
    values: Tensor  # [B, E, V]
    noise: Tensor  # [1 + steps, B, N, D]
    g_log_density: Tensor  # [B, N]
    seed: Tensor
    steps: int

    def double(self) -> "Problem":
        tensors = {k: v.double() for k, v in vars(self).items() if isinstance(v, Tensor) and v.is_floating_point()}
        return replace(self, **tensors)


def strided(rng: np.random.Generator, t: Tensor) -> Tensor:
    """The numbers of `t` in a random layout; sometimes those of its first group for all groups."""
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


def draw(rng: np.random.Generator) -> Problem:
    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    def size(most: int) -> int:
        return int(most ** rng.random())

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    dtype = list(DTYPES)[rng.choice(len(DTYPES), p=list(DTYPES.values()))]
    wide_dtype = torch.promote_types(dtype, torch.float32)
    B, N, E, V = size(5), size(100), size(60), size(40)
    D = size(70) if chance(0.9) else int(rng.integers(20, 30))
    M = size(400) if chance(0.9) else size(1500)
    if chance(0.05):
        N, B = size(400), 1
    pairs = max(1, 400_000 // (B * M * D))  # what the formulas do in milliseconds
    N, E = min(N, pairs), min(E, pairs)
    largest = LARGEST_EXPONENT[dtype]
    spread = 10 ** rng.uniform(-largest, largest) if chance(0.3) else 10 ** rng.uniform(-2, 2)
    scales = spread * 10 ** (rng.uniform(-3, 0, D) if chance(0.3) else np.zeros(D))
    refs = scales * normal(B, M, D)
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
        refs += spread * 10 ** rng.uniform(0, 5) * normal(D)
    finfo = torch.finfo(dtype)
    refs = refs.clip(-float(finfo.max) / 8, float(finfo.max) / 8)
    sigma = spread * 10 ** (rng.uniform(-4, 0) if chance(0.8) else rng.uniform(-30, 30))

    def variance(*shape: int) -> Tensor:
        with np.errstate(over="ignore"):
            values = (sigma * 10 ** (rng.uniform(-1, 1, shape) if chance(0.5) else np.zeros(shape))) ** 2
        limits = torch.finfo(wide_dtype)
        values = torch.from_numpy(np.asarray(values)).clamp(limits.tiny, limits.max).to(wide_dtype)
        return values[..., :1].expand(shape) if chance(0.3) else values

    def queries(count: int) -> np.ndarray:
        at = np.take(refs, rng.integers(0, M, count), axis=1) + min(sigma, 1e3 * spread) * normal(B, count, D)
        if chance(0.2):
            at += spread * 10 ** rng.uniform(-1, 3) * normal(D)
        return at.clip(-float(finfo.max) / 8, float(finfo.max) / 8)

    tau = rng.choice([0.0, 1e-9, 1e-3, 4.0, 60.0, 1e20]) if chance(0.4) else rng.uniform(0, 4)
    force = 10 ** rng.uniform(-3, 3)
    steps = int(rng.integers(1, 4))
    arrays = {
        "z": queries(N),
        "refs": refs,
        "field": force * normal(B, N, D),
        "ends": queries(E),
        "values": force * normal(B, E, V),
        "noise": normal(1 + steps, B, N, D),
        "g_log_density": normal(B, N) * chance(0.7),
    }
    tensors = {k: strided(rng, torch.from_numpy(v).to(dtype)) for k, v in arrays.items()}
    return Problem(
        **tensors,
        sigma2=strided(rng, variance(B, N)),
        per_group=strided(rng, variance(B)),
        tau=torch.full((B,), tau, dtype=wide_dtype),
        seed=torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 1))[0],
        steps=steps,
    )


@dataclass
class Report:
    """What a run has seen."""

    problems: int = 0
    calls: int = 0
    entries: int = 0
    compared: int = 0
    worst: float = 0.0  # error over the bound without its slack
    worst_of: str = ""
    failures: list[str] = field(default_factory=list)

    def compare(
        self, op: str, got: Tensor, truth: Tensor, bound: Tensor, certain: Tensor, slack: float, where: str
    ) -> None:
        """`bound` is the error that one rounding may cause, broadcast against the result; compared where `certain`."""
        bound, certain = bound.expand(truth.shape), certain.expand(truth.shape)
        dtype, limits = got.dtype, torch.finfo(got.dtype)
        # Half a unit in the last place of the dtype, for numbers below its normal range half of its least number; half
        # precision is rounded by way of float32, as PyTorch does it.
        rounding = (
            0.5 * torch.clamp(limits.eps * truth.abs(), min=limits.tiny * limits.eps) if dtype != torch.float64 else 0
        )
        error = (got.double() - truth).abs() - rounding * (1 + 1e-4)
        sure = truth.isfinite() & bound.isfinite()
        inside = truth.to(dtype).isfinite() & ((truth.abs() + slack * bound) < limits.max)
        lost = sure & inside & ~got.isfinite()
        if lost.any():
            self.failures.append(f"{op}: {int(lost.sum())} entries not finite where the formula's are; {where}")
        compared = sure & inside & certain & got.isfinite()
        ratio = torch.where(compared & (error > 0), error / bound.clamp_min(1e-320), 0.0)
        self.entries += truth.numel()
        self.compared += int(compared.sum())
        if ratio.max().item() > self.worst:
            self.worst, self.worst_of = ratio.max().item(), f"{op}; {where}"
        if not ratio.max().item() <= slack:
            at = np.unravel_index(int(ratio.argmax()), ratio.shape)
            self.failures.append(
                f"{op}{list(map(int, at))}: {got[at].item():.17g} for {truth[at].item():.17g}, "
                f"{ratio.max().item():.1e} roundings; {where}"
            )


@dataclass
class Conditions:
    """Of queries `[B, N, D]` among centres `[B, M, D]`: how far one rounding carries."""

    w: Tensor  # [B, N, M]
    delta: Tensor  # [B, N], what rounding does to logits that matter
    near: Tensor  # [B, N], squared distance of the furthest centre that matters
    size: Tensor  # [B, 1], of the coordinates about the centres' mean
    sigma2: Tensor  # [B, N]
    covariance: Tensor  # [B, N], its trace

    @property
    def dropped(self) -> Tensor:
        """What may be left out of a weight: all of one that is below rounding."""
        return self.w.clamp_max(1e-18 / self.w.shape[-1])

    @property
    def certain(self) -> Tensor:
        return self.delta < UNCERTAIN

    @property
    def reach(self) -> Tensor:
        """Diameter of the centres that matter."""
        return 2 * self.near.sqrt()

    @property
    def of_mean(self) -> Tensor:
        return self.delta * self.reach + EPS * self.size


def conditions(z: Tensor, refs: Tensor, sigma2: Tensor) -> Conditions:
    difference = refs.unsqueeze(1) - z.unsqueeze(2)
    a = difference.square().sum(-1)
    w = (-(a - a.amin(-1, keepdim=True)) / (2 * sigma2.unsqueeze(-1))).softmax(-1)
    origin = refs.mean(1, keepdim=True)
    D, M = z.shape[-1], refs.shape[1]
    matters = w > 1e-20 / M
    near = torch.where(matters, a, 0.0).amax(-1)
    size = torch.cat([z - origin, refs - origin, EPS * M * refs], 1).abs().amax((1, 2)).unsqueeze(-1) * math.sqrt(D)
    delta = EPS * (math.sqrt(D) * near + near.sqrt() * size + sigma2) / sigma2
    mean = (w.unsqueeze(-1) * difference).sum(2, keepdim=True)
    covariance = (w * (difference - mean).square().sum(-1)).sum(-1)
    return Conditions(w, delta, near, size, sigma2, covariance)


def length(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=-1)


def check(problem: Problem, report: Report, where: str) -> None:
    """Every op on one problem."""
    p, q = problem, problem.double()
    B, N, D = p.z.shape
    slack = SLACK + math.sqrt(p.refs.shape[1])

    def compare(op: str, got: Tensor, truth: Tensor, bound: Tensor, certain: Tensor) -> None:
        report.compare(op, got, truth, bound, certain, slack, where)

    def compare_points(op: str, got: Tensor, truth: Tensor, bound: Tensor, certain: Tensor) -> None:
        compare(op, got, truth, bound.unsqueeze(-1), certain.unsqueeze(-1))

    c = conditions(q.z, q.refs, q.sigma2)
    shift, mean, log_density = cpu.kde(p.z, p.refs, p.sigma2)
    truth = reference.kde(q.z, q.refs, q.sigma2)
    far = EPS * q.refs.abs().amax((1, 2)).unsqueeze(-1)
    compare_points("shift", shift, truth[0], c.of_mean, c.certain)
    compare_points("mean", mean, truth[1], c.of_mean + far, c.certain)
    parts = c.near / c.sigma2 + D * (1 + q.sigma2.log().abs()) + 10
    compare("log density", log_density, truth[2], c.delta + EPS * parts, c.certain)

    g_shift, g_mean = p.field, p.noise[0]
    results = cpu.kde_backward(g_shift, g_mean, p.g_log_density, p.z, p.refs, p.sigma2)
    truth = reference.kde_backward(q.field, q.noise[0], q.g_log_density, q.z, q.refs, q.sigma2)
    v, g = length(q.field + q.noise[0]), q.g_log_density.abs()
    force = c.reach * v + g
    of_c = c.delta * force + EPS * c.size * v
    of_z = (of_c * c.near.sqrt() + EPS * c.size * (force + of_c)) / c.sigma2 + EPS * length(q.field)
    variance = c.sigma2.unsqueeze(-1)
    distance = (q.refs.unsqueeze(1) - q.z.unsqueeze(2)).square().sum(-1).sqrt()
    whole = v.unsqueeze(-1) + ((distance + c.reach.unsqueeze(-1)) * v.unsqueeze(-1) + g.unsqueeze(-1)) * (
        distance / variance
    )
    dropped = c.dropped * whole
    of_z = of_z + dropped.sum(-1)
    compare_points("g_z", results[0], truth[0], of_z, c.certain)
    of_refs = (c.w * (c.delta * v + EPS * v + of_z).unsqueeze(-1) + dropped).sum(1)
    compare_points("g_refs", results[1], truth[1], of_refs, c.certain.all(1, keepdim=True))
    of_square = EPS * (c.near + c.near.sqrt() * c.size)  # of a distance, from coordinates rounded about the origin
    bound = ((of_c * c.near + of_square * force) / c.sigma2 + EPS * g * (D + c.near / c.sigma2)) / c.sigma2
    bound = bound + (dropped * distance / variance).sum(-1)
    compare("g_sigma2", results[2], truth[2], bound, c.certain)

    f = length(q.field)
    force = c.reach * f + 2 * c.near / c.sigma2
    of_c = c.delta * force + EPS * c.size * f + c.delta
    bound = ((of_c * c.reach + EPS * c.size * (force + of_c) + 2 * c.of_mean) / c.sigma2 + EPS * f) / c.sigma2
    bound = bound + (
        c.dropped * (distance / variance) * (distance * f.unsqueeze(-1) + distance.square() / variance) / variance
    ).sum(-1)
    # Beyond, σ⁴ overflows or underflows in the formula.
    square_exists = (q.sigma2 > 1e-140) & (q.sigma2 < 1e140)
    got = cpu.residual_gradient(p.z, p.field, p.refs, p.sigma2)
    truth = reference.residual_gradient(q.z, q.field, q.refs, q.sigma2)
    compare_points("residual", got, truth, bound, c.certain & square_exists)

    noise = p.noise[1:]
    got = cpu.langevin_chain(p.z, p.refs, p.per_group, p.tau, p.steps, noise, None)
    truth, bound, certain = chain(q.z, q, q.noise[1:])
    compare_points("chain", got, truth, bound, certain)
    if rng_of_noise_is_cheap(p):
        got = cpu.langevin_chain(p.z, p.refs, p.per_group, p.tau, p.steps, None, p.seed)
        normals = reference.langevin.philox.normal(p.seed, (p.steps, B, N, D), 0, torch.float64)
        truth, bound, certain = chain(q.z, q, normals)
        compare_points("chain of a seed", got, truth, bound, certain)

    x0, shift0, xt, shift_t = cpu.flux_pass(p.z, p.refs, p.per_group, p.tau, p.steps, p.noise, None)
    start = q.z + q.per_group.view(-1, 1, 1).sqrt() * q.noise[0]
    compare("x0", x0, start, 4 * EPS * (start.abs() + far.unsqueeze(-1) + q.z.abs()), start.isfinite())
    if x0.isfinite().all() and xt.isfinite().all():  # they are what the rest starts from
        truth, bound, certain = chain(x0.double(), q, q.noise[1:])
        compare_points("xt", xt, truth, bound, certain)
        per_query = q.per_group.unsqueeze(-1).expand(B, N)
        for op, at, got in (("shift0", x0, shift0), ("shift_t", xt, shift_t)):
            c = conditions(at.double(), q.refs, per_query)
            compare_points(op, got, reference.kde(at.double(), q.refs, per_query)[0], c.of_mean, c.certain)

    starts = p.z, p.field * 1e-2
    tau, sigma2 = q.tau, q.per_group
    variance = sigma2 * (-torch.expm1(-2 * tau)).clamp_min(EPS**2)
    mu = q.z - torch.expm1(-tau).view(-1, 1, 1) * starts[1].double()
    E = p.ends.shape[1]
    c = conditions(q.ends, mu, variance.unsqueeze(-1).expand(B, E))
    size = torch.maximum(c.size, length(starts[1].double()).amax(1, keepdim=True))
    delta = EPS * (c.near + c.near.sqrt() * size + c.sigma2) / c.sigma2
    certain = delta < UNCERTAIN
    weights = cpu.transition_weights(*starts, p.ends, p.per_group, p.tau)
    reference_starts = q.z, starts[1].double()
    truth = reference.transition_weights(*reference_starts, q.ends, sigma2, tau)
    bound = (c.w * delta.unsqueeze(-1) + c.dropped).mT
    compare("weights", weights, truth, bound, certain.unsqueeze(1))
    average = cpu.transition_average(*starts, p.ends, p.values, p.per_group, p.tau)
    truth = reference.transition_average(*reference_starts, q.ends, q.values, sigma2, tau)
    compare("average", average, truth, bound @ q.values.abs(), certain.all(1).view(-1, 1, 1))
    report.calls += 8


def rng_of_noise_is_cheap(p: Problem) -> bool:
    return p.z.numel() * p.steps < 20_000


def chain(x: Tensor, q: Problem, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_τ, what one rounding a step does to it `[B, N]`, where that is certain) of the formulas in float64."""
    B, N, _ = x.shape
    h = (q.tau / q.steps).view(-1, 1, 1)
    variance = q.per_group.unsqueeze(-1).expand(B, N)
    error, certain = torch.zeros(B, N, dtype=torch.float64), torch.ones(B, N, dtype=torch.bool)
    pull = -torch.expm1(-h)
    far = EPS * q.refs.abs().amax((1, 2)).unsqueeze(-1)
    for k in range(q.steps):
        c = conditions(x, q.refs, variance)
        certain = certain & c.certain & (error * c.reach < UNCERTAIN * variance)
        shift, _, _ = reference.kde(x, q.refs, variance)
        gain = (variance.unsqueeze(-1) * -torch.expm1(-2 * h)).sqrt()  # normal numbers have an absolute error
        x = x + pull * shift + gain * noise[k]
        # The mean moves by Cov/σ² times what x does.
        growth = 1 + pull[..., 0] * c.covariance / variance
        error = (
            growth * error
            + pull[..., 0] * c.of_mean
            + EPS * (length(x) + c.size + gain[..., 0] * (1 + length(noise[k])))
            + far
        )
    return x, error, certain


def run(seed: int, cases: Iterator[int], *, seconds: float = math.inf) -> Report:
    """Case k of a seed is always the same; the current instruction set and thread count are put back."""
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
                (B, N, D), M = problem.z.shape, problem.refs.shape[1]
                where = (
                    f"case {k} of seed {seed}: B={B} N={N} M={M} D={D} {problem.z.dtype} on {cpu._kernels.target()}, "
                    f"{torch.get_num_threads()} threads"
                )
                check(problem, report, where)
                report.problems += 1
    finally:
        cpu._kernels.use(before)
        torch.set_num_threads(threads)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone")
    options = parser.parse_args()
    cases: Any = [options.case] if options.case is not None else iter(range(1 << 62))
    report = run(options.seed, cases, seconds=options.seconds)
    print("\n".join(report.failures[:40]))
    print(
        f"{report.problems} problems, {report.calls} calls, {report.entries} entries, "
        f"{report.compared / max(1, report.entries):.0%} compared; worst error {report.worst:.2g} "
        f"roundings ({report.worst_of}); {len(report.failures)} failures"
    )
    raise SystemExit(bool(report.failures))


if __name__ == "__main__":
    main()
