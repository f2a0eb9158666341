"""The quarter turn of the plane, which makes fields that circulate."""

from __future__ import annotations

import torch
from torch import Tensor


def quarter_turn(v: Tensor, dim: int = -1) -> Tensor:
    """Compute J v with J = [[0, -1], [1, 0]], a quarter turn counterclockwise along `dim`: shape of v."""
    first, second = v.unbind(dim)
    return torch.stack([-second, first], dim)
