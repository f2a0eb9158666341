"""The published program's choices of a field: no input scaling, and a wrong noise label in score matching."""

from __future__ import annotations

from torch import Tensor, nn

from fluxmatching import EDMField
from fluxmatching.networks import TrajectoryTransformer


class UnscaledField(nn.Module):
    """f(z, σ) = F(z, log σ / 4)/σ: neither the input nor what the network adds to is scaled, unlike `EDMField`.

    Args:
        network: F(x, c_noise), x `[n, *event]` and c_noise `[n]`; returns the shape of x.

    Shape:
        z `[n, *event]`, σ > 0 `[]`; returns the shape of z.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.to(z)
        output: Tensor = self.network(z, (sigma.log() / 4).expand(len(z)))
        return output / sigma


class PowerLabel(nn.Module):
    """Network whose noise label is that of σ^power: with power 2 it is labeled by σ² in place of σ.

    The published program trains score matching with power 2 and samples with power 1, so that its sampler receives at σ
    the field of the level √σ.

    Args:
        network: F(x, c_noise) with c_noise = log σ / 4.
        power: may be changed between training and sampling; not a part of a checkpoint.
    """

    def __init__(self, network: nn.Module, power: float) -> None:
        super().__init__()
        self.network, self.power = network, power

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        output: Tensor = self.network(x, self.power * c_noise)
        return output


def make_field(network: TrajectoryTransformer, spread: float, *, input_scaling: bool, wrong_label: bool) -> nn.Module:
    """Make a field of a network, preconditioned with the spread of the data or not, labeled by σ² or by σ."""
    labeled = PowerLabel(network, 2.0) if wrong_label else network
    return EDMField(labeled, spread) if input_scaling else UnscaledField(labeled)


def label_by_sigma(field: nn.Module) -> bool:
    """Label by σ a field that was trained with another label, as the published sampler does; return if it was."""
    network = field.get_submodule("network")
    if not isinstance(network, PowerLabel):
        return False
    network.power = 1.0
    return True
