"""Controls by their formulas, and the test of evidence on cells that move and on cells that do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fluxmatching.velocity import (
    SharedFlowOptions,
    VelocityEvidence,
    control_with_permuted_unspliced,
    control_without_unspliced,
    evidence,
    fit_shared_flow,
    flux_velocity,
    moments,
    velocity_evidence,
)
from fluxmatching.velocity.control import permuted
from fluxmatching.velocity.evidence import partial_correlations
from fluxmatching.velocity.graph import averaging
from fluxmatching.velocity.layers import AveragedLayer, Layer, PermutedLayer, ScaledLayer
from fluxmatching.velocity.moments import read_sources
from fluxmatching.velocity.shared_flow import FlowFit, state_of, statistics_of
from tests.support.velocity import annotated, mean_matrix, moments_of, nearest

anndata = pytest.importorskip("anndata", reason="anndata is not installed: pip install 'fluxkernels[rna]'")


def steady(seed: int) -> Any:
    """Cells at rest: unspliced counts are proportional to the spliced abundance, with counting noise."""
    generator = np.random.default_rng(seed)
    state = generator.uniform(0, 2 * np.pi, (300, 1))
    abundance = 20 * (1.2 + np.cos(state - generator.uniform(0, 2 * np.pi, 50)))
    layers = {"spliced": abundance, "unspliced": abundance * generator.uniform(0.2, 1, 50)}
    made = anndata.AnnData(np.zeros((300, 50), np.float32))
    for key, mean in layers.items():
        made.layers[key] = generator.poisson(mean).astype(np.float32)
    made.obsp["connectivities"] = nearest(np.log1p(made.layers["spliced"]), 15)
    return made


def test_moving_cells_have_evidence() -> None:
    found = velocity_evidence(annotated(cells=300, genes=60), progress=False)
    assert found.applies
    assert found.p_value == pytest.approx(1 / 20)
    assert len(found.permuted) == 19
    assert found.statistic > 0.7
    assert max(found.permuted) < 0.3
    assert found.gain == pytest.approx(found.statistic - found.control)
    assert "velocity applies" in str(found)


@pytest.mark.parametrize("seed", [0, 1])
def test_cells_at_rest_have_none(seed: int) -> None:
    found = velocity_evidence(steady(seed), progress=False)
    assert not found.applies
    assert abs(found.statistic) < 0.1
    larger = sum(value >= found.statistic for value in found.permuted)
    assert found.p_value == pytest.approx((1 + larger) / 20)
    assert str(found).startswith(("No evidence", "Hardly any evidence"))


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "Unspliced counts of different genes agree on one flow: velocity applies."),
        ({"p_value": 0.1}, "No evidence for velocity: permuted unspliced counts do as well."),
        ({"gain": 0.03}, "No evidence for velocity: the control without unspliced counts does as well."),
        ({"statistic": 0.09}, "Hardly any evidence for velocity: the correlation is below 0.1."),
    ],
)
def test_it_is_put_in_words(changes: dict[str, Any], verdict: str) -> None:
    numbers = {
        "statistic": 0.4, "control": 0.1, "gain": 0.3, "gain_error": 0.02, "permuted": (-0.01, 0.02), "p_value": 0.05,
        "genes": 80,
    }  # fmt: skip
    found = VelocityEvidence(**numbers | changes)
    assert str(found).splitlines()[0] == verdict
    assert found.applies is (not changes)
    assert "-0.010 to 0.020 in 2 permutations" in str(found)


def test_partial_correlation_is_that_of_residuals() -> None:
    """With one fold left out by hand: the regression of both sides on the spliced abundance, by least squares."""
    made = annotated(cells=80, genes=24)
    options = SharedFlowOptions(dimensions=5, folds=2, rounds=1, least_correlation=-1.0)
    sources = read_sources("f", made, options, "Mu", "Ms")
    genes, state = statistics_of(sources), state_of(sources, options)
    fit = FlowFit(state, sources, genes, options)
    fit.run()
    found = partial_correlations(fit, fit)
    mean = mean_matrix(made.obsp["connectivities"])
    moments_u, moments_s = (moments_of(made.layers[key], mean) for key in ("unspliced", "spliced"))
    u, s = mean @ moments_u, mean @ moments_s
    a, b = u / (1 + s), s / (1 + s)
    for own, others in ((0, 1), (1, 0)):
        genes_of_others = fit.folds[others]
        kinetic = ((moments_u / genes.ratio - moments_s) / (1 + s))[:, genes_of_others]
        kinetic = kinetic @ state.directions[:, genes_of_others].T
        flow = state.flow(kinetic)
        for gene in fit.folds[own]:
            design = np.stack([np.ones(80), b[:, gene]], 1)
            pair = np.stack([a[:, gene], flow @ state.directions[:, gene]], 1)
            left = pair - design @ np.linalg.lstsq(design, pair, rcond=None)[0]
            assert found[gene] == pytest.approx(np.corrcoef(left.T)[0, 1], abs=1e-4)


def test_control_without_unspliced_is_its_formula() -> None:
    made = annotated(cells=100, genes=20)
    moments(made)
    other = made.copy()
    other.layers["unspliced"] = np.random.default_rng(0).permutation(other.layers["unspliced"])
    for adata in (made, other):
        control_without_unspliced(adata)
    options = SharedFlowOptions()
    sources = read_sources("f", made, options, "Mu", "Ms")
    genes, state = statistics_of(sources), state_of(sources, options)
    fitted = FlowFit(state, sources, genes, options).fitted
    s = made.layers["Ms"].astype(float)
    smoothed = mean_matrix(made.obsp["connectivities"]) @ s
    relaxing = ((s.mean(0) - s) / (1 + smoothed))[:, fitted] @ state.directions[:, fitted].T
    expected = (state.flow(relaxing) @ state.directions) * (1 + smoothed)
    np.testing.assert_allclose(made.layers["control"], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert made.uns["control_params"]["method"] == "without_unspliced"
    np.testing.assert_array_equal(other.layers["control"], made.layers["control"])  # of the same moments


def test_control_with_permuted_unspliced_is_the_fit_to_permuted_counts() -> None:
    made = annotated(cells=100, genes=20)
    flux_velocity(made)
    before = set(made.layers)
    control_with_permuted_unspliced(made, seed=4, vkey="shuffled")
    assert set(made.layers) == before | {"shuffled"}
    totals = made.layers["unspliced"].sum(1, dtype=float)
    sizes = np.median(totals) / totals
    scaled = PermutedLayer(ScaledLayer(Layer(made.layers["unspliced"]), sizes), 4).genes(np.arange(20))
    mean = mean_matrix(made.obsp["connectivities"])
    fit = fit_shared_flow(mean @ scaled, made.layers["Ms"], made.obsp["connectivities"], scaled)
    np.testing.assert_allclose(made.layers["shuffled"], fit.velocity, rtol=1e-3, atol=1e-3 * np.abs(fit.velocity).max())
    assert not np.allclose(made.layers["shuffled"], made.layers["velocity"], rtol=0.1)


def test_permuted_counts_do_not_follow_the_totals_of_the_cells() -> None:
    """Of cells of very different depth: permuted raw counts would all carry the factor of the cell they came to."""
    made = annotated(cells=300, genes=60)
    depth = np.random.default_rng(1).lognormal(0, 0.7, (300, 1))
    made.layers["unspliced"] = np.random.default_rng(2).poisson(made.layers["unspliced"] * depth).astype(np.float32)
    sources = read_sources("f", made, SharedFlowOptions(), "Mu", "Ms")
    received = averaging(sources.graph) @ sources.sizes
    totals = [permuted(sources, seed).unspliced.genes(np.arange(60)).sum(1) for seed in range(20)]
    assert abs(np.mean([np.corrcoef(total, received)[0, 1] for total in totals])) < 0.2
    raw = AveragedLayer(PermutedLayer(sources.counts, 0), sources.sizes, sources.mean).genes(np.arange(60)).sum(1)
    assert np.corrcoef(raw, received)[0, 1] > 0.8


def test_nan_among_permutations_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = iter([0.5, *[np.nan] * 20])
    monkeypatch.setattr(evidence, "partial_correlations", lambda *_: np.full(30, next(fits)) + np.arange(30) * 1e-3)
    with pytest.raises(ValueError, match="at least two genes must vary"):
        velocity_evidence(annotated(cells=60, genes=30), progress=False)
    fits = iter([0.5, 0.1, *[np.nan] * 19])
    assert velocity_evidence(annotated(cells=60, genes=30), progress=False).p_value == 1


def test_too_few_permutations() -> None:
    with pytest.raises(ValueError, match="permutations must be a whole number of at least 19, got 9"):
        velocity_evidence(annotated(cells=30, genes=20), permutations=9)
