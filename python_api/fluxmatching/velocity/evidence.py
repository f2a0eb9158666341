"""Test of whether RNA velocity applies to a data set at all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from fluxmatching.velocity.control import averaged_again, permuted, relaxing_fit
from fluxmatching.velocity.genes import GeneStatistics
from fluxmatching.velocity.layers import ScaledLayer
from fluxmatching.velocity.moments import Sources, read_sources
from fluxmatching.velocity.options import SharedFlowOptions
from fluxmatching.velocity.shared_flow import FlowFit, state_of, statistics_of
from fluxmatching.velocity.state import CellState

if TYPE_CHECKING:
    from anndata import AnnData

SIGNIFICANT, FEWEST = 0.05, 19  # level of the p-value, and the permutations that can reach it
NEGLIGIBLE = 0.1  # partial correlation below which an effect is called negligible


@dataclass(frozen=True)
class VelocityEvidence:
    """Result of `velocity_evidence`.

    Attributes:
        statistic: mean over genes of the partial correlation.
        control: the same with the flow of the spliced counts alone.
        gain: mean over genes of the difference of the two.
        gain_error: standard error of that mean, with the genes as independent.
        permuted: statistic of each fit to permuted counts.
        p_value: of the statistic among the permuted ones, (1 + number at least as large) / (1 + permutations).
        genes: number of genes.
    """

    statistic: float
    control: float
    gain: float
    gain_error: float
    permuted: tuple[float, ...]
    p_value: float
    genes: int

    @property
    def beats_permuted(self) -> bool:
        """Return whether the p-value is at most 0.05."""
        return self.p_value <= SIGNIFICANT

    @property
    def beats_control(self) -> bool:
        """Return whether the gain over the control is above two standard errors."""
        return self.gain > 2 * self.gain_error

    @property
    def applies(self) -> bool:
        """Return whether both controls are beaten, and the statistic is at least 0.1."""
        return self.beats_permuted and self.beats_control and self.statistic >= NEGLIGIBLE

    def __str__(self) -> str:
        if not self.beats_permuted:
            verdict = "No evidence for velocity: permuted unspliced counts do as well."
        elif not self.beats_control:
            verdict = "No evidence for velocity: the control without unspliced counts does as well."
        elif self.statistic < NEGLIGIBLE:
            verdict = f"Hardly any evidence for velocity: the correlation is below {NEGLIGIBLE:g}."
        else:
            verdict = "Unspliced counts of different genes agree on one flow: velocity applies."
        low, high = min(self.permuted), max(self.permuted)
        return (
            f"{verdict}\n"
            f"Mean partial correlation of a gene's unspliced counts, given its spliced counts, with the flow of other "
            f"genes: {self.statistic:.3f} ({self.genes} genes)\n"
            f"  permuted unspliced counts: {low:.3f} to {high:.3f} in {len(self.permuted)} permutations, "
            f"p = {self.p_value:.2g}\n"
            f"  without unspliced counts:  {self.control:.3f} (gain {self.gain:.3f} ± {self.gain_error:.3f})"
        )


def velocity_evidence(
    adata: AnnData,
    *,
    permutations: int = 19,
    options: SharedFlowOptions | None = None,
    xkey: str = "Ms",
    progress: bool = True,
) -> VelocityEvidence:
    """Test whether unspliced counts hold evidence of a flow of the cells, without any labels.

    The measure: if cells move, a gene that is about to rise has more unspliced molecules than its spliced ones explain,
    and genes must agree on where a cell goes. For each gene that makes the flow, the partial correlation over cells of
    its unspliced abundance with its velocity under the flow of the other folds of genes, given its spliced abundance;
    then the mean over genes. If unspliced counts are proportional to spliced counts up to noise, it is near 0. Compared
    with

    - fits to unspliced counts that are permuted among the cells, each gene in its own way: a p-value;
    - the flow of the spliced counts alone (each gene relaxes to its mean), which must predict unspliced counts worse.

    The test cannot see whether the kinetic model is right: rates of splicing that differ between cell types also make
    genes agree. Means of unspliced counts over neighbors are computed anew, for real and for permuted counts alike.

    Args:
        adata, options, xkey: as in `flux_velocity`.
        permutations: number of fits to permuted counts, at least 19: the smallest p-value is 1/(1 + permutations).
        progress: whether to show a bar.

    Raises:
        KeyError, ValueError, TypeError: as `flux_velocity`; too few permutations.
    """
    function = "velocity_evidence"
    if not isinstance(permutations, int) or permutations < FEWEST:
        raise ValueError(
            f"{function}: permutations must be a whole number of at least {FEWEST}, got {permutations!r}; fewer cannot "
            f"give p ≤ {SIGNIFICANT:g}"
        )
    options = SharedFlowOptions() if options is None else options
    sources = read_sources(function, adata, options, "Mu", xkey)
    sources = averaged_again(sources, ScaledLayer(sources.counts, sources.sizes))  # as permuted ones are
    genes, state = statistics_of(sources), state_of(sources, options)
    fit = _fitted(state, sources, genes, options)
    by_gene = partial_correlations(fit, fit)

    control_by_gene = partial_correlations(fit, relaxing_fit(state, sources, genes, options))

    found = []
    for number in tqdm(range(permutations), desc="permuted counts", disable=not progress):
        shuffled = permuted(sources, options.seed + number)
        # The same genes: those whose real counts follow the state.
        start = dataclasses.replace(statistics_of(shuffled), correlation=genes.correlation)
        other = _fitted(state, shuffled, start, options)
        found.append(float(np.nanmean(partial_correlations(other, other))))
    statistic = float(np.nanmean(by_gene))
    gain = (by_gene - control_by_gene)[np.isfinite(by_gene) & np.isfinite(control_by_gene)]
    if len(gain) < 2:
        raise ValueError(f"{function}: at least two genes must vary given their spliced counts, got {len(gain)}")
    return VelocityEvidence(
        statistic=statistic,
        control=float(np.nanmean(control_by_gene)),
        gain=float(gain.mean()),
        gain_error=float(gain.std(ddof=1) / np.sqrt(len(gain))),
        permuted=tuple(found),
        p_value=(1 + sum(not value < statistic for value in found)) / (1 + permutations),  # NaN counts as larger
        genes=len(gain),
    )


def _fitted(state: CellState, sources: Sources, genes: GeneStatistics, options: SharedFlowOptions) -> FlowFit:
    fit = FlowFit(state, sources, genes, options)
    fit.run()
    return fit


def partial_correlations(fit: FlowFit, predictor: FlowFit) -> np.ndarray:
    """Correlate each fitted gene's unspliced abundance, given its spliced one, with its velocity under other folds.

    Both abundances are in the units of the state: u/(1 + s) and s/(1 + s), s smoothed.

    Args:
        fit: fit whose genes' counts are predicted.
        predictor: fit, of the same genes, whose flow predicts them.

    Returns:
        `[genes]`; NaN for genes that are not fitted or do not vary given s.
    """
    result = np.full(len(fit.ratio), np.nan)
    for fold in range(len(fit.folds)):
        flow = predictor.flow(without=fold)
        for chosen, a, b, *_ in fit.terms(fold):
            velocity = flow @ fit.state.directions[:, chosen]
            b = b - b.mean(0)
            squared = np.einsum("ng,ng->g", b, b)
            a, velocity = (_residual(x - x.mean(0), b, squared) for x in (a, velocity))
            norms = np.sqrt(np.einsum("ng,ng->g", a, a) * np.einsum("ng,ng->g", velocity, velocity))
            products = np.einsum("ng,ng->g", a, velocity)
            result[chosen] = np.divide(products, norms, out=np.full(len(chosen), np.nan), where=norms > 1e-20)
    return result


def _residual(x: np.ndarray, b: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """Return what is left of centered values after regression on b, per gene."""
    slope = np.divide(np.einsum("ng,ng->g", x, b), squared, out=np.zeros(len(squared)), where=squared > 0)
    return np.asarray(x - slope * b)
