"""Figure 16 of the paper, and the relative width of its bands against the noise level."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

from experiments.common import figures as style
from experiments.horizon.estimates import Array, Crossing, ExponentialFit

ESTIMATOR_LOOK = {
    "cross_chain": ("cross-chain", style.FLUX, "o"),
    "single_chain": ("single-chain", style.SCORE_MATCHING, "s"),
}
CUT_COLOR = "#c1121f"


def draw_crossing_and_loss(
    path: Path,
    means: Tensor,
    crossings: Mapping[float, Crossing],
    curves: Mapping[tuple[float, str], tuple[Array, Array, Array]],
    references: Mapping[float, tuple[Array, Array, Array]],
    fits: Mapping[float, ExponentialFit],
    cut: float,
) -> None:
    """Draw Figure 16: ends of the chains above, loss against the horizon below, one column per noise level.

    Args:
        path: file to write.
        means: component means, `[3, 2]`.
        crossings: ends of the chains, by noise level.
        curves: (τ, mean, standard deviation) by noise level and estimator.
        references: (τ, mean, standard error) of the autocorrelation, by noise level.
        fits: lines through the cross-chain curve, by noise level.
        cut: the training horizon, τ = 4.
    """
    fig, axes = style.new_figure(3.3 * len(crossings), 6.2, 2, len(crossings), squeeze=False)
    for column, (sigma, crossing) in enumerate(crossings.items()):
        above, below = axes[:, column]
        end, crossed = crossing.end.cpu().numpy(), crossing.crossed.cpu().numpy()
        for chosen, label, color in ((~crossed, "same mode", style.ACCENT), (crossed, "other mode", style.FLUX)):
            above.scatter(*end[chosen].T, s=5, color=color, alpha=0.55, linewidths=0, label=label)
        above.plot(*means.cpu().numpy().T, "x", color="black", markersize=5, label="means")
        above.set(title=f"σ = {sigma:g}: {100 * crossing.share:.0f} % crossed", aspect="equal")
        above.margins(0.12)

        scale = curves[sigma, "cross_chain"][1][0]
        for estimator in ("single_chain", "cross_chain"):
            tau, mean, std = curves[sigma, estimator]
            label, color, _ = ESTIMATOR_LOOK[estimator]
            below.plot(tau, mean / scale, color=color, label=f"{label}, ± std")
            below.fill_between(tau, (mean - std) / scale, (mean + std) / scale, color=color, alpha=0.22, lw=0)
        tau, mean, error = references[sigma]
        below.errorbar(
            tau, mean / scale, error / scale, fmt=".", color=style.DATA, markersize=4, elinewidth=0.8,
            label="$2\\,\\mathrm{E}[r(x_0)\\,r(x_\\tau)]$",
        )  # fmt: skip
        below.axvline(cut, color=CUT_COLOR, linewidth=1.2, label="$T = 4σ^2$")
        below.set(title=f"fit $e^{{-{fits[sigma].rate:.2f}\\,τ}}$", xlabel="horizon $τ = t/σ^2$", ylim=(-0.32, 1.12))
    axes[0, 0].legend(loc="upper right", fontsize=7, markerscale=1.6)
    axes[1, 0].set_ylabel("loss $\\ell(τ)\\,/\\,\\ell(0)$")
    axes[1, 0].legend(loc="upper right", fontsize=7)
    style.save(fig, path)


def draw_decay(
    path: Path, curves: Mapping[tuple[str, float], tuple[Array, Array, Array]], titles: Mapping[str, str], cut: float
) -> None:
    """Draw the cross-chain loss on a logarithmic axis, one panel per field, one line per noise level.

    Args:
        path: file to write.
        curves: (τ, mean, standard error) by field and noise level.
        titles: titles of the panels, by field.
        cut: the training horizon.
    """
    fig, axes = style.new_figure(4.6 * len(titles), 3.6, 1, len(titles), sharey=True, squeeze=False)
    levels = sorted({sigma for _, sigma in curves})
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(levels)))
    for ax, (field, title) in zip(axes[0], titles.items(), strict=True):
        for sigma, color in zip(levels, colors, strict=True):
            tau, mean, error = curves[field, sigma]
            seen = mean > 2 * error
            ax.plot(tau[seen], mean[seen] / mean[0], ".-", color=color, markersize=3, linewidth=1, label=f"{sigma:g}")
        ax.axvline(cut, color=CUT_COLOR, linewidth=1.2)
        ax.set(title=title, xlabel="horizon $τ = t/σ^2$", yscale="log")
    axes[0, 0].set_ylabel("cross-chain loss $\\ell(τ)\\,/\\,\\ell(0)$")
    axes[0, -1].legend(title="σ", loc="lower left", fontsize=7, ncols=2)
    style.save(fig, path)


def draw_bands(path: Path, bands: Mapping[tuple[str, str], tuple[Array, Array]], titles: Mapping[str, str]) -> None:
    """Draw the relative band against the noise level, one panel per field, one line per estimator.

    Args:
        path: file to write.
        bands: (σ, relative band) by field and estimator.
        titles: titles of the panels, by field.
    """
    fig, axes = style.new_figure(4.6 * len(titles), 3.4, 1, len(titles), sharey=True, squeeze=False)
    for ax, (field, title) in zip(axes[0], titles.items(), strict=True):
        for estimator, (label, color, marker) in ESTIMATOR_LOOK.items():
            ax.plot(*bands[field, estimator], marker=marker, markersize=4, color=color, label=label)
        ax.set(title=title, xlabel="noise level σ", xscale="log", yscale="log")
    axes[0, 0].set_ylabel("std over minibatches / loss,\nboth integrated over $τ \\leq 4$")
    axes[0, 0].legend(loc="upper left")
    style.save(fig, path)


def draw_tail(
    path: Path, cross_chain: tuple[Array, Array, Array], reference: tuple[Array, Array, Array], cut: float
) -> None:
    """Draw the loss of the tilted field by the cross-chain estimator and by the autocorrelation of r.

    Args:
        path: file to write.
        cross_chain: (τ, mean, standard error).
        reference: (τ, mean, standard error).
        cut: the training horizon.
    """
    fig, ax = style.new_figure(5.2, 3.4)
    for (tau, mean, error), label, color, line in (
        (cross_chain, "cross-chain", style.FLUX, "-"),
        (reference, "$2\\,\\mathrm{E}[r(x_0)\\,r(x_\\tau)]$", style.DATA, "."),
    ):
        seen = mean > 2 * error
        ax.errorbar(
            tau[seen], mean[seen], error[seen], fmt=line, color=color, elinewidth=0.8, markersize=5, label=label
        )
    ax.axvline(cut, color=CUT_COLOR, linewidth=1.2, label="$T = 4σ^2$")
    ax.set(xlabel="horizon $τ = t/σ^2$", ylabel="$σ^4$ loss $\\ell(τ)$", yscale="log")
    ax.legend(loc="upper right")
    style.save(fig, path)
