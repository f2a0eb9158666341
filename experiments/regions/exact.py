"""Scores of a density estimate, with and without the mask: what score matching finds without errors of training.

The estimate has many true images as reference points. Under the mask the left part of the field that is nearest to the
score is E[s_left | left part], the score of the left part alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.common.run import Run
from experiments.regions.images import draw_images
from experiments.regions.training import FULL, MASKED, measure, sample
from fluxkernels import kde_score
from fluxmatching.fields import NoisyField

REFERENCES = 5000  # true images


def exact_field(refs: Tensor, mask: str, backend: str | None = None) -> NoisyField:
    """Return f(z, σ), z `[n, 2, height, width]`, the best field of score matching for the images `refs`.

    Args:
        refs: images, `[M, 2, height, width]`.
        mask: FULL for the score, MASKED for the score of the left part alone in its left part.
        backend: backend of `kde_score`.
    """
    points, left = refs.flatten(1), refs[:, 0].flatten(1)

    def field(z: Tensor, sigma: Tensor) -> Tensor:
        variance = float(sigma) ** 2
        score = kde_score(z.flatten(1), points, variance, backend=backend).reshape(z.shape)
        if mask == FULL:
            return score
        alone = kde_score(z[:, 0].flatten(1), left, variance, backend=backend).reshape(z[:, 0].shape)
        return torch.stack([alone, score[:, 1]], 1)

    return field


def study(run: Run) -> None:
    """Log missing rows "exact": samples of both fields, from the same noise for each run of the seeds."""
    refs = draw_images(REFERENCES, run.generator("exact")).to(run.device)
    done = {(row["mask"], row["seed"]) for row in run.rows("exact")}
    for seed in range(run.config.seeds):
        for mask in (FULL, MASKED):
            if (mask, seed) in done:
                continue
            run.log(
                kind="exact",
                mask=mask,
                seed=seed,
                **measure(run, sample(run, exact_field(refs, mask, run.backend), seed)),
            )
