"""Sec. B.1: the templates, both families, the metrics against closed forms, and the losses."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.common.rotation import quarter_turn
from experiments.common.run import Run
from experiments.controllable import experiment as controllable
from experiments.controllable.bins import bin_means
from experiments.controllable.fields import FAMILIES, Controls, Family, SkewTemplate, TriangleTemplate
from experiments.controllable.metrics import (
    Grid,
    GridMetrics,
    autocorrelation_times,
    flux_losses,
    inverse_generator_form,
    observables,
)
from experiments.controllable.results import violation_results

ROT = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
TRI = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
SKEW = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
SWEEP = [torch.tensor(t, dtype=torch.float64) for t in itertools.product((-2.5, 0.0, 2.5), repeat=3)]


def make_controls(means: Tensor, variance: float = 0.625) -> Controls:
    mixture = GaussianMixture(means, variance)
    return Controls(mixture, TriangleTemplate(triangle_means(2.3)), SkewTemplate())


@pytest.fixture(scope="module")
def controls() -> Controls:
    made = make_controls(triangle_means(2.3))
    made.normalize(made.mixture.sample(1200, torch.Generator().manual_seed(0)))
    return made


@pytest.fixture(scope="module")
def gaussian() -> Controls:
    """One component at the origin, where the rotation control and its twin are linear."""
    made = make_controls(torch.zeros(1, 2, dtype=torch.float64))
    made.scales = torch.tensor([0.7, 1.0, 1.0], dtype=torch.float64)
    return made


@pytest.fixture(scope="module")
def metrics(controls: Controls) -> dict[Family, GridMetrics]:
    grid = Grid(controls.mixture, 25, 5.5)
    return {family: GridMetrics(controls, family, grid) for family in FAMILIES}


def scattered(n: int = 400) -> Tensor:
    return 2.5 * torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def published_triangle(x: Tensor) -> Tensor:
    """ψ_tri as in Eq. 20-23, with normals that point away from the centroid."""
    v, w, kappa, beta = triangle_means(2.3), 0.24, 5.0, 10.0
    ridges, levels = [], []
    for j in range(3):
        edge = v[(j + 1) % 3] - v[j]
        e = edge / edge.norm()
        n = (v[j] + v[(j + 1) % 3]) / (v[j] + v[(j + 1) % 3]).norm()
        a, d = (x - v[j]) @ e, (x - v[j]) @ n
        gates = torch.sigmoid(kappa * a / w) * torch.sigmoid(kappa * (edge.norm() - a) / w)
        ridges.append(torch.exp(-(d**2) / (2 * w**2)) * gates)
        levels.append(torch.exp(beta * d))
    h = sum(levels).log() / beta
    return torch.exp(-(h.relu() ** 2) / (2 * 0.9**2)) * (sum(ridges) / 3 + 0.12 * torch.sigmoid(-beta * h))


def published_skew(x: Tensor) -> Tensor:
    """ψ_skew as in Eq. 24-26."""
    alpha = math.radians(-20)
    d = torch.tensor([math.cos(alpha), math.sin(alpha)], dtype=torch.float64)
    d_perp = torch.tensor([-math.sin(alpha), math.cos(alpha)], dtype=torch.float64)
    r = x - 0.78 * 2.3 * d
    bump = torch.exp(-0.5 * ((r @ d) ** 2 / 0.6**2 + (r @ d_perp) ** 2 / 1.05**2))
    return bump * (1 + 0.45 * torch.sigmoid(1.75 * (x @ d) / 2.3))


@pytest.mark.parametrize("name", ["triangle", "skew"])
def test_templates_are_the_papers(controls: Controls, name: str) -> None:
    x = scattered()
    book = {"triangle": published_triangle, "skew": published_skew}[name]
    torch.testing.assert_close(getattr(controls, name).log_and_grad(x)[0].exp(), book(x), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["triangle", "skew"])
def test_template_gradients_equal_central_differences(controls: Controls, name: str) -> None:
    template, x, step = getattr(controls, name), scattered(), 1e-5
    shifts = step * torch.eye(2, dtype=torch.float64)
    numeric = torch.stack(
        [(template.log_and_grad(x + e)[0] - template.log_and_grad(x - e)[0]) / (2 * step) for e in shifts],
        dim=-1,
    )
    torch.testing.assert_close(template.log_and_grad(x)[1], numeric, rtol=1e-6, atol=1e-6)


def test_preserving_controls_are_the_rotated_gradients_of_their_stream_functions(controls: Controls) -> None:
    x = scattered(50).requires_grad_(True)
    streams = controls.stream(x)
    density = controls.mixture.log_density(x).exp().unsqueeze(-1)
    for k in range(3):
        (gradient,) = torch.autograd.grad(streams[:, k].sum(), x, retain_graph=True)
        expected = density * controls.basis(x, "preserving")[:, k]
        torch.testing.assert_close(quarter_turn(gradient), expected, rtol=1e-9, atol=1e-15)


def test_controls_have_the_papers_directions(controls: Controls) -> None:
    x = scattered(50).requires_grad_(True)
    (grad,) = torch.autograd.grad(published_triangle(x).sum(), x)
    score = controls.mixture.score(x)
    keep, violate = controls.basis(x, "preserving"), controls.basis(x, "violating")
    assert ((violate[:, 0] * score).sum(-1) > 0).all()
    assert ((keep[:, 0] * quarter_turn(score)).sum(-1) > 0).all()
    steep = grad.norm(dim=-1) > 1e-8
    assert ((violate[:, 1] * grad).sum(-1)[steep] > 0).all()
    assert ((keep[:, 1] * quarter_turn(grad)).sum(-1)[steep] < 0).all()
    torch.testing.assert_close(quarter_turn(torch.tensor([1.0, 2.0])), torch.tensor([-2.0, 1.0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_factors_give_unit_rms(controls: Controls, family: Family) -> None:
    samples = controls.mixture.sample(1200, torch.Generator().manual_seed(0))
    mean_square = controls.basis(samples, family).square().sum(-1).mean(0)
    torch.testing.assert_close(mean_square, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_stay_finite_where_density_and_templates_underflow(controls: Controls, family: Family) -> None:
    x = torch.tensor([[5.5, 5.5], [-5.5, 5.5], [60.0, 0.0]], dtype=torch.float64)
    assert controls.mixture.log_density(x[-1]).exp() == 0
    assert controls.basis(x[:2], family).isfinite().all()
    assert controls.basis(x, family)[:, :2].isfinite().all()


def test_preserving_residuals_vanish_and_violating_ones_do_not(metrics: dict[Family, GridMetrics]) -> None:
    keep, violate = metrics["preserving"], metrics["violating"]
    assert keep.residuals.abs().max() < 1e-9 * violate.residuals.abs().max()
    for theta in SWEEP:
        assert keep.violation(theta) < 1e-9
        assert violate.violation(theta) > 1 or not theta.any()


def test_gaussian_metrics_equal_their_closed_forms(gaussian: Controls) -> None:
    # u = θ k s with s = -x / ν², or J times it, k the scale factor.
    grid = Grid(gaussian.mixture, 61, 5.5)
    theta, amplitude = 1.5 * ROT, 1.5 * 0.7 / 0.625
    keep, violate = GridMetrics(gaussian, "preserving", grid), GridMetrics(gaussian, "violating", grid)
    assert keep.skewness(theta) == pytest.approx(2 * amplitude**2, rel=1e-9)
    assert violate.skewness(theta) == pytest.approx(0, abs=1e-12)
    assert violate.violation(theta) == pytest.approx(2 * amplitude, rel=1e-6)
    for family in (keep, violate):
        assert family.score_matching_loss(theta) == pytest.approx(amplitude**2 * 0.625, rel=1e-6)


def test_violation_by_central_differences_misses_half_of_the_triangle_control(
    controls: Controls, metrics: dict[Family, GridMetrics]
) -> None:
    """V of a unit of c_tri with scale factors of another 1200 samples is 4.13 and 1.96; the ratio has no scale."""
    violate = metrics["violating"]
    unit = 4.13 / violate.violation(TRI)
    assert unit == pytest.approx(1, abs=0.1)
    assert unit * violate.grid_violation(TRI) == pytest.approx(1.96, abs=0.02)
    for wide in (ROT, SKEW):
        assert violate.grid_violation(wide) == pytest.approx(violate.violation(wide), rel=0.02)
    assert metrics["preserving"].grid_violation(TRI) > 0.2 * violate.grid_violation(TRI)

    # Independent of the class: each control's values, NumPy's differences, and the sum over the grid.
    axis = np.linspace(-5.5, 5.5, 25)
    x = torch.from_numpy(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1))
    u, score = controls.basis(x, "violating")[:, :, 1].numpy(), controls.mixture.score(x).numpy()
    divergence = np.gradient(u[..., 0], axis, axis=0) + np.gradient(u[..., 1], axis, axis=1)
    density = controls.mixture.log_density(x).exp().numpy()
    residual = divergence + (u * score).sum(-1)
    assert violate.grid_violation(TRI) == pytest.approx(np.sqrt((density * residual**2).sum() / density.sum()))


def test_central_differences_converge_to_the_exact_divergence(controls: Controls) -> None:
    gaps = []
    for points in (101, 201):
        fine = GridMetrics(controls, "violating", Grid(controls.mixture, points, 5.5))
        gaps.append(1 - fine.grid_violation(TRI) / fine.violation(TRI))
    assert gaps[1] == pytest.approx(0.03, abs=0.01)
    assert gaps[1] < gaps[0] / 2.5  # second order, but for the kink at the triangle's edge


@pytest.mark.parametrize(("horizon", "share"), [(math.inf, 1.0), (0.2, 1 - math.exp(-2 * 0.2 / 0.625))])
def test_projected_fisher_divergence_of_a_gradient(gaussian: Controls, horizon: float, share: float) -> None:
    # Untruncated it is E|u|²; r is an eigenfunction with the rate 2 / ν².
    grid = Grid(gaussian.mixture, 81, 5.5)
    found = GridMetrics(gaussian, "violating", grid).projected_fisher(1.5 * ROT.unsqueeze(0), horizon)
    assert found[0] == pytest.approx(share * 2 * (1.5 * 0.7) ** 2 / 0.625, rel=0.01)


@pytest.mark.parametrize("omega", [0.0, 1.0, -2.0])
def test_autocorrelation_time_of_a_rotating_gaussian(omega: float) -> None:
    normal = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), 1.0)
    errors = []
    for points in (41, 81):
        grid = Grid(normal, points, 6.0)
        # p u = ω p Jx = J∇(-ω p)
        tau = autocorrelation_times(grid, grid.x, -omega * normal.log_density(grid.corners).exp())
        errors.append(np.abs(tau - 2 / (1 + omega**2)).max())
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 3  # second order


def test_no_stream_function_slows_mixing_on_the_grid(controls: Controls) -> None:
    # Rough on the scale of the grid, so nothing but the exact structure of the discretization can be at work.
    grid = Grid(controls.mixture, 15, 5.5)
    phi = observables(grid.x)
    still = inverse_generator_form(grid, phi)
    density = controls.mixture.log_density(grid.corners).exp()
    for seed in range(5):
        noise = torch.randn(density.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        stirred = inverse_generator_form(grid, phi, 3 * noise * density)
        assert (stirred < still * (1 - 1e-6)).all()
        mirrored = inverse_generator_form(grid, phi, -3 * noise * density)
        np.testing.assert_allclose(stirred, mirrored, rtol=1e-8)


def test_score_field_mixes_slowest(metrics: dict[Family, GridMetrics]) -> None:
    keep = metrics["preserving"]
    speeds = [keep.mixing(value * ROT) for value in (0.0, 1.0, 2.0, 4.0, 8.0)]
    assert all(fast > slow for slow, fast in itertools.pairwise(speeds))
    assert all(keep.mixing(theta) > speeds[0] for theta in SWEEP if theta.any())
    with pytest.raises(ValueError, match="preserving"):
        metrics["violating"].mixing(ROT)


def test_triangle_shape_is_a_cosine(metrics: dict[Family, GridMetrics]) -> None:
    keep = metrics["preserving"]
    assert keep.triangle(3 * TRI) == pytest.approx(1)
    assert keep.triangle(-TRI) == pytest.approx(-1)
    assert keep.triangle(0 * TRI) == 0
    assert abs(keep.triangle(ROT)) < 0.5


def test_score_matching_cannot_tell_the_families_apart(metrics: dict[Family, GridMetrics]) -> None:
    means = [np.mean([metrics[family].score_matching_loss(theta) for theta in SWEEP]) for family in FAMILIES]
    assert means[0] == pytest.approx(means[1])
    assert means[0] > 1


def test_observables_of_the_origin_are_zero() -> None:
    phi = observables(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    torch.testing.assert_close(phi, torch.tensor([[0.0] * 5, [3.0, 4.0, 5.0, 0.6, 0.8]]))


def test_bins_skip_the_empty_and_judge_a_rise_by_the_errors() -> None:
    x = np.array([0.0, 0.1, 0.9, 1.0, 0.5])
    y = np.array([1.0, 3.0, 5.0, 7.0, 1.5])
    binned = bin_means(x, y, np.full(5, 0.25), 10)
    np.testing.assert_allclose(binned.x, [0.0, 0.1, 0.5, 0.95])
    np.testing.assert_allclose(binned.mean, [1.0, 3.0, 1.5, 6.0])
    np.testing.assert_allclose(binned.error, [0.25, 0.25, 0.25, 1.0])
    assert not binned.rising
    assert bin_means(x, y, np.full(5, 1.5), 10).rising


def test_seeds_in_which_a_loss_rises_are_counted() -> None:
    def seed(*losses: float) -> list[dict[str, float]]:
        return [
            {"violation": v, "grid_violation": -v, "flux_loss": y, "flux_loss_error": 0.4, "exact_loss": y}
            for v, y in enumerate(losses)
        ]

    lines = violation_results([seed(0, 1, 2), seed(0, 1, 0.5), seed(0, 1, 0)], 3)
    assert [line.ours for line in lines if line.passed is not None] == [
        "in 2 of 3 seeds", "in 1 of 3 seeds", "in 0 of 3 seeds", "in 0 of 3 seeds",
    ]  # fmt: skip
    assert [line.passed for line in lines] == [True, False, None, False, False, None]
    assert lines[2].ours.startswith("50% ± 50%; ")  # falls of 0, a half and all


def test_best_field_breaks_ties_as_described() -> None:
    def row(control: str, theta: float, **metrics: float) -> dict[str, object]:
        coefficients = {"theta0": 0.0, "theta1": 0.0, "theta2": 0.0}
        coefficients[f"theta{('rot', 'tri', 'skew').index(control)}"] = theta
        return {"control": control, **coefficients, **metrics}

    rows = [
        row("rot", -8.0, mixing=0.4),
        row("rot", 8.0, mixing=0.4 * (1 - 1e-14)),
        row("rot", 4.0, mixing=0.399),
        row("tri", 1.0, triangle=1.0),
        row("tri", 8.0, triangle=1.0 - 1e-15),
        row("tri", -8.0, triangle=-1.0),
        row("skew", -8.0, skewness=100.0, triangle=-0.3),
        row("skew", 8.0, skewness=99.6, triangle=0.2),
        row("skew", 7.0, skewness=99.0, triangle=0.0),
    ]
    chosen = [controllable.best_field(rows, control) for control in ("rot", "tri", "skew")]
    assert [row["theta0"] + row["theta1"] + row["theta2"] for row in chosen] == [8.0, 8.0, 8.0]


@pytest.mark.parametrize("method", ["closed_form", "double_backward"])
def test_flux_loss_of_preserving_fields_is_zero_to_rounding(controls: Controls, method: str) -> None:
    means = {
        family: [
            float(flux_losses(controls, theta, family, 64, 8, torch.Generator().manual_seed(i), None, method).mean())
            for i, theta in enumerate(SWEEP[::3])
        ]
        for family in FAMILIES
    }
    assert np.mean(means["violating"]) > 1
    assert np.abs(means["preserving"]).max() < 1e-8 * np.mean(means["violating"])


def test_flux_loss_of_a_gaussian_equals_its_closed_form(gaussian: Controls) -> None:
    # u = U x with U = -θ k / ν² I, so E ℓ = 2 (1 - e⁻⁸) ‖U‖²_F for horizons up to 4.
    losses = flux_losses(gaussian, 1.5 * ROT, "violating", 64, 400, torch.Generator().manual_seed(8))
    error = losses.std() / 20
    expected = 4 * (1 - math.exp(-8)) * (1.5 * 0.7 / 0.625) ** 2
    assert error < 0.1 * expected
    assert abs(losses.mean() - expected) < 4 * error


def make_run(out: Path, **overrides: int) -> Run:
    experiment = controllable.EXPERIMENT
    config = dataclasses.replace(experiment.presets["smoke"], **overrides)
    return Run(
        experiment=experiment,
        preset="smoke",
        config=config,
        backend="torch",
        device=torch.device("cpu"),
        seed=0,
        out=out,
        progress=False,
    )


def test_smoke_run_writes_rows_figures_and_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    controllable.main(run)
    repeated, rows = ([row for row in run.rows("field") if (row["seed"] == 0) == first] for first in (False, True))
    assert [(row["seed"], row["family"]) for row in repeated] == [(1, "violating")] * 27
    assert len(rows) == 54
    assert len({(row["family"], row["theta0"], row["theta1"], row["theta2"]) for row in rows}) == 54
    assert len(run.rows("display_scan")) == 15
    for name in ("fields", "losses", "exact", "violation"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000
    assert (tmp_path / "summary.md").exists()
    assert run.results[0].passed


def test_interrupted_sweep_continues_with_the_same_numbers(tmp_path: Path) -> None:
    sizes = {"batch": 8, "minibatches": 2, "exact_points": 9, "grid_points": 9}

    def sweep(run: Run) -> list[dict[str, object]]:
        controls = controllable.make_controls(run)
        controllable.sweep(run, controls, controllable.make_metrics(run, controls, FAMILIES))
        controllable.repeat(run)
        return run.rows("field")

    whole = sweep(make_run(tmp_path, **sizes))
    metrics_file = tmp_path / "metrics.jsonl"
    lines = metrics_file.read_text().splitlines(keepends=True)
    for kept in (70, 30):
        metrics_file.write_text("".join(lines[:kept]))
        assert sweep(make_run(tmp_path, **sizes)) == whole


def test_config_names_the_field_it_refuses() -> None:
    with pytest.raises(ValueError, match="minibatches"):
        controllable.Config(minibatches=1)


def test_sampled_and_exact_losses_agree(controls: Controls) -> None:
    """Two roads to one number: Monte Carlo through the ops, and finite volumes on a grid."""
    theta = 2.5 * ROT
    (exact,) = controllable.exact_losses(controls, theta.unsqueeze(0), 81)
    sampled = flux_losses(controls, theta, "violating", 256, 256, torch.Generator().manual_seed(3), "torch")
    error = sampled.std().item() / 16
    assert abs(sampled.mean().item() - exact) < 4 * error
    assert error < 0.12 * exact


def test_exact_loss_of_a_gaussian(gaussian: Controls) -> None:
    """u = k s on N(0, ν²I): r = k(|x|²/ν⁴ - 2/ν²), a mode of rate 2/ν², so 2 J̃/ν² = 2·(4k²/ν⁴)/2·(1 - e⁻⁸)."""
    (exact,) = controllable.exact_losses(gaussian, ROT.unsqueeze(0), 161)
    assert exact == pytest.approx(4 * 0.7**2 / 0.625**2 * (1 - math.exp(-8)), rel=0.01)
