"""Minimum of a minibatch's loss on a line of linear fields under the mask: how much freedom the loss leaves.

The line f_α(x) = -((1 - α) A_0 + α A_1) x runs from the field that preserves p_σ (A_0, loss 0 if p_σ is Gaussian) to
masked score matching (A_1), both of `linear.py`. Centers are drawn from the Gaussian of the trajectories. The loss
knows p_σ only by its density estimate. Where the kernels overlap, its minimum on the line is α = 0. Where they do not,
every center is a Gaussian by itself, which f_α has to preserve by itself. Then the minimum has a closed form, near
α = 1.

The loss of a linear field is quadratic in α. Its gradient, in which q̂ is detached, is linear. Values and gradients at
both ends of the line determine the minimum and the zero of the gradient, at which training stops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.common.run import Run
from experiments.springs import linear
from fluxmatching import FluxOptions, effective_centers, flux_matching_loss

SIGMAS = (0.3, 1.0, 3.0, 10.0)
BATCH = 256  # centers of a minibatch, as in the paper
# Of a linear field second derivatives vanish, so its closed form is exact for every probe.
OPTIONS = FluxOptions(second_derivatives="closed_form")
Ends = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LineField:
    """f_α of a position α on the line between two matrices, with the closed form that `FluxOptions` names."""

    ends: Ends
    position: Tensor

    @property
    def matrix(self) -> Tensor:
        return self.ends[0] + self.position * (self.ends[1] - self.ends[0])

    def __call__(self, z: Tensor) -> Tensor:
        return -z @ self.matrix.T

    def endpoint_gradient(self, z: Tensor, score: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute ∇(∇·f) + J_fᵀ s = -Aᵀ s, and f; each of the shape of z."""
        return -score @ self.matrix, self(z)


def losses_at_ends(ends: Ends, x: Tensor, refs: Tensor, sigma: float, seed: int, backend: str | None = None) -> Tensor:
    """Compute mean loss and its derivative by α at both ends of the line: `[2, 2]`, ends first."""
    options = FluxOptions(second_derivatives=OPTIONS.second_derivatives, backend=backend)
    rows = []
    for end in (0.0, 1.0):
        position = torch.tensor(end, dtype=x.dtype, device=x.device, requires_grad=True)
        value = flux_matching_loss(LineField(ends, position), x, sigma, options, refs=refs, seed=seed).mean()
        (slope,) = torch.autograd.grad(value, position)
        rows.append(torch.stack([value.detach(), slope]))
    return torch.stack(rows).double().cpu()


def minima(found: Tensor) -> tuple[float, float]:
    """Return the α of the least loss, and the one at which its gradient vanishes, of means over minibatches `[2, 2]`.

    The gradient is half of the value's derivative only where the estimate is symmetric; the two α differ by its error.
    """
    (value, slope), (other_value, other_slope) = found.tolist()
    curvature = other_slope - slope
    return 0.5 - (other_value - value) / (2 * curvature), -slope / curvature


def alone(ends: Ends, covariance: Tensor, sigma: float, tau_max: float = 4.0) -> float:
    """Return the α of the least loss if every center c ~ N(0, covariance) is a Gaussian of variance σ² by itself.

    About c the residual field is u = -A c + (I/σ² - A)(z - c). Of its second part only the symmetric one counts. So

        E ℓ = 2 (1 - e^{-T}) E|A c|²/σ² + 2 (1 - e^{-2T}) |sym A - I/σ²|²_F

    with horizons up to T, whatever their distribution.
    """
    identity = torch.eye(len(covariance)).to(covariance)
    root, there = torch.linalg.cholesky(covariance + 1e-12 * covariance.trace() * identity), ends[1] - ends[0]

    def parts(matrix: Tensor, constant: float) -> Tensor:
        symmetric = (matrix + matrix.T) / 2 - constant * identity
        pulled = math.sqrt(1 - math.exp(-tau_max)) * (matrix @ root) / sigma
        return torch.cat([pulled.flatten(), math.sqrt(1 - math.exp(-2 * tau_max)) * symmetric.flatten()])

    start, direction = parts(ends[0], sigma**-2), parts(there, 0.0)
    return float(-(start @ direction) / direction.square().sum())


def study(run: Run, samples: Tensor) -> None:
    """Log missing rows "line": both α, their closed form for centers by themselves, and effective centers."""
    config, block = run.config, samples.shape[-1]
    covariance = samples.flatten(1).double().cpu().T.cov()
    done = {(row["sigma"], row["refs"]) for row in run.rows("line")}
    wanted = [(sigma, refs) for sigma in SIGMAS for refs in (0, config.line_refs) if (sigma, refs) not in done]
    for sigma, refs in run.bar(wanted, "line of fields"):
        total = linear.noised(covariance, sigma)
        ends = linear.flux_matrix(total, block), linear.dsm_matrix(total, block)
        found, centers = measure(run, ends, covariance, sigma, refs)
        least, stop = minima(found.mean(0))
        run.log(
            kind="line", sigma=sigma, refs=refs, minimum=least, stop=stop, error=jackknife(found), centers=centers,
            alone=alone(ends, covariance, sigma),
        )  # fmt: skip


def measure(run: Run, ends: Ends, covariance: Tensor, sigma: float, refs: int) -> tuple[Tensor, float]:
    """Return `losses_at_ends` of every minibatch, `[batches, 2, 2]`, and the mean number of effective centers."""
    found, counts = [], []
    identity = torch.eye(len(covariance)).to(covariance)
    root = torch.linalg.cholesky(covariance + 1e-12 * covariance.trace() * identity)
    single = (ends[0].to(run.device, torch.float32), ends[1].to(run.device, torch.float32))
    for batch in range(run.config.line_batches):
        generator = run.generator("line", batch)
        normal = torch.randn(BATCH + refs, len(root), generator=generator, dtype=root.dtype)
        centers = (normal @ root.T).to(run.device, torch.float32)
        x, seed = centers[:BATCH], generator.initial_seed()
        found.append(losses_at_ends(single, x, centers, sigma, seed, run.backend))
        noise = torch.randn(x.shape, generator=generator).to(x)
        counts.append(effective_centers(x + sigma * noise, centers, sigma, backend=run.backend).mean())
    return torch.stack(found), torch.stack(counts).mean().item()


def jackknife(found: Tensor) -> float:
    """Estimate the standard error of the zero of the gradient from minibatches, each left out in turn."""
    count = len(found)
    left_out = [minima((found.sum(0) - one) / (count - 1))[1] for one in found]
    return (count - 1) / math.sqrt(count) * torch.tensor(left_out).std().item()
