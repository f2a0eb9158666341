"""The checks by name: the function that runs them, and what they do and found in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.reliability import correctness, resume, sanitizer, soak, wheels

Entry = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A check whose `run` returns an entry with "passed" and figures, or with "skipped" and the reason."""

    run: Callable[..., Entry]
    what: str
    describe: Callable[[Entry], str]


CHECKS = {
    "fuzz": Check(correctness.of_random_inputs, correctness.RANDOM, correctness.describe_random),
    "adversarial": Check(correctness.of_cases, correctness.ADVERSARIAL, correctness.describe_cases),
    "resume": Check(resume.check, resume.WHAT, resume.describe),
    "soak": Check(soak.check, soak.WHAT, soak.describe),
    "sanitizer": Check(sanitizer.check, sanitizer.WHAT, sanitizer.describe),
    "wheels": Check(wheels.check, wheels.WHAT, wheels.describe),
}
