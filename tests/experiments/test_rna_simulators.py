"""Tests of simulated cells against finite differences, another integrator, steady states and moments of counts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from experiments.rna_velocity.simulators import (
    COURSES,
    DURATION,
    KINDS,
    cell_cycle,
    count,
    draw_network,
    grow_tree,
    integrate,
    kinetics,
    simulate_network,
    simulate_switches,
    simulate_tree,
)


def difference(path, time: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central difference quotient of a path's u and s."""
    return (np.stack(path(time + step)) - np.stack(path(time - step))) / (2 * step)


def test_kinetics_solve_the_equations() -> None:
    generator = np.random.default_rng(0)
    alpha, beta, gamma, u0, s0 = np.exp(generator.normal(size=(5, 7)))
    time = np.linspace(0.1, 6, 50)[:, None]
    u, s = kinetics(time, alpha, beta, gamma, (u0, s0))
    du, ds = difference(lambda t: kinetics(t, alpha, beta, gamma, (u0, s0)), time)
    np.testing.assert_allclose(du, alpha - beta * u, atol=1e-8)
    np.testing.assert_allclose(ds, beta * u - gamma * s, atol=1e-8)
    at_start = kinetics(np.zeros((1, 1)), alpha, beta, gamma, (u0, s0))
    np.testing.assert_allclose(np.concatenate(at_start), [u0, s0], rtol=1e-12)
    at_rest = kinetics(np.full((1, 1), 1e4), alpha, beta, gamma, (u0, s0))
    np.testing.assert_allclose(np.concatenate(at_rest), [alpha / beta, alpha / gamma], rtol=1e-9)


@pytest.mark.parametrize("course", COURSES)
def test_velocity_of_switched_genes_is_the_slope_of_their_course(course: str) -> None:
    made = simulate_switches(0, course, 0.0, 4000, 20)
    np.testing.assert_array_equal(made.spliced, made.expected_spliced)
    slope = np.diff(made.expected_spliced, axis=0) / np.diff(made.time)[:, None]
    middle = (made.velocity[1:] + made.velocity[:-1]) / 2
    np.testing.assert_allclose(slope, middle, atol=0.02 * np.abs(middle).max())
    highest = made.time[made.expected_unspliced.argmax(0)] / DURATION  # u rises until the gene is switched off
    low, high = COURSES[course]
    assert np.all((highest > low - 0.01) & (highest < high + 0.01))


def test_noise_of_switched_genes_has_its_level() -> None:
    made = simulate_switches(0, "complete", 2.0, 20_000, 4)
    level = 0.2 * np.percentile(made.expected_spliced, 99, axis=0)
    well_above = made.expected_spliced > 4 * level  # where clipping at 0 does not matter
    for gene in range(4):
        error = (made.spliced - made.expected_spliced)[well_above[:, gene], gene]
        assert error.std() == pytest.approx(level[gene], rel=0.05)
    assert made.spliced.min() == 0


def test_a_trees_path_is_continuous_and_solves_the_equations() -> None:
    generator = np.random.default_rng(1)
    kind = np.repeat(KINDS, 5)
    tree = grow_tree(generator, kind, branch_points=3)
    assert len(tree.parent) == 7
    for branch, parent in enumerate(tree.parent):
        start = np.stack(tree.state(branch, np.zeros(1)))[:, 0]
        if parent >= 0:
            end = np.stack(tree.state(parent, tree.duration[parent : parent + 1]))[:, 0]
            np.testing.assert_allclose(start, end, rtol=1e-12)
            before = tree.alpha[parent]
        else:
            np.testing.assert_allclose(start, [tree.first_alpha / tree.beta[0], tree.first_alpha / tree.gamma[0]])
            before = tree.first_alpha
        time = np.linspace(0.01, tree.duration[branch] - 0.01, 40)
        time = time[np.abs(time[:, None] - tree.switch[branch]).min(1) > 1e-3]
        u, s = tree.state(branch, time)
        alpha = np.where(time[:, None] < tree.switch[branch], before, tree.alpha[branch])
        du, ds = difference(lambda t, branch=branch: tree.state(branch, t), time)
        np.testing.assert_allclose(du, alpha - tree.beta[branch] * u, atol=1e-6)
        np.testing.assert_allclose(ds, tree.beta[branch] * u - tree.gamma[branch] * s, atol=1e-6)


def test_cell_cycle_genes_solve_the_equations() -> None:
    generator = np.random.default_rng(2)
    level, beta, gamma = np.exp(generator.normal(size=(3, 6)))
    peak, period = generator.uniform(0, 6, 6), 8.0
    time = np.linspace(0, 20, 60)

    def path(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return cell_cycle(2 * np.pi * t / period, level, peak, beta, gamma, period)

    u, s = path(time)
    alpha = level * (1 + np.cos(2 * np.pi * time[:, None] / period - peak))
    du, ds = difference(path, time)
    np.testing.assert_allclose(du, alpha - beta * u, atol=1e-7)
    np.testing.assert_allclose(ds, beta * u - gamma * s, atol=1e-7)
    assert u.min() > 0
    assert s.min() > 0


@pytest.mark.parametrize("branch_points", [2, 3])
def test_a_trees_cells_have_their_truth(branch_points: int) -> None:
    made = simulate_tree(0, 600, 100, branch_points=branch_points)
    assert len(made.edges) == 2 * branch_points
    assert len({parent for parent, _ in made.edges}) == branch_points
    kinds, numbers = np.unique(made.kind, return_counts=True)
    assert dict(zip(kinds, numbers, strict=True)) == {"tree": 60, "branch rates": 10, "flat": 20, "cell cycle": 10}
    np.testing.assert_allclose(made.velocity[:, made.kind == "flat"], 0, atol=1e-12)
    np.testing.assert_array_equal(np.isnan(made.ratio), made.kind == "branch rates")
    # v = β (u - (γ/β) s) with one β per gene, for all cells.
    excess = made.expected_unspliced - made.ratio * made.expected_spliced
    moving = np.abs(excess) > 1e-3
    for gene in np.flatnonzero(moving.any(0) & np.isfinite(made.ratio)):
        beta = made.velocity[moving[:, gene], gene] / excess[moving[:, gene], gene]
        np.testing.assert_allclose(beta, beta[0], rtol=1e-6)
    cycle = made.velocity[:, made.kind == "cell cycle"]
    by_branch = np.stack([cycle[made.branch == name].mean(0) for name in np.unique(made.branch)])
    assert np.abs(by_branch).max() < 0.5 * np.abs(cycle).max()  # independent of the tree
    later = {child: parent for parent, child in made.edges}
    for child, parent in later.items():
        assert made.time[made.branch == child].min() >= made.time[made.branch == parent].max() - 1e-9


@pytest.mark.parametrize("dispersion", [0.0, 0.5])
def test_counts_have_their_mean_and_variance(dispersion: float) -> None:
    generator = np.random.default_rng(0)
    expected, depth = np.array([[3.0, 20.0]]).repeat(40_000, 0), np.full(40_000, 0.25)
    counts = count(generator, expected, depth, dispersion)
    mean = 0.25 * expected[0]
    np.testing.assert_array_equal(counts, np.round(counts))
    np.testing.assert_allclose(counts.mean(0), mean, rtol=0.03)
    np.testing.assert_allclose(counts.var(0), mean + dispersion * mean**2, rtol=0.06)


def test_depth_differs_between_cells() -> None:
    made = simulate_tree(0, 2000, 200)
    fraction = made.spliced.sum(1) / made.expected_spliced.sum(1)
    assert np.log(fraction).std() == pytest.approx(0.3, rel=0.1)
    assert np.median(fraction) == pytest.approx(0.15, rel=0.05)


def test_network_without_noise_is_another_integrators_path() -> None:
    network = draw_network(np.random.default_rng(3), 12)
    start = np.random.default_rng(4).uniform(0.1, 6, (2, 2, 12))
    found = integrate(network, start, np.array([3.0, 7.0]), 0.05, 0.0, np.random.default_rng(0))
    for cell, time in enumerate((3.0, 7.0)):
        solved = solve_ivp(
            lambda _, x: network.drift(x.reshape(2, 1, 12)).ravel(),
            (0, time),
            start[:, cell].ravel(),
            rtol=1e-10,
            atol=1e-12,
        )
        np.testing.assert_allclose(found[:, cell].ravel(), solved.y[:, -1], rtol=1e-5)


def test_networks_regulation_by_hand() -> None:
    network = draw_network(np.random.default_rng(0), 3)
    s = np.array([[0.0, 2.5, 0.0]])
    # Gene 1 is repressed by genes 0 and 2, both absent; gene 2 by gene 1 at its threshold: half.
    np.testing.assert_allclose(network.transcription(s), [[0.1, 4.1, 2.1]])


def test_network_settles_into_two_fates() -> None:
    made = simulate_network(0, 60, 8, noise=0.0, duration=160.0)
    late = made.time > 120
    np.testing.assert_allclose(made.velocity[late], 0, atol=1e-4)
    np.testing.assert_allclose(made.expected_unspliced[late], (made.ratio * made.expected_spliced)[late], atol=1e-3)
    fates = made.branch[late]
    assert set(fates) == {"fate 1", "fate 2"}
    winner = np.where(fates == "fate 1", *made.expected_spliced[late, 1:3].T)
    loser = np.where(fates == "fate 2", *made.expected_spliced[late, 1:3].T)
    assert np.all(winner > 6)
    assert np.all(loser < 1)


def test_a_seed_determines_all_numbers() -> None:
    for make in (
        lambda seed: simulate_switches(seed, "complete", 1.0, 30, 5),
        lambda seed: simulate_tree(seed, 30, 20, dispersion=0.1),
        lambda seed: simulate_network(seed, 20, 5, duration=2.0),
    ):
        one, same, other = make(0), make(0), make(1)
        np.testing.assert_array_equal(one.spliced, same.spliced)
        assert not np.array_equal(one.spliced, other.spliced)
