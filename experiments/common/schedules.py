"""Schedules of the learning rate, for `Trainer(lr_factor=...)`."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine_decay(steps: int) -> Callable[[int], float]:
    """Return the factor (1 + cos(π k/steps))/2 of step k = 0, 1, …: from 1 down to 0 at k = steps."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
