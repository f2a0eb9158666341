"""A field at one noise level, shared by several experiments."""

from __future__ import annotations

from torch import Tensor, nn

from fluxmatching import EDMField
from fluxmatching.fields import Field
from fluxmatching.networks import Perceptron


class FixedLevelField(nn.Module):
    """f(z) = g(z) + c(z) at one noise level: a preconditioned perceptron, and a given field or none.

    Args:
        dim, width: number of dimensions and width of the hidden layers.
        sigma: noise level.
        spread: standard deviation of the data.
        added: c, without parameters; None for 0.

    Shape:
        z `[n, D]`; returns the shape of z.
    """

    def __init__(self, dim: int, width: int, sigma: float, spread: float, added: Field | None = None) -> None:
        super().__init__()
        self.network, self.sigma, self.added = EDMField(Perceptron(dim, width), spread), sigma, added

    def forward(self, z: Tensor) -> Tensor:
        f: Tensor = self.network(z, self.sigma)
        return f if self.added is None else f + self.added(z)
