"""Networks and data of the measured training steps: a small one, a transformer and a UNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.springs.simulator import trajectories
from fluxmatching import EDMField, UNet, dsm_loss
from fluxmatching.networks import Perceptron, TrajectoryTransformer

SAMPLES = 512


def images(count: int, generator: torch.Generator, size: int = 32) -> Tensor:
    """Noise with the power spectrum of photographs, 1/frequency², and deviation 0.5: `[count, 3, size, size]`."""
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None])
    spectrum = torch.fft.rfft2(torch.randn(count, 3, size, size, generator=generator)) / (frequency + 1 / size)
    pictures = torch.fft.irfft2(spectrum, s=(size, size))
    return 0.5 * pictures / pictures.std()


@dataclass(frozen=True)
class Problem:
    """A network, its data, and the noise levels at which it is measured.

    Attributes:
        key: one word for the command line.
        network: makes F(x, c_noise).
        data: (count, generator) -> samples.
        batch: samples per minibatch.
        sigmas: noise levels.
    """

    key: str
    name: str
    network: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], Tensor]
    batch: int
    sigmas: tuple[float, ...]

    def make(self, pretrained: int = 0) -> tuple[EDMField, Tensor]:
        """Field and samples, the same in every process; the field trained by score matching for that many steps.

        A network with random weights is smoother than one that has learned, and flatters differences.
        """
        samples = self.data(SAMPLES, torch.Generator().manual_seed(0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            field = EDMField(self.network(), samples.std().item())
            optimizer = torch.optim.Adam(field.parameters(), lr=1e-3)
            for _ in range(pretrained):
                x = samples[torch.randperm(SAMPLES)[: self.batch]]
                sigma = self.sigmas[0] * (self.sigmas[-1] / self.sigmas[0]) ** torch.rand(self.batch)
                loss = dsm_loss(partial(_at, field, sigma), x, sigma).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return field, samples


def _at(field: EDMField, sigma: Tensor, z: Tensor) -> Tensor:
    value: Tensor = field(z, sigma)
    return value


def _mixture(count: int, generator: torch.Generator) -> Tensor:
    return GaussianMixture(triangle_means(1.8).float(), 0.225).sample(count, generator)


MIXTURE = Problem("mixture", "mixture, perceptron", Perceptron, _mixture, 256, (0.05, 0.5, 5.0))
SPRINGS = Problem(
    "springs",
    "springs, transformer",
    lambda: TrajectoryTransformer(width=128, blocks=4, heads=4),
    trajectories,
    64,
    (0.002, 0.05, 0.5, 5.0),
)
PICTURES = Problem(
    "images",
    "images, UNet",
    lambda: UNet(32, 3, width=32, dropout=0.0, norm_num_groups=8),
    images,
    8,
    (0.05, 0.5, 5.0),
)
PROBLEMS = (MIXTURE, SPRINGS, PICTURES)
