"""Checks of the constrained domains: geometry, exact densities, the penalty, samplers, and a repeated run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import norm, truncnorm
from torch import Tensor

from experiments.common.distances import sliced_wasserstein2
from experiments.common.kernel_weights import mean_perplexity
from experiments.common.run import Run
from experiments.constrained import EXPERIMENT
from experiments.constrained.domains import BOX_SPREAD, PROBLEMS, Annulus, Box, Problem, Simplex, box_means
from experiments.constrained.exact import OUTWARD
from experiments.constrained.experiment import main
from experiments.constrained.measure import (
    PLAIN,
    PROJECTED,
    REFLECTED,
    boundary_flow,
    walk,
)
from experiments.constrained.smoothed_box import SmoothedBox
from experiments.constrained.training import (
    FLUX_PENALTY,
    SCORE,
    VARIANTS,
    boundary_penalty,
    make_field,
    make_loss,
    variants,
)

PLANE = [name for name, problem in PROBLEMS.items() if problem.domain.dim == 2]
DENSITY = SmoothedBox(0.1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


def around(problem: str, count: int = 400) -> Tensor:
    """Points in and around a domain: data with three times the noise."""
    x = PROBLEMS[problem].draw(count, generator())
    return x + 3 * PROBLEMS[problem].sigma * torch.randn(x.shape, generator=generator(1), dtype=torch.float64)


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("problem", PROBLEMS)
def test_data_lie_in_the_domain_and_some_noised_points_do_not(problem: str) -> None:
    domain, x = PROBLEMS[problem].domain, around(problem)
    assert domain.inside(PROBLEMS[problem].draw(400, generator())).all()
    assert 0.1 < domain.inside(x).double().mean() < 0.9 or domain.dim == 20


@pytest.mark.parametrize("problem", PROBLEMS)
def test_projected_and_reflected_points_are_inside_and_inner_points_stay(problem: str) -> None:
    domain, x = PROBLEMS[problem].domain, around(problem)
    inside = domain.inside(x)
    for moved in (domain.project(x), domain.reflect(x), domain.reflect(x.float()), domain.project(x.float())):
        assert domain.inside(moved).all()
        torch.testing.assert_close(moved[inside].double(), x[inside], atol=1e-6, rtol=0)


@pytest.mark.parametrize("problem", PLANE)
def test_projection_and_nearest_boundary_are_nearest_of_a_fine_outline(problem: str) -> None:
    domain, x = PROBLEMS[problem].domain, around(problem)
    outline, _ = domain.outline(24_000)
    distance = torch.cdist(x, outline).amin(1)
    inside = domain.inside(x)
    moved = domain.project(x)
    torch.testing.assert_close((moved - x).norm(dim=1)[~inside], distance[~inside], atol=2e-4, rtol=0)
    y, _ = domain.nearest_boundary(x[inside])
    torch.testing.assert_close((y - x[inside]).norm(dim=1), distance[inside], atol=2e-4, rtol=0)


def test_projection_onto_a_simplex_of_many_parts_is_that_of_a_solver() -> None:
    domain, x = Simplex(4), torch.randn(3, 4, generator=generator(), dtype=torch.float64)
    for point, found in zip(domain.parts(x), domain.parts(domain.project(x)), strict=True):
        solution = minimize(
            lambda b, p=point: ((b - p.numpy()) ** 2).sum(), np.full(5, 0.2), bounds=[(0, None)] * 5,
            constraints={"type": "eq", "fun": lambda b: b.sum() - 1}, tol=1e-12,
        )  # fmt: skip
        np.testing.assert_allclose(found.numpy(), solution.x, atol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_normals_are_unit_vectors_that_point_inward(problem: str) -> None:
    domain = PROBLEMS[problem].domain
    pairs = [domain.nearest_boundary(PROBLEMS[problem].draw(200, generator()))]
    if domain.dim == 2:
        pairs.append(domain.outline(120))
    for y, normal in pairs:
        torch.testing.assert_close(normal.norm(dim=1), torch.ones(len(y)).double())
        assert domain.inside(y + 1e-5 * normal).double().mean() > 0.98  # but at corners
        assert not domain.inside(y - 1e-5 * normal).any()


@pytest.mark.parametrize("domain", [Box(2), Simplex(2), Annulus(0.4)])
def test_a_point_just_outside_is_mirrored(domain: Any) -> None:
    y, normal = domain.outline(60)
    torch.testing.assert_close(domain.reflect(y - 1e-3 * normal), y + 1e-3 * normal, atol=1e-9, rtol=0)


def test_means_of_the_data() -> None:
    """Truncated normal by SciPy, Dirichlet α/Σα, and E cos θ = 0.4 on the annulus."""
    count = 100_000
    box = PROBLEMS["box"].draw(count, generator())
    means = box_means(2).numpy()
    truth = truncnorm.mean((-1 - means) / BOX_SPREAD, (1 - means) / BOX_SPREAD, means, BOX_SPREAD).mean(0)
    np.testing.assert_allclose(box.mean(0), truth, atol=0.01)
    domain = PROBLEMS["simplex 20"].domain
    assert isinstance(domain, Simplex)
    alpha = torch.tensor([1.0, 2.0, 3.0] * 7, dtype=torch.float64)
    parts = domain.parts(PROBLEMS["simplex 20"].draw(count, generator()))
    exact = torch.distributions.Dirichlet(alpha)
    torch.testing.assert_close(parts.mean(0), exact.mean, atol=5e-4, rtol=0)
    torch.testing.assert_close(parts.var(0), exact.variance, atol=0, rtol=0.05)
    ring = PROBLEMS["annulus"].draw(count, generator())
    assert (ring[:, 0] / ring.norm(dim=1)).mean().item() == pytest.approx(0.4, abs=0.01)
    assert ring.square().sum(1).mean().item() == pytest.approx((1 + 0.4**2) / 2, abs=0.01)


# ---------------------------------------------------------------- the smoothed box


def test_density_of_the_box_is_the_convolution_by_quadrature() -> None:
    z = torch.tensor([[0.2, -0.9], [1.15, 0.3], [-1.4, 1.2]], dtype=torch.float64)
    for point, found in zip(z, DENSITY.log_density(z).exp(), strict=True):
        total = 0.0
        for mean in box_means(2):
            factors = []
            for value, center in zip(point.tolist(), mean.tolist(), strict=True):
                cut = truncnorm((-1 - center) / BOX_SPREAD, (1 - center) / BOX_SPREAD, center, BOX_SPREAD)
                near = np.clip([value - 0.8, value + 0.8], -1, 1)
                factors.append(quad(lambda t, c=cut, v=value: c.pdf(t) * norm.pdf(v, t, 0.1), *near, epsabs=1e-13)[0])
            total += math.prod(factors) / 3
        assert found.item() == pytest.approx(total, rel=1e-6)


def test_score_of_the_box_is_the_derivative_of_its_density() -> None:
    z = (4 * torch.rand(300, 2, generator=generator()).double() - 2).requires_grad_()
    (truth,) = torch.autograd.grad(DENSITY.log_density(z).sum(), z)
    torch.testing.assert_close(DENSITY.score(z), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["tangential", "outward"])
def test_exact_fields_leave_the_density_in_place(name: str) -> None:
    """∇·(p f) = Δp, by automatic differentiation; s alone and s with another turn as controls."""
    z = (2.6 * torch.rand(200, 2, generator=generator()).double() - 1.3).requires_grad_()

    def outflow(field: Tensor) -> Tensor:
        flow = DENSITY.log_density(z).exp().unsqueeze(-1) * field
        return sum(
            (torch.autograd.grad(flow[:, d].sum(), z, create_graph=True)[0][:, d] for d in range(2)),
            torch.zeros(len(z)).double(),
        )

    exact = outflow(DENSITY.score(z))
    torch.testing.assert_close(outflow(getattr(DENSITY, name)(z)), exact, rtol=1e-9, atol=1e-9)
    assert (outflow(getattr(DENSITY, name)(z) + z) - exact).abs().max() > 0.1


def test_mean_inward_component_is_that_of_the_score(tmp_path: Path) -> None:
    """The divergence theorem: circulation through the boundary changes its spread, and not its mean."""
    run = make_run(tmp_path)
    score, outward = (boundary_flow(run, "box", field) for field in (DENSITY.score, DENSITY.outward))
    assert outward["mean"] == pytest.approx(score["mean"], abs=0.005)
    assert score["mean"] == pytest.approx(score["score_mean"], abs=0.02)  # exact against the density estimate
    assert score["outward"] == 0
    assert outward["outward"] > 0.25
    assert outward["spread"] > 10 * score["spread"]
    weight = lambda z: DENSITY.score(z) - 2 * z  # noqa: E731 - a field that does not leave p in place
    assert boundary_flow(run, "box", weight)["mean"] > score["mean"] + 0.1


# ---------------------------------------------------------------- penalty and loss


def test_penalty_by_hand() -> None:
    f = torch.tensor([[3.0, 9.0], [-1.0, 9.0], [0.5, 0.0]])
    normal = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    # σ f·n = 0.6, -0.2, 0.1: short of 0.4 by 0, 0.6, 0.3.
    assert boundary_penalty(f, normal, 0.2, 0.4).item() == pytest.approx((0.36 + 0.09) / 3)
    assert boundary_penalty(f, normal, 0.2, 0.0).item() == pytest.approx(0.04 / 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_of_the_variants(tmp_path: Path, name: str) -> None:
    """In units of the squared error of σ f, plus the weighted penalty; equal initial networks."""
    run = make_run(tmp_path, weight=2.0)
    x = PROBLEMS["box"].draw(64, generator()).float()
    field = make_field(run, PROBLEMS["box"], VARIANTS[name], 0.5, seed=0)
    loss = make_loss(run, PROBLEMS["box"], VARIANTS[name], field, x)
    value, logged = loss(x[:32], seed=3)
    plain = loss.loss(x[:32], seed=3)[0] * (0.1**4 if VARIANTS[name].flux else 1)
    y, normal = PROBLEMS["box"].domain.nearest_boundary(x[:32])
    inward = 0.1 * (loss.field(y) * normal).sum(1)
    margin = {"": None, "gentle": run.config.gentle_margin, "inward": run.config.margin}[VARIANTS[name].penalty]
    penalty = 0.0 if margin is None else (margin - inward).relu().square().mean().item()
    assert value.item() == pytest.approx(plain.item() + 2 * penalty, rel=1e-4)
    assert logged["matching"].item() == pytest.approx(plain.item(), rel=1e-4)
    difference = field(y) - make_field(run, PROBLEMS["box"], VARIANTS[SCORE], 0.5, seed=0)(y)
    torch.testing.assert_close(difference, DENSITY.circulation(y) if VARIANTS[name].outward else torch.zeros_like(y))


def test_outward_starts_are_for_the_box_alone() -> None:
    assert set(variants("box")) == set(VARIANTS)
    assert set(variants("annulus")) == {name for name in VARIANTS if "outward" not in name}


# ---------------------------------------------------------------- samplers and distances


def test_share_of_invalid_points_of_a_linear_field(tmp_path: Path) -> None:
    """f = -x keeps N(0, 1/(1 - η/2)) at step size η: the share outside of the box is that of this distribution."""
    run = make_run(tmp_path, time=20.0)
    problem = Problem(Box(2), 1.0, lambda n, g: torch.zeros(n, 2))
    for step in (0.2, 1.0):
        x = torch.randn(4000, 2, generator=generator()) / math.sqrt(1 - step / 2)
        found, invalid = walk(run, problem, lambda z: -z, x, step, PLAIN)
        inside = norm.cdf(math.sqrt(1 - step / 2)) - norm.cdf(-math.sqrt(1 - step / 2))
        assert invalid == pytest.approx(1 - inside**2, abs=0.01)
        assert found.var().item() == pytest.approx(1 / (1 - step / 2), rel=0.05)


@pytest.mark.parametrize("sampler", [REFLECTED, PROJECTED])
def test_without_a_field_reflection_keeps_the_uniform_distribution_and_projection_does_not(
    tmp_path: Path, sampler: str
) -> None:
    run = make_run(tmp_path, time=20.0)
    problem = Problem(Box(2), 0.2, lambda n, g: torch.zeros(n, 2))
    x = 2 * torch.rand(2000, 2, generator=generator()) - 1
    found, invalid = walk(run, problem, torch.zeros_like, x, 0.5, sampler)
    assert invalid == 0
    on_faces = (found.abs() == 1).any(1).double().mean().item()
    if sampler == REFLECTED:
        assert on_faces == 0
        assert found.var(0).mean().item() == pytest.approx(1 / 3, rel=0.04)
    else:
        assert on_faces > 0.1


def test_sliced_distance_of_a_shift() -> None:
    x, shift = torch.randn(500, 3, generator=generator()), torch.tensor([0.3, -0.4, 1.2])
    assert sliced_wasserstein2(x, x + shift, torch.eye(3).double()) == pytest.approx(1.3, rel=1e-5)
    assert sliced_wasserstein2(x, x, torch.eye(3).double()) == 0


def test_perplexity() -> None:
    refs = torch.tensor([[0.0], [0.0], [100.0]])
    assert mean_perplexity(torch.zeros(1, 1), refs, 1.0) == pytest.approx(2)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"problems": ("ball",)}, "problems must be some of box, simplex, annulus, box 20, simplex 20, got 'ball'"),
        ({"problems": ()}, "step_sizes and problems must not be empty"),
        ({"ema": 1.0}, "ema must be below 1, got 1.0"),
        ({"refs": 100}, "data must be at least 100, got 64"),
        ({"weight": 0.0}, "weight must be above 0, got 0.0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(EXPERIMENT.config("smoke"), **changes)


def test_smoke_run_and_its_summary(finished: Run) -> None:
    assert {path.stem for path in finished.figures} == {"steps", "price", "fields", "exact"}
    assert len(finished.rows("sampled")) == 2 * (len(VARIANTS) + 2 + 4 + 2)
    assert all(row["invalid"] == 0 for row in finished.rows("sampled") if row["sampler"] != PLAIN)
    text = (finished.out / "summary.md").read_text()
    assert f"{OUTWARD} over exact score" in text
    assert f"simplex 20: flux → {FLUX_PENALTY}" in text


def test_a_run_that_lost_its_last_rows_ends_as_it_would_have(copied: Run) -> None:
    metrics, rows = copied.out / "metrics.jsonl", copied.rows()
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-4]))
    main(copied)
    assert copied.rows() == rows
