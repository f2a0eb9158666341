"""One flow for all genes: kinetics of every gene, restricted to the cells, and rates regressed on the flow again.

The method replaces a plane per gene by the whole state of a cell, z, in the leading directions of log(1 + s). There the
kinetics of the genes give a velocity

    k = Σ_g P_g g_g (u_g/r_g - s_g) / (1 + s_g),    r = γ/β, P_g the direction's loading on gene g, g_g its rate γ,

which counting noise and genes with other kinetics disturb. A field F that leaves the density of the cells in place has
no part across them: for a locally Gaussian density with covariance C, the flux loss of a constant field up to horizon T
is Fᵀ(I - exp(-T/C))F. With an exponential horizon of rate κ it is Fᵀ(I + κC)⁻¹F, and |F - k|² + λ Fᵀ(I + κC)⁻¹F has the
minimizer (I + κC)((1 + λ)I + κC)⁻¹ k. Here F = C (C + ε tr C I)⁻¹ k, its limit for κ and λ → ∞ with λ/κ = ε tr C; then
it is averaged over neighbors. After that r and g of each gene are regressed on F, without the genes of its own fold in
F, and F is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fluxmatching.velocity.genes import GeneStatistics, gene_statistics
from fluxmatching.velocity.graph import averaging, neighbor_graph
from fluxmatching.velocity.layers import Layer, gene_blocks, in_memory
from fluxmatching.velocity.moments import Sources, size_factors
from fluxmatching.velocity.options import SharedFlowOptions
from fluxmatching.velocity.state import CellState, cell_state

FEWEST_GENES = 20  # with fewer genes whose counts follow the cells' state, all take part
LOG_RATIOS = np.linspace(-1.2, 1.2, 97)  # of r to its start: the grid of the regression
CACHE_BYTES = 2**28  # of the kinetic terms; beyond that they are computed again in every round


@dataclass(frozen=True)
class SharedFlow:
    """Result of `fit_shared_flow`.

    Attributes:
        velocity: ds/dt, `[cells, genes]`, float32; NaN in genes whose spliced abundances are not finite.
        flow: F, the velocity of the state, `[cells, d]`.
        position: z, the state, `[cells, d]`.
        directions: P, `[d, genes]`.
        spread: circular variance of the direction of F over the bootstrap, `[cells]`, in [0, 1]; None without one.
        ratio: γ/β, `[genes]`; NaN in genes without usable counts.
        rate: γ in units of the flow's inverse time, `[genes]`; 0 in genes that do not follow the flow.
        agreement: R² of a gene's kinetics with its velocity, negative where they disagree, `[genes]`.
        fitted: whether the gene's kinetics made the flow, `[genes]`.
        velocity_genes: see `GeneStatistics`, `[genes]`.
    """

    velocity: np.ndarray
    flow: np.ndarray
    position: np.ndarray
    directions: np.ndarray
    spread: np.ndarray | None
    ratio: np.ndarray
    rate: np.ndarray
    agreement: np.ndarray
    fitted: np.ndarray
    velocity_genes: np.ndarray


def fit_shared_flow(
    unspliced: Any, spliced: Any, neighbors: Any, counts: Any, options: SharedFlowOptions | None = None
) -> SharedFlow:
    """Fit one flow to all genes; arrays in, arrays out.

    Args:
        unspliced, spliced: moments, `[cells, genes]`, at least 0, dense or sparse (Mu and Ms of scVelo).
        neighbors: graph of connectivities, `[cells, cells]`: see `neighbor_graph`.
        counts: unspliced counts, `[cells, genes]`, not averaged. Genes whose counts do not resemble those of neighbors
            take no part in the flow.
        options: settings.

    Raises:
        ValueError, TypeError: shapes that do not fit, negative values, too few cells, or none that differ.
    """
    function = "fit_shared_flow"
    options = SharedFlowOptions() if options is None else options
    layers = [
        Layer(in_memory(function, name, values))
        for name, values in (("unspliced", unspliced), ("spliced", spliced), ("counts", counts))
    ]
    for name, layer in zip(("unspliced", "counts"), (layers[0], layers[2]), strict=True):
        if layer.shape != layers[1].shape:
            raise ValueError(
                f"{function}: {name} must be of the shape of spliced, {layers[1].shape}, got {layer.shape}"
            )
    graph = neighbor_graph(function, neighbors, layers[1].shape[0])
    u, s, raw = layers
    sources = Sources(u, s, raw, size_factors(raw), graph, averaging(graph))
    return fit_sources(sources, options)


def fit_sources(sources: Sources, options: SharedFlowOptions) -> SharedFlow:
    """Fit as `fit_shared_flow` does, from layers that are read in blocks."""
    genes = statistics_of(sources)
    state = state_of(sources, options)
    fit = FlowFit(state, sources, genes, options)
    fit.run()
    flow = fit.flow()
    ratio, rate, agreement = fit.regress_all(flow)
    spread = fit.spread() if options.bootstraps else None
    cells, count = sources.spliced.shape
    for chosen in gene_blocks(cells, np.arange(count)):  # in place: the array of the smoothed s
        smoothed = state.smoothed[:, chosen]
        state.smoothed[:, chosen] = (flow @ state.directions[:, chosen]) * (1 + smoothed.astype(np.float64))
    state.smoothed[:, ~state.finite] = np.nan
    return SharedFlow(
        state.smoothed, flow, state.position, state.directions, spread, ratio, rate, agreement, fit.fitted,
        genes.velocity_genes,
    )  # fmt: skip


def statistics_of(sources: Sources) -> GeneStatistics:
    """Return the statistics of all genes."""
    near = averaging(sources.graph, include_self=False)
    return gene_statistics(sources.unspliced, sources.spliced, sources.counts, sources.sizes, near)


def state_of(sources: Sources, options: SharedFlowOptions) -> CellState:
    """Return the state of all cells."""
    if (cells := sources.spliced.shape[0]) < 3:
        raise ValueError(f"flux_velocity: at least three cells are needed, got {cells}")
    return cell_state(sources.spliced, sources.mean, options.dimensions, options.ridge)


class Terms(NamedTuple):
    """Kinetic terms of a block of genes: their kinetics are A/r - B.

    Attributes:
        genes: numbers of the genes.
        a, b: A = u/(1 + s) and B = s/(1 + s) with all abundances smoothed, for regressions, `[cells, genes]`.
        flow_a, flow_b: the same of the moments themselves, with the smoothed s in 1 + s alone: what makes the flow.
    """

    genes: np.ndarray
    a: np.ndarray
    b: np.ndarray
    flow_a: np.ndarray
    flow_b: np.ndarray

    def only(self, chosen: np.ndarray) -> Terms:
        """Return the terms of some of the genes."""
        return Terms(self.genes[chosen], *(values[:, chosen] for values in self[1:]))


class FlowFit:
    """Alternation between the flow and the rates of the genes.

    Args:
        state: state of the cells.
        sources: what is fitted.
        genes: statistics of the genes.
        options: settings.
    """

    def __init__(self, state: CellState, sources: Sources, genes: GeneStatistics, options: SharedFlowOptions) -> None:
        self.state, self.sources, self.genes, self.options = state, sources, genes, options
        self.usable = genes.usable & state.finite
        fitted = self.usable & (genes.correlation > options.least_correlation)
        self.fitted = fitted if fitted.sum() >= FEWEST_GENES else self.usable
        if not self.fitted.any():
            raise ValueError("flux_velocity: no gene has finite unspliced and spliced abundances above 0")
        chosen = np.flatnonzero(self.fitted)
        fold = np.random.default_rng(options.seed).permutation(len(chosen)) % options.folds
        self.folds = [chosen[fold == k] for k in range(options.folds)]
        self.ratio, self.rate = genes.ratio.copy(), np.ones(len(genes.ratio))
        self.parts = np.zeros((options.folds, 0, 0), dtype=np.float32)  # until `run` has run
        small = 32 * self.state.position.shape[0] * len(chosen) <= CACHE_BYTES
        self._cache: dict[int, list[Terms]] | None = {} if small else None

    def run(self) -> None:
        """Alternate: leaves ratio and rate of the fitted genes, and what each fold of them contributes in `parts`."""
        self.parts = self.kinetic()
        for _ in range(self.options.rounds - 1):
            self.parts = self._regress(self.parts)

    def flow(self, without: int | None = None) -> np.ndarray:
        """Return the flow, `[cells, d]`; on request without the contribution of one fold."""
        total = self.parts.sum(0)
        return self.state.flow(total if without is None else total - self.parts[without])

    def terms(self, fold: int) -> Iterator[Terms]:
        """Yield the terms of the genes of a fold."""
        if self._cache is None:
            yield from self._terms(self.folds[fold])
            return
        if fold not in self._cache:
            self._cache[fold] = list(self._terms(self.folds[fold]))
        yield from self._cache[fold]

    def _terms(self, genes: np.ndarray) -> Iterator[Terms]:
        for chosen in gene_blocks(self.sources.spliced.shape[0], genes):
            b, slope = self.state.slope(chosen)
            unspliced = self.sources.unspliced.genes(chosen)
            a = self.state.mean @ unspliced
            a *= slope
            b *= slope
            if self.options.smooth_kinetics:
                yield Terms(chosen, a, b, a, b)
            else:
                yield Terms(chosen, a, b, unspliced * slope, self.sources.spliced.genes(chosen) * slope)

    def kinetic(self) -> np.ndarray:
        """Return the kinetic velocity that each fold of genes contributes, `[folds, cells, d]`, float32."""
        parts = self._empty()
        for fold in range(len(self.folds)):
            for terms in self.terms(fold):
                parts[fold] += self._project(terms)
        return parts

    def _empty(self) -> np.ndarray:
        return np.zeros((len(self.folds), *self.state.position.shape), dtype=np.float32)

    def _project(self, terms: Terms) -> np.ndarray:
        """Return Σ_g P_g g_g (A_g/r_g - B_g), `[cells, d]`."""
        loadings, rate = self.state.directions[:, terms.genes], self.rate[terms.genes]
        by_ratio = rate / self.ratio[terms.genes]
        return np.asarray(terms.flow_a @ (loadings * by_ratio).T - terms.flow_b @ (loadings * rate).T)

    def _regress(self, parts: np.ndarray) -> np.ndarray:
        """Regress ratio and rate of each fold on the flow of the others; returns the new contributions.

        Genes that agree with the flow take the new values, with rates in units of their mean; the others keep their
        start and rate 1.
        """
        total = parts.sum(0)
        followers, others = self._empty(), self._empty()
        agreeing = np.zeros(len(self.ratio), dtype=bool)
        for fold in range(len(self.folds)):
            flow = self.state.flow(total - parts[fold])
            weights = cell_weights(flow)
            for terms in self.terms(fold):
                chosen = terms.genes
                sums = regression_sums(flow, weights, self.state.directions[:, chosen], terms.a, terms.b)
                ratio, rate, agreement = regress(sums, self.genes.ratio[chosen], self.options)
                good = agreement > self.options.least_agreement
                agreeing[chosen] = good
                self.ratio[chosen] = np.where(good, ratio, self.genes.ratio[chosen])
                self.rate[chosen] = np.where(good, rate, 1.0)
                followers[fold] += self._project(terms.only(good))
                others[fold] += self._project(terms.only(~good))
        if agreeing.any():
            unit = self.rate[agreeing].mean()
            self.rate[agreeing] /= unit
            followers /= np.float32(unit)
        followers += others
        return followers

    def regress_all(self, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Regress every usable gene on the flow; returns γ/β, γ and R², `[genes]` each, NaN in other genes."""
        ratio, rate, agreement = (np.full(len(self.ratio), np.nan) for _ in range(3))
        weights = cell_weights(flow)
        for chosen, a, b, *_ in self._terms(np.flatnonzero(self.usable)):
            sums = regression_sums(flow, weights, self.state.directions[:, chosen], a, b)
            ratio[chosen], rate[chosen], agreement[chosen] = regress(sums, self.genes.ratio[chosen], self.options)
        return ratio, rate, agreement

    def spread(self) -> np.ndarray:
        """Return the circular variance 1 - |mean of F/|F|| of each cell over a bootstrap of genes, `[cells]`.

        Rates are kept, so that the flow is linear in what the genes contribute: a replicate weights them by how often
        they were drawn with replacement.
        """
        chosen = np.flatnonzero(self.fitted)
        generator = np.random.default_rng((self.options.seed, 1))
        cells, dimensions = self.state.position.shape
        total, left = np.zeros((cells, dimensions)), self.options.bootstraps
        while left:
            size = min(left, 8)  # replicates per pass over the genes: memory of 8 kinetic velocities
            drawn = generator.multinomial(len(chosen), np.full(len(chosen), 1 / len(chosen)), size)
            times = np.zeros((size, len(self.ratio)))
            times[:, chosen] = drawn
            kinetic = np.zeros((size, cells, dimensions), dtype=np.float32)
            for fold in range(len(self.folds)):
                for genes, _, _, a, b in self.terms(fold):
                    own = a * (self.rate[genes] / self.ratio[genes]) - b * self.rate[genes]
                    for weighted, count in zip(kinetic, times[:, genes], strict=True):
                        weighted += own @ (self.state.directions[:, genes] * count).T
            for weighted in kinetic:
                flow = self.state.flow(weighted)
                norm = np.linalg.norm(flow, axis=1, keepdims=True)
                total += np.divide(flow, norm, out=np.zeros_like(flow), where=norm > 0)
            left -= size
        return 1 - np.linalg.norm(total, axis=1) / self.options.bootstraps


def cell_weights(flow: np.ndarray) -> np.ndarray:
    """Return weights of the cells in a regression, which keep the fast ones from deciding alone; their sum is 1.

    Cells without a flow, such as those without neighbors, have weight 0.
    """
    squared = np.einsum("nd,nd->n", flow, flow)
    moving = squared > 0
    if not moving.any():
        raise ValueError("flux_velocity: no cell has a flow; each needs neighbors that differ from it")
    weights: np.ndarray = moving / (squared + 0.5 * np.median(squared[moving]))
    return weights / weights.sum()


def regression_sums(
    flow: np.ndarray, weights: np.ndarray, loadings: np.ndarray, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Return the weighted means over cells of A², AB, B², DA, DB and D², `[genes]` each, with D = F P."""
    weighted = weights[:, None] * flow
    root = np.sqrt(weights)[:, None]
    scaled_a, scaled_b = root * a, root * b
    products = [np.einsum("ng,ng->g", one, other) for one, other in ((scaled_a, scaled_a), (scaled_a, scaled_b))]
    return (
        *products,
        np.einsum("ng,ng->g", scaled_b, scaled_b),
        (loadings * (weighted.T @ a)).sum(0),
        (loadings * (weighted.T @ b)).sum(0),
        (loadings * ((flow.T @ weighted) @ loadings)).sum(0) + 1e-12,
    )


def regress(
    sums: tuple[np.ndarray, ...], start: np.ndarray, options: SharedFlowOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find r and g for which g (A/r - B) describes D best, r on a grid about its start under a log-normal prior.

    Args:
        sums: from `regression_sums`.
        start: r at the start, `[genes]`.
        options: settings.

    Returns:
        r, g ≥ 0 and R² (negative where the best g would be below 0), `[genes]` each.
    """
    aa, ab, bb, da, db, dd = sums
    ratio = start * np.exp(LOG_RATIOS)[:, None]
    kinetic, product = aa / ratio**2 - 2 * ab / ratio + bb, da / ratio - db
    explained = np.clip(np.sign(product) * product**2 / (kinetic * dd + 1e-15), -1, 1 - 1e-6)
    likelihood = np.where(explained > 0, -np.log1p(-np.maximum(explained, 0)), explained)
    prior = LOG_RATIOS[:, None] ** 2 / options.ratio_spread**2
    best = np.argmax(options.weight * likelihood - prior, 0), np.arange(len(start))
    rate = np.maximum(product[best], 0) / (kinetic[best] + 1e-15)
    return ratio[best], rate, explained[best]
