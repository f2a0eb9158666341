"""Time limit of a command."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from experiments.common.registry import Paused


@dataclass(frozen=True)
class Clock:
    """Time at which a command has to stop."""

    deadline: float

    @staticmethod
    def start(minutes: float) -> Clock:
        """Start a limit of that many minutes; 0 for no limit."""
        return Clock(time.monotonic() + 60 * minutes if minutes else math.inf)

    @property
    def left(self) -> float:
        """Seconds left, not negative."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self, what: str) -> None:
        """Raise Paused, with the name of the next piece of work, if the time is up."""
        if not self.left:
            raise Paused(f"the time is up before {what}")
