"""The problem of all examples: samples of three Gaussians in the plane, and a small network f(z, σ)."""

import torch
from torch import Tensor, nn

MEANS = torch.tensor([[0.0, 1.5], [-1.3, -0.75], [1.3, -0.75]])


def samples(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw samples of the mixture, `[count, 2]`."""
    chosen = torch.randint(len(MEANS), (count,), generator=generator)
    return MEANS[chosen] + 0.3 * torch.randn(count, 2, generator=generator)


class Field(nn.Module):
    """f(z, σ) = g(z/√(1 + σ²), log σ)/σ with a perceptron g."""

    accepts_sigma_per_sample = True  # level below is a column

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, 1).expand(len(z), 1)
        return self.net(torch.cat([z / (1 + level.square()).sqrt(), level.log()], 1)) / level
