"""Results of training steps: printed, and kept in bench/results/<date>-<what>-<device>.md with their origin."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench import records
from bench.origin import Origin


def device_argument(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device of that name; ends with an error of the command line if it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch has no CUDA
        parser.error(f"--device {name} cannot be used: {str(error).splitlines()[0]}")
    return device


@contextmanager
def begin(what: str, device: torch.device, *, keep: bool = True) -> Iterator[Callable[[str], None]]:
    """Give a function that prints text; at the end keep all of it in place of the last results of that name."""
    lines: list[str] = []
    origin = Origin.here(device)

    def write(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    # The module, where Python was started with -m.
    started = getattr(sys.modules["__main__"], "__spec__", None)
    command = ["-m", started.name if started else Path(sys.argv[0]).stem, *sys.argv[1:]]
    write(f"`python {' '.join(command)}`, {origin.sentence()}\n")
    yield write
    if keep:
        kind = "gpu" if device.type == "cuda" else "cpu"
        records.keep_text(f"{what}-{kind}", "\n".join(lines) + "\n", origin.date, "md", records.RESULTS)
