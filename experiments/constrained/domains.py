"""Bounded domains with exact geometry, and data on them: a box, a simplex and an annulus.

Every domain maps points to the nearest point of its boundary with the inward unit normal there, projects points onto
itself, and reflects points that have left it. All points are `[n, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

REFLECTIONS = 8  # mirrored at most so often; what is outside even then is projected


class Domain(Protocol):
    """Closed set of points and its boundary."""

    @property
    def dim(self) -> int:
        """D."""

    def inside(self, x: Tensor) -> Tensor:
        """Return whether points belong to the domain, `[n]`."""

    def nearest_boundary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return for points of the domain the nearest point of the boundary and the inward unit normal there."""

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest points of the domain."""

    def reflect(self, x: Tensor) -> Tensor:
        """Return points mirrored at the boundary until they are inside."""

    def outline(self, count: int) -> tuple[Tensor, Tensor]:
        """Return points at equal distances along the boundary and their inward unit normals; in the plane alone."""


@dataclass(frozen=True)
class Box:
    """[-1, 1]^D."""

    dim: int

    def inside(self, x: Tensor) -> Tensor:
        return (x.abs() <= 1).all(-1)

    def nearest_boundary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axis = x.abs().argmax(-1, keepdim=True)
        side = torch.where(x.gather(-1, axis) < 0, -1.0, 1.0).to(x)
        return x.scatter(-1, axis, side), torch.zeros_like(x).scatter(-1, axis, -side)

    def project(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    def reflect(self, x: Tensor) -> Tensor:
        return 1 - ((x + 1) % 4 - 2).abs()  # a triangle wave: any number of reflections

    def outline(self, count: int) -> tuple[Tensor, Tensor]:
        x, normal = torch.empty(4, count // 4, 2).double(), torch.zeros(4, count // 4, 2).double()
        along = (torch.arange(count // 4).double() + 0.5) * (8 / count) - 1
        for edge, (axis, side) in enumerate(((0, -1.0), (0, 1.0), (1, -1.0), (1, 1.0))):
            x[edge, :, axis], x[edge, :, 1 - axis], normal[edge, :, axis] = side, along, -side
        return x.flatten(0, 1), normal.flatten(0, 1)


class Simplex:
    """Parts b ≥ 0 that sum to 1, in D = parts - 1 orthonormal coordinates z about the center, b = 1/parts + E z.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        self.dim, parts = dim, dim + 1
        centered = torch.eye(parts).double() - 1 / parts
        self.basis = torch.linalg.qr(centered[:, :dim]).Q  # E, `[parts, D]`, columns orthonormal with sum zero
        self.length = math.sqrt(dim / parts)  # of a row of E, the gradient of a part

    def parts(self, x: Tensor) -> Tensor:
        """Return b, `[n, parts]`."""
        return x @ self.basis.to(x).T + 1 / (self.dim + 1)

    def coordinates(self, parts: Tensor) -> Tensor:
        """Return z of b."""
        return (parts - 1 / (self.dim + 1)) @ self.basis.to(parts)

    def inside(self, x: Tensor) -> Tensor:
        return (self.parts(x) >= -8 * torch.finfo(x.dtype).eps).all(-1)

    def nearest_boundary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        part, index = self.parts(x).min(-1, keepdim=True)
        normal = self.basis.to(x)[index.squeeze(-1)] / self.length
        return x - part / self.length * normal, normal

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest points, found by sorting the parts (Held, Wolfe and Crowder 1974)."""
        parts = self.parts(x)
        descending = parts.sort(-1, descending=True).values
        excess = (descending.cumsum(-1) - 1) / torch.arange(1, self.dim + 2).to(x)
        count = (descending > excess).sum(-1, keepdim=True)
        return self.coordinates((parts - excess.gather(-1, count - 1)).clamp_min(0))

    def reflect(self, x: Tensor) -> Tensor:
        for _ in range(REFLECTIONS):
            part, index = self.parts(x).min(-1, keepdim=True)
            normal = self.basis.to(x)[index.squeeze(-1)] / self.length
            x = x + 2 * part.clamp_max(0).abs() / self.length * normal
        return torch.where(self.inside(x).unsqueeze(-1), x, self.project(x))

    def outline(self, count: int) -> tuple[Tensor, Tensor]:
        share = ((torch.arange(count // 3).double() + 0.5) / (count // 3)).unsqueeze(-1)
        corners = self.coordinates(torch.eye(3).double())
        x = [share * corners[(face + 1) % 3] + (1 - share) * corners[(face + 2) % 3] for face in range(3)]
        normal = (self.basis / self.length).unsqueeze(1).expand(3, count // 3, 2)
        return torch.cat(x), normal.flatten(0, 1)


@dataclass(frozen=True)
class Annulus:
    """Points of the plane with a distance from the origin between `inner` and 1."""

    inner: float
    dim: int = 2

    def inside(self, x: Tensor) -> Tensor:
        radius = x.norm(dim=-1)
        return (radius >= self.inner * (1 - 1e-6)) & (radius <= 1 + 1e-6)

    def nearest_boundary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        radius = x.norm(dim=-1, keepdim=True)
        outer = radius > (1 + self.inner) / 2
        direction = x / radius
        return direction * torch.where(outer, 1.0, self.inner), direction * torch.where(outer, -1.0, 1.0)

    def project(self, x: Tensor) -> Tensor:
        radius = x.norm(dim=-1, keepdim=True)
        return x / radius * radius.clamp(self.inner, 1)

    def reflect(self, x: Tensor) -> Tensor:
        radius, width = x.norm(dim=-1, keepdim=True), 1 - self.inner
        folded = self.inner + width - ((radius - self.inner) % (2 * width) - width).abs()
        return x / radius * folded

    def outline(self, count: int) -> tuple[Tensor, Tensor]:
        outer = round(count / (1 + self.inner))
        x, normal = [], []
        for radius, sign, number in ((1.0, -1.0, outer), (self.inner, 1.0, count - outer)):
            angle = torch.arange(number).double() * (2 * torch.pi / number)
            direction = torch.stack([angle.cos(), angle.sin()], -1)
            x.append(radius * direction)
            normal.append(sign * direction)
        return torch.cat(x), torch.cat(normal)


@dataclass(frozen=True)
class Problem:
    """Data on a domain.

    Attributes:
        domain: the set that holds all data.
        sigma: noise level at which fields are trained.
        draw: makes `count` points of the data with a generator of the CPU, `[count, D]`, float64.
    """

    domain: Domain
    sigma: float
    draw: Callable[[int, torch.Generator], Tensor]


BOX_SPREAD = 0.4  # standard deviation of a component in the box, before it is cut off


def box_means(dim: int) -> Tensor:
    """Return means of the three components in the box: 0.7 cos(2π (c/3 + k/4)), `[3, D]`."""
    component = torch.arange(3).double().unsqueeze(-1)
    return 0.7 * (2 * torch.pi * (component / 3 + torch.arange(dim) / 4)).cos()


def draw_box(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draw a mixture of three normal distributions, cut off at the faces of the box."""
    mean = box_means(dim)[torch.randint(3, (count,), generator=generator)]
    uniform = torch.rand(count, dim, generator=generator, dtype=torch.float64)
    low, high = (torch.special.ndtr((side - mean) / BOX_SPREAD) for side in (-1.0, 1.0))
    return (mean + BOX_SPREAD * torch.special.ndtri(low + (high - low) * uniform)).clamp(-1, 1)


def draw_simplex(count: int, domain: Simplex, generator: torch.Generator) -> Tensor:
    """Draw a Dirichlet distribution whose parameters are 1, 2, 3, 1, 2, 3, ...: sums of exponential numbers."""
    alpha = torch.arange(domain.dim + 1) % 3 + 1
    uniform = torch.rand(count, domain.dim + 1, 3, generator=generator, dtype=torch.float64)
    used = torch.arange(3) < alpha.unsqueeze(-1)
    gamma = -(torch.where(used, uniform, 1.0).clamp_min(1e-300).log().sum(-1))
    return domain.coordinates(gamma / gamma.sum(-1, keepdim=True))


def draw_annulus(count: int, inner: float, generator: torch.Generator) -> Tensor:
    """Draw an angle with the density (1 + 0.8 cos θ)/2π by rejection, and a radius uniform in area."""
    found = torch.empty(0, dtype=torch.float64)
    while len(found) < count:
        proposed, level = torch.rand(2, 4 * count, generator=generator, dtype=torch.float64)
        angle = 2 * torch.pi * proposed
        found = torch.cat([found, angle[1.8 * level < 1 + 0.8 * angle.cos()]])
    angle = found[:count]
    radius = torch.rand(count, generator=generator, dtype=torch.float64).mul(1 - inner**2).add(inner**2).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def _make_problems() -> dict[str, Problem]:
    plane, many = Simplex(2), Simplex(20)
    return {
        "box": Problem(Box(2), 0.1, lambda n, g: draw_box(n, 2, g)),
        "simplex": Problem(plane, 0.08, lambda n, g: draw_simplex(n, plane, g)),
        "annulus": Problem(Annulus(0.4), 0.08, lambda n, g: draw_annulus(n, 0.4, g)),
        "box 20": Problem(Box(20), 0.05, lambda n, g: draw_box(n, 20, g)),
        "simplex 20": Problem(many, 0.003, lambda n, g: draw_simplex(n, many, g)),
    }


PROBLEMS = _make_problems()
