"""Where the results of training steps go: bench/results/<date>-<what>-<device>.md, with the machine and the commit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench import records


def device_argument(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device of that name, or the command line's error if it is not here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch has no CUDA
        parser.error(f"--device {name} cannot be used: {str(error).splitlines()[0]}")
    return device


def machine(device: torch.device) -> str:
    """Where the device is, in a sentence."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return records.where(records.machine(), records.commit(), card)


@contextmanager
def begin(what: str, device: torch.device, *, keep: bool = True) -> Iterator[Callable[[str], None]]:
    """A function that prints text, and at the end keeps all of it in place of the last results of that name."""
    lines: list[str] = []

    def write(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    write(
        f"`python {' '.join(['-m', f'bench.training.{Path(sys.argv[0]).stem}', *sys.argv[1:]])}`, {machine(device)}\n"
    )
    yield write
    if keep:
        kind = "gpu" if device.type == "cuda" else "cpu"
        records.keep_text(f"{what}-{kind}", "\n".join(lines) + "\n", records.today(), "md", records.RESULTS)
