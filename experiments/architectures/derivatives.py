"""Input derivatives of a field, beside those of the exact score.

The denoiser D(z) = z + σ² f(z) has the Jacobian I + σ² J_f, without the part -I/σ² that every field gets from its
preconditioning. Errors of first derivatives are in units of the size of the exact one. Second derivatives enter the
loss through the gradient of the residual, ∇r = ∇(∇·f) + J_fᵀ s + J_s f - ∇(∇·s + |s|²). It is zero for every field that
keeps the law in place, the score or another one. Its units are the size of the last term, which is ∇r of f = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.architectures.problem import PIXELS, ExactScore, places, spread
from experiments.architectures.quality import noisy
from experiments.common.run import Run
from fluxmatching.fields import Field, NoisyField
from fluxmatching.losses.second_derivatives import endpoint_gradient

MOVE = 0.03  # standard deviation of the move of a pixel under which derivatives should hardly change, in units of σ
CHUNK = 128  # rows of Jacobians that go through a network at once


def by_pixel(z: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat points `[n, 1, 8, 8]` once per pixel, beside the unit vector of that pixel: two `[64 n, 1, 8, 8]`."""
    points = z.repeat_interleave(PIXELS, 0)
    return points, torch.eye(PIXELS, dtype=z.dtype, device=z.device).repeat(len(z), 1).reshape(points.shape)


def jacobian(field: Field, z: Tensor) -> Tensor:
    """Compute J_f at points z, `[n, 1, 8, 8]`: `[n, 64, 64]`."""
    found = []
    for part, unit in zip(*(tensor.split(CHUNK) for tensor in by_pixel(z)), strict=True):
        rows = part.detach().requires_grad_()
        found += torch.autograd.grad(field(rows), rows, unit)
    return torch.cat(found).reshape(len(z), PIXELS, PIXELS)


def divergence_gradient(field: Field, z: Tensor) -> Tensor:
    """Compute ∇(∇·f) at points z, shape of z, with the pixels beside each other in place of one after the other."""
    points, units = by_pixel(z)
    nothing = torch.zeros_like(points)
    found, _ = endpoint_gradient(field, points, nothing, units, method="double_backward", chunk_size=CHUNK)
    return found.reshape(len(z), PIXELS, *z.shape[1:]).sum(1)


def size(tensor: Tensor) -> Tensor:
    """Return the root of the mean over the first dimension of the squared norm, `[]`."""
    return tensor.square().sum().div(len(tensor)).sqrt()


def seam_pairs(token: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Find neighboring pixels with a seam between them, and those within a token: two masks `[64, 64]`."""
    place = places()
    neighbors = torch.cdist(place, place) == 1
    cell = place // torch.tensor(token)
    same = (cell[:, None] == cell[None]).all(2)
    return neighbors & ~same, neighbors & same


def first_derivatives(field: Field, exact: ExactScore, z: Tensor, move: Tensor) -> tuple[dict[str, float], Tensor]:
    """Compare Jacobians of the denoisers.

    Args:
        field: f(z) at the noise level of `exact`.
        exact: the exact score.
        z: points.
        move: tiny displacements of them, shape of z.

    Returns:
        "size" and "error" of the Jacobian, its "asymmetry", "change" under the moves and "exact_change" of the exact
        one, all in units of the exact size. "roughness": error of the Jacobian over error of the denoiser, times
        √(σ² + σ_data²): how fast the error varies, whatever its size. And the root mean square errors of the entries,
        `[64, 64]`.
    """
    variance = exact.sigma**2
    identity = torch.eye(PIXELS).to(z)
    found, true = (identity + variance * j for j in (jacobian(field, z), exact.jacobian(z)))
    moved, true_moved = (identity + variance * j for j in (jacobian(field, z + move), exact.jacobian(z + move)))
    numbers = {
        "size": size(found),
        "error": size(found - true),
        "asymmetry": size(found - found.mT),
        "change": size(moved - found),
        "exact_change": size(true_moved - true),
    }
    relative = {name: (n / size(true)).item() for name, n in numbers.items()}
    error = variance * (field(z) - exact(z))
    relative["roughness"] = field_length(exact.sigma) * (size(found - true) / size(error)).item()
    return relative, (found - true).square().mean(0).sqrt()


def second_derivatives(field: Field, exact: ExactScore, z: Tensor, probe: Tensor) -> dict[str, float]:
    """Compare the gradient of the divergence, and of the residual.

    Args:
        field: f(z) at the noise level of `exact`.
        exact: the exact score.
        z: points.
        probe: random signs, shape of z.

    Returns:
        "second", size of ∇(∇·f); "second_error", that of its error; "exact_second", that of the exact one;
        "residual", size of ∇r; "probe_noise", size of ∇(εᵀ J_f ε) - ∇(∇·f), and "exact_probe_noise"; all in units of
        ∇r of f = 0.
    """
    nothing, score = torch.zeros_like(z), exact(z)
    divergence = divergence_gradient(field, z)
    pulled, f = endpoint_gradient(field, z, score, probe, method="double_backward")
    probed, _ = endpoint_gradient(field, z, nothing, probe, method="double_backward")
    true, _ = exact.endpoint_gradient(z, nothing, None)
    true_probed, _ = exact.endpoint_gradient(z, nothing, probe)
    j_s = exact.jacobian(z)

    def turned(v: Tensor) -> Tensor:
        return torch.einsum("nij,nj->ni", j_s, v.flatten(1)).reshape(v.shape)

    unit = true + 2 * turned(score)  # ∇(∇·s + |s|²)
    numbers = {
        "second": divergence,
        "second_error": divergence - true,
        "exact_second": true,
        "residual": divergence + (pulled - probed) + turned(f) - unit,
        "probe_noise": probed - divergence,
        "exact_probe_noise": true_probed - true,
    }
    return {name: (size(n) / size(unit)).item() for name, n in numbers.items()}


def field_length(sigma: float) -> float:
    """Return the length over which a field varies, √(σ² + σ_data²): that of the loss, where it is below 16 σ."""
    return float((sigma**2 + spread() ** 2) ** 0.5)


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw random signs in the shape of `like`."""
    return (2 * torch.randint(2, like.shape, generator=generator) - 1).to(like)


def measure(run: Run, field: NoisyField, sigma: float, token: tuple[int, int]) -> dict[str, float]:
    """Measure all derivatives at points of p_σ.

    Args:
        run: settings and random numbers.
        field: f(z, σ), which computes in float32: the derivatives in `precision` err by far less than fields do.
        sigma: σ.
        token: height and width of a token, between which seams are searched for.

    Returns:
        What `first_derivatives` and `second_derivatives` return, and "seam": error of the entries of the Jacobian
        between neighboring pixels with a seam between them, over that between neighbors within a token; nan for tokens
        of one pixel.
    """
    exact, level = ExactScore(sigma), torch.tensor(sigma, device=run.device)
    _, z = noisy(run, run.config.points, sigma, "points", str(sigma))
    generator = run.generator("probes", str(sigma))
    move = MOVE * sigma * torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z)

    def at_level(points: Tensor) -> Tensor:
        return field(points.float(), level).double()

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has first derivatives alone
        first, errors = first_derivatives(at_level, exact, z, move)
        second = second_derivatives(at_level, exact, z, signs(z, generator))
    across, inside = seam_pairs(token)
    seam = size(errors.cpu()[across]) / size(errors.cpu()[inside])
    return {**first, **second, "seam": seam.item()}
