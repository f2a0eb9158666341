"""Figures 2 and 4 of the paper, and the flux loss against its exact value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from experiments.common import figures as style
from experiments.controllable.bins import bin_means
from experiments.controllable.fields import Controls

Row = dict[str, Any]

WINDOW = 4.2  # half the side of Figure 2's panels: all but half a percent of the samples lie inside
MESH = 85
SHADES = LinearSegmentedColormap.from_list("density", ["white", "#c6d7e8", "#7fa3c7"])
PANELS = (
    ("mixing", "Mixing speed", "$M_{\\mathrm{mix}}$", "preserving"),
    ("triangle", "Triangle shape", "$M_{\\mathrm{tri}}$", "preserving"),
    ("skewness", "Jacobian skewness", "$M_{\\mathrm{skew}}$", "preserving"),
    ("violation", "Distribution violation", "$V$", "violating"),
    ("grid_violation", "Violation by differences", "$V$, central differences", "violating"),
)


def draw_best_fields(path: Path, controls: Controls, shown: dict[str, Row], samples: Tensor) -> None:
    """Draw Figure 2: streamlines of the score field and of the fields chosen for each metric.

    Args:
        path: file to write.
        controls: the control directions.
        shown: one row of coefficients for each of the metrics "mixing", "triangle" and "skewness".
        samples: draws of p_σ, `[S, 2]`.
    """
    axis = torch.linspace(-WINDOW, WINDOW, MESH).to(samples)
    x = torch.cartesian_prod(axis, axis)
    density = controls.mixture.log_density(x).exp().reshape(MESH, MESH).T.cpu().numpy()
    ticks = axis.cpu().numpy()
    dots = samples.cpu().numpy()
    zero = {"theta0": 0.0, "theta1": 0.0, "theta2": 0.0}
    panels = [("Score field", zero)]
    panels += [(title, shown[name]) for name, title, _, _ in PANELS[:3]]

    fig, axes = style.new_figure(12.0, 3.4, 1, 4, sharex=True, sharey=True)
    for ax, (title, row) in zip(axes, panels, strict=True):
        theta = samples.new_tensor([row["theta0"], row["theta1"], row["theta2"]])
        field = controls.field(theta, "preserving")(x).reshape(MESH, MESH, 2).transpose(0, 1).cpu().numpy()
        ax.contourf(ticks, ticks, density, levels=14, cmap=SHADES, zorder=0)
        ax.scatter(*dots.T, s=2.5, color="#c1121f", alpha=0.45, linewidths=0, zorder=1)
        ax.streamplot(
            ticks, ticks, field[..., 0], field[..., 1],
            density=1.25, linewidth=0.75, arrowsize=0.8, color="#1b263b", zorder=2,
        )  # fmt: skip
        ax.set(title=title, xlim=(-WINDOW, WINDOW), ylim=(-WINDOW, WINDOW), aspect="equal", xlabel="$x_1$")
        ax.grid(False)
    axes[0].set_ylabel("$x_2$")
    style.save(fig, path)


def draw_losses(path: Path, fields: list[Row], bins: int) -> None:
    """Draw Figure 4: both losses over their means in the violating family, against the attributes.

    Args:
        path: file to write.
        fields: the sweep's rows of both families.
        bins: equal-width bins of each horizontal axis.
    """
    scale = {
        name: np.mean([row[name] for row in fields if row["family"] == "violating"])
        for name in ("score_matching_loss", "flux_loss")
    }
    fig, axes = style.new_figure(14.5, 3.4, 1, 5, sharey=True)
    for ax, (metric, title, symbol, family) in zip(axes, PANELS, strict=True):
        rows = [row for row in fields if row["family"] == family]
        x = np.array([row[metric] for row in rows])
        for name, label, color, marker in (
            ("score_matching_loss", "score matching", style.SCORE_MATCHING, "s"),
            ("flux_loss", "Flux Matching", style.FLUX, "o"),
        ):
            y = np.array([row[name] for row in rows]) / scale[name]
            error = np.array([row.get(f"{name}_error", 0.0) for row in rows]) / scale[name]
            binned = bin_means(x, y, error, bins)
            ax.scatter(x, y, s=9, color=color, alpha=0.25, linewidths=0)
            ax.errorbar(
                binned.x, binned.mean, binned.error,
                color=color, marker=marker, markersize=4.5, capsize=2.5, label=label,
            )  # fmt: skip
        score = next(row for row in rows if row["theta0"] == row["theta1"] == row["theta2"] == 0)
        ax.plot(score[metric], 0.0, "*", color="black", markersize=12, zorder=5, label="score field")
        ax.set(title=f"{title}\n({family} family)", xlabel=symbol)
    axes[0].set_ylabel("loss / mean over violating family")
    # Outside the panels, where no curve can run under it.
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    style.save(fig, path)


def draw_exact(path: Path, fields: list[Row]) -> None:
    """Draw the estimated flux loss of each violating field, with its standard error, against the exact value."""
    rows = [row for row in fields if row["family"] == "violating"]
    exact = np.array([row["exact_loss"] for row in rows])
    loss = np.array([row["flux_loss"] for row in rows])
    error = np.array([row["flux_loss_error"] for row in rows])
    fig, ax = style.new_figure(4.6, 3.6)
    ax.axline((0, 0), slope=1, color=style.REFERENCE, linewidth=1, linestyle="--", label="equal")
    ax.errorbar(exact, loss, error, fmt="none", ecolor=style.REFERENCE, elinewidth=0.8, capsize=2, zorder=1)
    points = ax.scatter(exact, loss, c=[row["violation"] for row in rows], s=24, zorder=2, label="one field")
    fig.colorbar(points, ax=ax, label="distribution violation $V$")
    ax.set(xlabel=r"exact flux loss $2\tilde{J}/\nu^2$ (finite volumes)", ylabel="Monte Carlo flux loss")
    ax.legend(loc="upper left", frameon=False)
    style.save(fig, path)


def draw_violation(path: Path, seeds: list[list[Row]], bins: int) -> None:
    """Draw mean losses of the violating fields in bins of V, both ways to take its divergence; one line per seed."""
    fig, axes = style.new_figure(7.5, 3.0, 1, 2, sharey=True)
    for ax, (metric, title, symbol, _) in zip(axes, PANELS[3:], strict=True):
        for rows in seeds:
            x = np.array([row[metric] for row in rows])
            for name, label, color, line in (
                ("flux_loss", "Flux Matching", style.FLUX, "o-"),
                ("exact_loss", "its exact value", style.DATA, "--"),
            ):
                y = np.array([row[name] for row in rows])
                binned = bin_means(x, y / y.mean(), np.zeros_like(y), bins)
                ax.plot(
                    binned.x, binned.mean, line,
                    color=color, markersize=2.5, linewidth=0.9, alpha=0.7, label=label if rows is seeds[0] else None,
                )  # fmt: skip
        ax.set(title=title, xlabel=symbol)
    axes[0].set_ylabel("loss / mean over fields")
    axes[0].legend(frameon=False)
    style.save(fig, path)
