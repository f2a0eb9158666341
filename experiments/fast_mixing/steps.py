"""Steps of the predictor-corrector sampler: as in the paper, as in the published program, and tuned for a field."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fluxmatching import exponential_schedule, karras_schedule, predictor_corrector
from fluxmatching.fields import NoisyField


@dataclass(frozen=True)
class Steps:
    """Settings of the sampler; the defaults are those of Algorithm 3.

    Attributes:
        ratio: signal-to-noise ratio of the corrector.
        scale: factor of the field, so of the length of every step.
        spacing: ρ of Karras's noise levels, from σ_max to σ_min; 0 for equal ratios.
        clamp: whether the denoiser z + σ² f(z, σ) is clamped to [-1, 1], the range of the data.
        denoise: whether one more denoising, x + σ_min² f(x, σ_min), ends the sampling.
    """

    ratio: float = 0.16
    scale: float = 1.0
    spacing: float = 0.0
    clamp: bool = False
    denoise: bool = False

    def levels(self, num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
        """Return noise levels `[num_steps + 1]` from σ_max to σ_min."""
        if self.spacing:
            return karras_schedule(num_steps + 1, sigma_min, sigma_max, self.spacing)[:-1]
        return exponential_schedule(num_steps, sigma_min, sigma_max)

    def modify(self, field: NoisyField) -> NoisyField:
        """Return the field that the sampler uses: scaled, and with a clamped denoiser."""

        def modified(z: Tensor, sigma: Tensor) -> Tensor:
            f = self.scale * field(z, sigma)
            return ((z + sigma**2 * f).clamp(-1, 1) - z) / sigma**2 if self.clamp else f

        return modified

    def sample(
        self,
        field: NoisyField,
        start: Tensor,
        num_steps: int,
        sigma_range: tuple[float, float],
        generator: torch.Generator,
    ) -> Tensor:
        """Draw samples from noise of σ_max.

        Args:
            field: f(z, σ).
            start: noise, `[n, *event]`.
            num_steps: number of predictor-corrector steps.
            sigma_range: σ_min and σ_max.
            generator: makes the noise of the steps.
        """
        used = self.modify(field)
        levels = self.levels(num_steps, *sigma_range)
        x = predictor_corrector(used, start, levels, signal_to_noise=self.ratio, generator=generator)
        if self.denoise:
            sigma = levels[-1].to(x)
            with torch.no_grad():
                x = x + sigma**2 * used(x, sigma)
        return x


PAPER, PUBLISHED, TUNED = PROCEDURES = ("Algorithm 3", "published", "tuned")
# The published program's field is on data in [-1, 1]; the mixture is not, so its denoiser is not clamped.
FIXED = {PAPER: Steps(), PUBLISHED: Steps(clamp=True, denoise=True)}
FIXED_ON_MIXTURE = {PAPER: Steps(), PUBLISHED: Steps(denoise=True)}
RATIOS, SCALES, SPACINGS = (0.005, 0.08, 0.16, 0.3, 0.5, 0.8), (0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.4, 1.7), (0, 10, 6, 3)
GRID = [Steps(*settings) for settings in product(RATIOS, SCALES, SPACINGS)]
GRID_OF_IMAGES = [Steps(*settings) for settings in product((0.005, 0.08, 0.16, 0.24), (0.8, 0.9, 1.0, 1.1), (0, 7))]


def tune(distance: Callable[[Steps, int], float], grid: Sequence[Steps], few: int, many: int, kept: int) -> Steps:
    """Return the best steps of a grid: all are judged with few samples, and the `kept` best again with many.

    Args:
        distance: (steps, number of samples) -> distance of the samples; nan for samples that diverged.
        grid: the steps that are tried.
        few, many: numbers of samples.
        kept: how many steps are judged again.
    """

    def judge(count: int) -> Callable[[Steps], float]:
        def judged(steps: Steps) -> float:
            found = distance(steps, count)
            return found if math.isfinite(found) else math.inf

        return judged

    return min(sorted(grid, key=judge(few))[:kept], key=judge(many))
