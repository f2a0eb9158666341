"""Figures: images of every sampler, and evaluations per draw against bias."""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.augment_images.law import EVENT, make_law
from experiments.augment_images.measure import FIELDS, SAMPLERS, SIGMA_MAX, SIGMA_MIN, TRUTH, Sampling, place
from experiments.augment_images.training import EXACT, LEARNED, PIPELINE, make_field
from experiments.common import figures as style
from experiments.common.run import Run

COLORS = {TRUTH: style.DATA, PIPELINE: style.SCORE_MATCHING, EXACT: style.PRESERVING, LEARNED: style.FLUX}
SHOWN = 8  # images per sampler


def draw_samples(run: Run, path: Path) -> None:
    """Draw exact images, and images of the first seed by every sampler, without and with learned v."""
    law = make_law()
    rows = {"exact draws": law.sample(SHOWN, SIGMA_MIN, run.generator("shown"))}
    for kind in (PIPELINE, LEARNED):
        field = make_field(run, law, kind, 0)
        for name, sampler in SAMPLERS.items():
            start = SIGMA_MAX * torch.randn(SHOWN, *EVENT, generator=run.generator("shown start"))
            with torch.no_grad():
                task = Sampling(field, start, run.config.sampling_steps, run.generator("shown noise"))
                rows[f"{name}\n{kind}"] = sampler(task)
    fig, axes = style.new_figure(6.0, 0.62 * len(rows), len(rows), 1)
    for panel, (name, images) in zip(axes, rows.items(), strict=True):
        wide = torch.nn.functional.pad(images[:, 0], (0, 1), value=float("nan")).transpose(0, 1).flatten(1).numpy()
        panel.imshow(wide, cmap="gray", vmin=-1.5, vmax=1.5)
        panel.grid(False)
        panel.set(xticks=[], yticks=[])
        panel.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
        for side in panel.spines.values():
            side.set_visible(False)
    style.save(fig, path)


def draw_costs(run: Run, path: Path) -> None:
    """Draw bias and evaluations per draw of every schedule, mean over seeds, by noise level and field."""
    sigmas = run.config.sigmas
    fig, axes = style.new_figure(3.4 * len(sigmas), 3.2, 1, len(sigmas), squeeze=False)
    rows = run.rows("cost")
    for panel, sigma in zip(axes[0], sigmas, strict=True):
        for field in FIELDS:
            for seed, marker in zip(range(run.config.seeds), "osv^D" * run.config.seeds, strict=False):
                known = {"problem": place(sigma), "field": field, "seed": seed}
                some = [row for row in rows if known.items() <= row.items()]
                panel.plot(
                    [max(row["bias"], run.config.bias / 10) for row in some], [row["evaluations"] for row in some],
                    marker, color=COLORS[field], ms=3.5, alpha=0.8, label=None if seed else field,
                )  # fmt: skip
        for bias in (run.config.bias, run.config.bias / 2):
            panel.axvline(bias, color=style.REFERENCE, lw=0.8, ls=":")
        panel.set(title=place(sigma), xlabel="bias")
        if any(len(line.get_xdata()) for line in panel.lines[:-2]):
            panel.set(xscale="log", yscale="log")
    axes[0, 0].set_ylabel("evaluations per independent draw")
    axes[0, 0].legend(fontsize=7)
    style.save(fig, path)
