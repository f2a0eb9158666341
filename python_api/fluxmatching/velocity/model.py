"""The splicing model of RNA velocity, and its loss (Sec. 4.2, B.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxmatching.losses.horizons import UniformHorizon
from fluxmatching.losses.options import FluxOptions
from fluxmatching.losses.target import build_target

UNSPLICED, SPLICED = 0, 1  # of the last dimension


class SplicingField(nn.Module):
    """Splicing model of each gene: du/dt = α - β u, ds/dt = β u - γ s, α = softplus(a u + b s + c) (Eq. 41, 42).

    Cells and genes do not interact in it, so its second derivatives are known: it is a
    `fluxmatching.losses.second_derivatives.ClosedForm`. β and γ are softplus of the parameters `splicing` and
    `degradation`, in units of the inverse of the model's time; α has the unit of u.

    Args:
        genes: G.

    Shape:
        x `[n, G, 2]`, unspliced and spliced abundance; returns the same.
    """

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.a, self.b, self.c, self.splicing, self.degradation = (nn.Parameter(torch.zeros(genes)) for _ in range(5))

    @property
    def beta(self) -> Tensor:
        """β, `[G]`."""
        return F.softplus(self.splicing)

    @property
    def gamma(self) -> Tensor:
        """γ, `[G]`."""
        return F.softplus(self.degradation)

    @torch.no_grad()
    def circulate(self, means: Tensor, rate: float) -> None:
        """Set the parameters to a field in which cells turn about their mean (ū, s̄).

        β = R √(s̄/ū) and γ = R √(ū/s̄), so that β ū = γ s̄: the mean of ds/dt over a stationary population is zero. α is
        nearly linear over most cells, with b = -a ū/s̄ and c = β ū, so that the mean of du/dt is small too: α is high
        above the line u/s = ū/s̄ and low below it. a = 0.95 (β + γ) leaves a divergence just below zero: R is the
        angular speed.

        Args:
            means: ū and s̄, `[G, 2]`, above 0.
            rate: R = √(βγ).
        """
        unspliced, spliced = means.unbind(-1)
        ratio = unspliced / spliced
        beta, gamma = rate / ratio.sqrt(), rate * ratio.sqrt()
        for parameter, value in ((self.splicing, beta), (self.degradation, gamma)):
            parameter.copy_(value + torch.log(-torch.expm1(-value)))  # the inverse of softplus
        self.a.copy_(0.95 * (beta + gamma))
        self.b.copy_(-self.a * ratio)
        self.c.copy_(beta * unspliced)

    def _drive(self, x: Tensor) -> Tensor:
        """a u + b s + c, `[n, G]`."""
        return self.a * x[..., UNSPLICED] + self.b * x[..., SPLICED] + self.c

    def transcription(self, x: Tensor) -> Tensor:
        """α(u, s), `[n, G]`."""
        return F.softplus(self._drive(x))

    def forward(self, x: Tensor) -> Tensor:
        spliced = self.beta * x[..., UNSPLICED]
        return torch.stack([self.transcription(x) - spliced, spliced - self.gamma * x[..., SPLICED]], -1)

    def endpoint_gradient(self, z: Tensor, score: Tensor, probe: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """See `fluxmatching.losses.second_derivatives.ClosedForm`."""
        drive = self._drive(z)
        slope = torch.sigmoid(drive)
        bend = slope * (1 - slope)
        beta, gamma, (u, s) = self.beta, self.gamma, score.unbind(-1)
        along = self.a if probe is None else self.a * probe[..., 0].square() + self.b * probe[..., 0] * probe[..., 1]
        # ∇(∇·f) = α'' a (a, b), and J_fᵀ s with J_f = ((α' a - β, α' b), (β, -γ)).
        gradient = torch.stack(
            [
                bend * along * self.a + u * (slope * self.a - beta) + s * beta,
                bend * along * self.b + u * slope * self.b - s * gamma,
            ],
            -1,
        )
        spliced = beta * z[..., UNSPLICED]
        return gradient, torch.stack([F.softplus(drive) - spliced, spliced - gamma * z[..., SPLICED]], -1)


def splicing_loss(
    field: SplicingField, x: Tensor, sigma: float, *, seed: int | Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Compute σ⁴ times the flux loss of every gene, summed over genes, which `flux_velocity` minimizes.

    The density estimate is a separate one in the plane (u, s) of each gene, the divergence exact, the horizon uniform.
    The factor σ⁴ is ours: without it the loss grows without bound as σ falls. Genes share no parameters, so the sum
    fits all genes at once.

    Args:
        field: the model.
        x: minibatch, `[n, G, 2]`.
        sigma: σ > 0, in units of x.
        seed: determines the chains; None draws one.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        One number per cell, `[n]`.

    Raises:
        ValueError, TypeError: as `flux_matching_loss`.
    """
    options = FluxOptions(
        horizon=UniformHorizon(), grouped=True, second_derivatives="closed_form", divergence="exact", backend=backend
    )
    return sigma**4 * build_target("splicing_loss", field, x, sigma, options, seed=seed).loss(field)
