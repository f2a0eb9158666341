"""Measurements of a field: invalid points per step size, distances to the data, flow through the boundary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.common.distances import sliced_wasserstein2
from experiments.common.kernel_weights import mean_perplexity
from experiments.common.run import Run
from experiments.common.sampling import on_device
from experiments.constrained.domains import PROBLEMS, Problem
from experiments.constrained.training import SCORE, Field
from fluxkernels import kde_log_density, kde_score
from fluxmatching import unadjusted_langevin

PLAIN, REFLECTED, PROJECTED = "Langevin", "reflected", "projected"
SNAPSHOTS = 4  # states of the second half of a chain that are compared with the data
DIRECTIONS = 64  # of the sliced distance
ESTIMATE = 20_000  # data of the density estimate on the boundary


class Ruler:
    """Distance to fresh data of a problem, in units of σ.

    Args:
        run: random numbers and device.
        name: one of `PROBLEMS`.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.problem = PROBLEMS[name]
        self.data = self.fresh(run, name, "truth")
        generator = run.generator("directions", name)
        directions = torch.randn(DIRECTIONS, self.problem.domain.dim, generator=generator, dtype=torch.float64)
        self.directions = (directions / directions.norm(dim=-1, keepdim=True)).to(run.device)

    @staticmethod
    def fresh(run: Run, name: str, key: str) -> Tensor:
        """Draw as many points of the data as are compared."""
        count = SNAPSHOTS * run.config.samples
        return PROBLEMS[name].draw(count, run.generator(key, name)).to(run.device)

    def __call__(self, x: Tensor) -> float:
        """Return the distance of points, or nan if there are fewer than two."""
        if len(x) < 2:
            return math.nan
        return sliced_wasserstein2(x, self.data, self.directions) / self.problem.sigma

    def of_all_and_valid(self, x: Tensor) -> dict[str, float]:
        """Return the share of points outside, and the distances of all and of the valid points."""
        valid = self.problem.domain.inside(x)
        return {
            "invalid": 1 - valid.double().mean().item(),
            "all": self(x),
            "valid": self(x[valid]),
        }


def starts(run: Run, name: str, seed: int) -> Tensor:
    """Draw exact samples of p_σ, from which all chains start: fresh data with noise, `[samples, D]`, float32."""
    problem, generator = PROBLEMS[name], run.generator("start", name, seed)
    x = problem.draw(run.config.samples, generator)
    x = x + problem.sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.float().to(run.device)


def walk(run: Run, problem: Problem, field: Field, x: Tensor, step: float, sampler: str) -> tuple[Tensor, float]:
    """Run Langevin dynamics for the time of the config, and return snapshots and the share of invalid points.

    Args:
        run: settings and device.
        problem: domain and σ.
        field: f.
        x: starts, `[n, D]`.
        step: step size in units of σ².
        sampler: PLAIN, or how points that leave the domain return after every step.

    Returns:
        States at equal distances in the second half, `[SNAPSHOTS n, D]`, and the share of points outside over all
        states of that half.
    """
    domain = problem.domain
    back = {PLAIN: lambda z: z, REFLECTED: domain.reflect, PROJECTED: domain.project}[sampler]
    count = max(2 * SNAPSHOTS, round(run.config.time / step))
    keep = {count - k * (count // (2 * SNAPSHOTS)) for k in range(SNAPSHOTS)}
    generator = on_device(run.generator("walk", f"{step}"), run.device)
    snapshots, outside = [], []
    for k in range(1, count + 1):
        x = back(
            unadjusted_langevin(field, x, step_size=step * problem.sigma**2, num_steps=1, generator=generator)
        )  # fmt: skip
        if k > count // 2:
            outside.append((~domain.inside(x)).double().mean())
        if k in keep:
            snapshots.append(x)
    return torch.cat(snapshots), torch.stack(outside).mean().item()


def measure(run: Run, name: str, variant: str, seed: int, field: Field) -> None:
    """Log missing rows of a field: "sampled" by sampler and step size, "denoised", and "boundary" in the plane."""
    problem, ruler = PROBLEMS[name], Ruler(run, name)
    known = {"problem": name, "field": variant, "seed": seed}
    rows = [row for row in run.rows() if known.items() <= row.items()]
    done = {(row["kind"], row.get("sampler"), row.get("step")) for row in rows}
    samplers = (PLAIN, REFLECTED, PROJECTED) if variant == SCORE else (PLAIN,)
    for sampler in samplers:
        for step in run.config.step_sizes:
            if ("sampled", sampler, step) in done:
                continue
            x, invalid = walk(run, problem, field, starts(run, name, seed), step, sampler)
            found = ruler.of_all_and_valid(x) | {"invalid": invalid}
            if sampler == PLAIN and step == run.config.step_sizes[0]:
                found |= {f"denoised {k}": v for k, v in ruler.of_all_and_valid(denoise(field, x, problem)).items()}
            run.log(kind="sampled", **known, sampler=sampler, step=step, **found)
    if problem.domain.dim == 2 and ("boundary", None, None) not in done:
        run.log(kind="boundary", **known, **boundary_flow(run, name, field))


def denoise(field: Field, x: Tensor, problem: Problem) -> Tensor:
    """Return x + σ² f(x), for the score the mean of the data given x."""
    with torch.no_grad():
        return x + problem.sigma**2 * field(x)


def boundary_flow(run: Run, name: str, field: Field) -> dict[str, float]:
    """Average σ f·n over the boundary of the plane, weighted by p_σ; and the same of the score.

    A field that leaves p_σ in place has the average of the score, since the divergence theorem makes ∮ p_σ (f - s)·n
    vanish. Also logs the root mean square of the deviation from the average, and the share with f·n < 0.
    """
    problem = PROBLEMS[name]
    refs = problem.draw(ESTIMATE, run.generator("estimate", name)).float().to(run.device)
    y, normal = (part.float().to(run.device) for part in problem.domain.outline(480))
    variance = problem.sigma**2
    weight = kde_log_density(y, refs, variance, backend=run.backend).double().softmax(0)
    with torch.no_grad():
        inward = problem.sigma * (field(y) * normal).sum(-1).double()
    score = kde_score(y, refs, variance, backend=run.backend)
    exact = problem.sigma * (score * normal).sum(-1).double()
    mean, exact_mean = (weight * inward).sum(), (weight * exact).sum()
    return {
        "mean": mean.item(),
        "spread": (weight * (inward - mean).square()).sum().sqrt().item(),
        "outward": (weight * (inward < 0)).sum().item(),
        "score_mean": exact_mean.item(),
        "score_spread": (weight * (exact - exact_mean).square()).sum().sqrt().item(),
    }


def measure_exact(run: Run, name: str) -> None:
    """Log missing rows "exact": other fresh data, exact samples of p_σ, and the effective number of centers."""
    if any(row["problem"] == name for row in run.rows("exact")):
        return
    ruler, problem = Ruler(run, name), PROBLEMS[name]
    other = ruler.fresh(run, name, "floor")
    noise = torch.randn(other.shape, generator=run.generator("noise", name), dtype=torch.float64).to(other)
    noised = other + problem.sigma * noise
    centers = mean_perplexity(noised[: run.config.batch], ruler.data[: run.config.batch], problem.sigma)
    run.log(
        kind="exact", problem=name, floor=ruler(other), centers=centers, **ruler.of_all_and_valid(noised)
    )  # fmt: skip
