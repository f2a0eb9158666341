"""Distributions of the time t in training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Times(Protocol):
    """Distribution of t on (0, 1), such as `UniformTimes` and `LogitNormalTimes`."""

    def quantile(self, uniform: Tensor, /) -> Tensor:
        """Return t with P(t' ≤ t) = uniform, elementwise."""


@dataclass(frozen=True)
class UniformTimes:
    """Uniform distribution on [start, end].

    Attributes:
        start, end: 0 ≤ start < end ≤ 1.
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"UniformTimes: 0 <= start < end <= 1 must hold, got {self.start} and {self.end}")

    def quantile(self, uniform: Tensor) -> Tensor:
        """Return t with P(t' ≤ t) = uniform, elementwise."""
        return _below_one(self.start + (self.end - self.start) * uniform)


@dataclass(frozen=True)
class LogitNormalTimes:
    """Logit-normal distribution, log(t/(1-t)) ~ N(mean, std²), with most times in the middle (Esser et al. 2024).

    Attributes:
        mean: of log(t/(1-t)); above 0 for more times near the data.
        std: positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                f"LogitNormalTimes: mean and std must be finite and std positive, got {self.mean} and {self.std}"
            )

    def quantile(self, uniform: Tensor) -> Tensor:
        """Return t with P(t' ≤ t) = uniform, elementwise."""
        return _below_one(torch.sigmoid(self.mean + self.std * torch.special.ndtri(uniform)))


def _below_one(t: Tensor) -> Tensor:
    """Return times that rounding has not moved to 1, where some paths have no velocity."""
    return t.clamp_max(1 - torch.finfo(t.dtype).eps / 2)


def check_distribution(function: str, times: object) -> Times:
    """Return `times` if it has a method quantile."""
    if isinstance(times, type) or not callable(getattr(times, "quantile", None)):
        raise TypeError(
            f"{function}: times must be a distribution with a method quantile, such as UniformTimes(), got {times!r}"
        )
    return times  # type: ignore[return-value]
