"""A network as a field f(z, σ): the preconditioning of EDM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fluxmatching.fields import check_returned, per_sample, with_arguments


class EDMField(nn.Module):
    """f(z, σ) = (D(z; σ) - z)/σ² with the preconditioned denoiser D of Karras et al. (2022, Table 1).

    D = c_skip z + c_out F(c_in z, c_noise), where c_skip = σ_d²/(σ² + σ_d²), c_out = σ σ_d/√(σ² + σ_d²),
    c_in = 1/√(σ² + σ_d²), c_noise = log σ / 4. Written out,

        f = (σ_d F / σ - z / √(σ² + σ_d²)) / √(σ² + σ_d²),

    in which nothing cancels at small σ.

    Args:
        network: F(x, c_noise), x `[n, *event]` and c_noise `[n]`; returns the shape of x.
        sigma_data: σ_d > 0, the standard deviation of the data.

    Shape:
        z `[n, *event]`, σ > 0 `[]` or `[n]`; returns the shape of z.

    Raises:
        ValueError: sigma_data is not positive, or σ has another shape.
        TypeError: the network takes other arguments, or returns no tensor.
    """

    accepts_sigma_per_sample = True

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], sigma_data: float = 0.5) -> None:
        super().__init__()
        if not 0 < sigma_data < float("inf"):
            raise ValueError(f"EDMField: sigma_data must be positive and finite, got {sigma_data}")
        self.network = network
        self.sigma_data = sigma_data

    def forward(self, z: Tensor, sigma: Tensor | float) -> Tensor:
        sigma = torch.as_tensor(sigma, device=z.device)
        if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape != z.shape[:1]):
            raise ValueError(f"EDMField: sigma must be one number or one per sample, got shape {list(sigma.shape)}")
        sigma = sigma.to(z).expand(z.shape[:1])
        level = per_sample(sigma, z)
        norm = (level.square() + self.sigma_data**2).sqrt()
        called = "EDMField: network is called with two arguments, x and c_noise"
        output: Tensor = with_arguments(self.network, z / norm, sigma.log() / 4, called=called)
        check_returned("EDMField: network", output)
        return (self.sigma_data / level * output.to(z.dtype) - z / norm) / norm
