"""The time a command may take."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from experiments.common.registry import Paused


@dataclass(frozen=True)
class Clock:
    """When a command has to stop."""

    deadline: float

    @staticmethod
    def start(minutes: float) -> Clock:
        """So many minutes from now; 0 for no limit."""
        return Clock(time.monotonic() + 60 * minutes if minutes else math.inf)

    @property
    def left(self) -> float:
        """Seconds, not negative."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self, what: str) -> None:
        """Raise Paused, saying what was to come, if the time is up."""
        if not self.left:
            raise Paused(f"the time is up before {what}")
