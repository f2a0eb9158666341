"""The checks by name: what runs them, what they do in words, and their figures in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.reliability import correctness, resume, sanitizer, soak, wheels

Entry = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """`run` gives an entry with "passed" and figures, or with "skipped" and the reason why it cannot run."""

    run: Callable[..., Entry]
    what: str
    say: Callable[[Entry], str]


CHECKS = {
    "fuzz": Check(correctness.of_random_inputs, correctness.RANDOM, correctness.say_random),
    "adversarial": Check(correctness.of_cases, correctness.ADVERSARIAL, correctness.say_cases),
    "resume": Check(resume.check, resume.WHAT, resume.say),
    "soak": Check(soak.check, soak.WHAT, soak.say),
    "sanitizer": Check(sanitizer.check, sanitizer.WHAT, sanitizer.say),
    "wheels": Check(wheels.check, wheels.WHAT, wheels.say),
}
