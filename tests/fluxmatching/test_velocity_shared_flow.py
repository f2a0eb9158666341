"""Shared flow against a plain computation of its formulas, on cells with known velocities, and in awkward data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from fluxmatching import FluxOptions, TruncatedExponentialHorizon, flux_matching_loss
from fluxmatching.velocity import (
    SharedFlowOptions,
    VelocityOptions,
    control_without_unspliced,
    fit_shared_flow,
    flux_velocity,
)
from fluxmatching.velocity.graph import averaging, neighbor_graph
from fluxmatching.velocity.state import tangent
from tests.support.velocity import annotated, cosine, mean_matrix, moments_of, nearest

anndata = pytest.importorskip("anndata", reason="anndata is not installed: pip install 'fluxkernels[rna]'")


class Oracle:
    """The method cell by cell and gene by gene, in float64, with dense matrices."""

    def __init__(self, u: np.ndarray, s: np.ndarray, graph: sparse.csr_array, smooth: bool) -> None:
        self.mean = mean_matrix(graph)
        smooth_u, self.smooth_s = self.mean @ u, self.mean @ s
        logs = np.log1p(s) - np.log1p(s).mean(0)
        self.directions = np.linalg.svd(logs, full_matrices=False)[2][:6]
        z = logs @ self.directions.T
        self.tangent = []
        for row in self.mean:
            center = row @ z
            covariance = sum(w * np.outer(x - center, x - center) for w, x in zip(row, z, strict=True))
            self.tangent.append(covariance @ np.linalg.inv(covariance + 0.1 * np.trace(covariance) * np.eye(6)))
        self.a, self.b = smooth_u / (1 + self.smooth_s), self.smooth_s / (1 + self.smooth_s)
        self.flow_a, self.flow_b = self.a, self.b
        if not smooth:
            self.flow_a, self.flow_b = u / (1 + self.smooth_s), s / (1 + self.smooth_s)
        self.start = np.array([self.extreme(*pair) for pair in zip(u.T, s.T, strict=True)])

    @staticmethod
    def extreme(u: np.ndarray, s: np.ndarray) -> float:
        size = u / u.max() + s / s.max()
        low, high = np.percentile(size, [5, 95])
        ends = (size <= low) | (size >= high)
        return float((u[ends] * s[ends]).sum() / (s[ends] ** 2).sum())

    def flow(self, kinetic: np.ndarray) -> np.ndarray:
        kinetic = kinetic / np.sqrt(np.median((kinetic**2).sum(1)))
        return self.mean @ np.array([t @ k for t, k in zip(self.tangent, kinetic, strict=True)])

    def regress(self, gene: int, flow: np.ndarray) -> tuple[float, float, float]:
        squared = (flow**2).sum(1)
        weight = 1 / (squared + 0.5 * np.median(squared))
        weight /= weight.sum()
        target, best = flow @ self.directions[:, gene], (-np.inf, 0.0, 0.0, 0.0)
        for logarithm in np.linspace(-1.2, 1.2, 97):
            ratio = self.start[gene] * np.exp(logarithm)
            term = self.a[:, gene] / ratio - self.b[:, gene]
            slope = (weight * term * target).sum() / (weight * term**2).sum()
            left = (weight * (target - slope * term) ** 2).sum() / (weight * target**2).sum()
            agreement = np.sign(slope) * (1 - left)
            fit = -20 / 2 * np.log(left) if slope > 0 else 20 / 2 * agreement
            best = max(best, (fit - logarithm**2 / (2 * 0.1**2), ratio, max(slope, 0.0), agreement))
        return best[1:]

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        genes = len(self.start)
        fold = np.random.default_rng(0).permutation(genes) % 5
        ratio, rate = self.start.copy(), np.ones(genes)

        def kinetic(leave_out: int) -> np.ndarray:
            own = fold != leave_out
            return (rate * (self.flow_a / ratio - self.flow_b))[:, own] @ self.directions[:, own].T

        for _ in range(3):
            flows = [self.flow(kinetic(k)) for k in range(5)]
            found = np.array([self.regress(gene, flows[fold[gene]]) for gene in range(genes)])
            good = found[:, 2] > 0.5
            ratio = np.where(good, found[:, 0], self.start)
            rate = np.where(good, found[:, 1] / found[good, 1].mean(), 1.0)
        flow = self.flow(kinetic(-1))
        final = np.array([self.regress(gene, flow)[0] for gene in range(genes)])
        return (flow @ self.directions) * (1 + self.smooth_s), final


@pytest.mark.parametrize("smooth", [True, False])
def test_it_is_the_formula(smooth: bool) -> None:
    made = annotated(cells=90, genes=25)
    mean = mean_matrix(made.obsp["connectivities"])
    u, s = (moments_of(made.layers[key], mean) for key in ("unspliced", "spliced"))
    options = SharedFlowOptions(dimensions=6, bootstraps=0, least_correlation=-1.0, smooth_kinetics=smooth)
    found = fit_shared_flow(u, s, made.obsp["connectivities"], made.layers["unspliced"], options)
    velocity, ratio = Oracle(u, s, made.obsp["connectivities"], smooth).run()
    np.testing.assert_allclose(found.velocity, velocity, rtol=1e-4, atol=1e-5 * np.abs(velocity).max())
    np.testing.assert_allclose(found.ratio, ratio, rtol=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_finds_the_true_velocities(seed: int) -> None:
    made = annotated(cells=400, genes=60, seed=seed)
    mean = mean_matrix(made.obsp["connectivities"])
    u, s = (mean @ made.layers[key] for key in ("unspliced", "spliced"))
    found = fit_shared_flow(u, s, made.obsp["connectivities"], made.layers["unspliced"])
    truth = made.layers["true_velocity"]
    assert np.median(cosine(found.velocity, truth)) > 0.9
    assert np.abs(np.log(found.ratio / made.var["true_ratio"])).median() < 0.1


def test_what_is_written_is_the_fit() -> None:
    made = annotated()
    before = set(made.layers)
    assert flux_velocity(made) is None
    assert set(made.layers) - before == {"velocity", "Mu", "Ms"}
    assert set(made.obsm) == {"X_flow", "velocity_flow"}
    columns = {f"velocity_{name}" for name in ("gamma", "beta", "rate", "agreement", "fitted", "genes")}
    assert set(made.var) - {"true_ratio"} == columns
    assert made.uns["velocity_params"]["method"] == "shared_flow"
    computed = made.layers["velocity"].copy()  # of moments in float64; those that were written are float32
    flux_velocity(made)
    np.testing.assert_allclose(computed, made.layers["velocity"], rtol=2e-3, atol=1e-3 * np.abs(computed).max())
    fit = fit_shared_flow(made.layers["Mu"], made.layers["Ms"], made.obsp["connectivities"], made.layers["unspliced"])
    np.testing.assert_array_equal(made.layers["velocity"], fit.velocity)
    np.testing.assert_allclose(made.obs["velocity_spread"], fit.spread, atol=1e-5)
    # Velocities are those of the state: d log(1 + s)/dt = P' F.
    smoothed = mean_matrix(made.obsp["connectivities"]) @ made.layers["Ms"]
    expected = made.obsm["velocity_flow"] @ made.varm["velocity_flow"].T * (1 + smoothed)
    np.testing.assert_allclose(made.layers["velocity"], expected, rtol=1e-4, atol=1e-4)


def test_methods_and_options_must_fit() -> None:
    made = annotated(cells=30)
    with pytest.raises(ValueError, match=r"method must be"):
        flux_velocity(made, "dynamical")
    with pytest.raises(ValueError, match=r'preset \'paper\' is one of method="per_gene"'):
        flux_velocity(made, preset="paper")
    with pytest.raises(TypeError, match=r'with method="shared_flow" options must be SharedFlowOptions'):
        flux_velocity(made, options=VelocityOptions())
    with pytest.raises(TypeError, match=r'with method="per_gene" options must be VelocityOptions'):
        flux_velocity(made, "per_gene", options=SharedFlowOptions())


@pytest.mark.parametrize("flow", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)])
def test_the_closed_form_is_the_flux_loss_of_a_local_gaussian(flow: tuple[float, ...]) -> None:
    """A constant field F beside the score costs F'(I - exp(-T/C))F: all of it across the cells, hardly any along them.

    Cells on a line, ten times as long as σ: C = diag(25.25, 0.25, 0.25) with σ = 0.5, and the horizon is T = 4 σ². The
    loss transports gradients as if C were σ² (its factor exp(-τ)), which changes only the small part along the line.
    """
    sigma, along = 0.5, 5.0
    variance = torch.tensor([along, 0.0, 0.0], dtype=torch.float64).square() + sigma**2
    constant = torch.tensor(flow, dtype=torch.float64)
    losses = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.zeros(1024, 3, dtype=torch.float64)
        x[:, 0] = along * torch.randn(1024, generator=generator, dtype=torch.float64)
        options = FluxOptions(horizon=TruncatedExponentialHorizon(1.0), divergence="exact", num_steps=16)
        found = flux_matching_loss(lambda z: constant - z / variance, x, sigma, options, seed=seed)
        losses.append(found.mean().item() * sigma**2 / 2)  # the loss is in units of 2/σ²
    closed = (constant.square() * (1 - torch.exp(-4 * sigma**2 / variance))).sum().item()
    error = np.std(losses, ddof=1) / np.sqrt(len(losses))
    assert error < 0.04
    assert np.mean(losses) == pytest.approx(closed, abs=0.03 + 3 * error)  # 0.03: along the line, see above


def test_the_tangent_keeps_what_lies_along_the_cells() -> None:
    """Cells on a line: T v is C (C + ε tr C)⁻¹ v with C = diag(c, 0, 0), that is v along it divided by 1 + ε."""
    position = np.zeros((50, 3))
    position[:, 0] = np.linspace(0, 1, 50)
    mean = averaging(neighbor_graph("f", nearest(position, 6), 50))
    found = tangent(position, mean, ridge=0.1)
    np.testing.assert_allclose(found, np.broadcast_to(np.diag([1 / 1.1, 0, 0]), (50, 3, 3)), atol=1e-6)


def test_cells_without_neighbors_take_no_part() -> None:
    """Most of the cells are isolated: rates and agreements are those of a fit to the others alone."""
    made = annotated(cells=120, genes=30)
    graph = made.obsp["connectivities"].tolil()
    graph[40:], graph[:, 40:] = 0, 0
    made.obsp["connectivities"] = graph.tocsr()
    flux_velocity(made)
    assert np.isfinite(made.var["velocity_rate"]).all()
    assert np.isfinite(made.var["velocity_agreement"]).all()
    assert (made.layers["velocity"][40:] == 0).all()
    assert (made.layers["velocity"][:40] != 0).any(1).all()


def test_results_of_an_earlier_fit_do_not_stay() -> None:
    made = annotated(cells=60, genes=30)
    for name in ("velocity_u", "velocity_alpha"):
        made.layers[name] = np.zeros(made.shape)
    flux_velocity(made)
    assert not {"velocity_u", "velocity_alpha"} & set(made.layers)
    assert "velocity_spread" in made.obs
    flux_velocity(made, options=SharedFlowOptions(bootstraps=0))
    assert "velocity_spread" not in made.obs
    control_without_unspliced(made, vkey="velocity")
    assert not {"velocity_gamma", "velocity_rate"} & set(made.var)
    assert "velocity_flow" not in made.obsm


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"vkey": "nascent", "options": SharedFlowOptions(counts="nascent")}, ValueError, "would overwrite the layer"),
        ({"ukey": "Muu"}, KeyError, "adata.layers has no 'Muu'"),
        ({"options": SharedFlowOptions(neighbors="pca")}, KeyError, "describes no graph"),
    ],
)
def test_names_that_do_not_fit(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    made = annotated(cells=60, genes=30)
    made.layers["nascent"] = made.layers["unspliced"].copy()
    made.uns["pca"] = {"params": {}}
    before = made.layers["nascent"].copy()
    with pytest.raises(error, match=text):
        flux_velocity(made, **arguments)
    np.testing.assert_array_equal(made.layers["nascent"], before)
