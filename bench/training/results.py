"""Where the results of training steps go: bench/results/<date>-<what>-<device>.md, with the machine and the commit."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def device_argument(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device of that name, or the command line's error if it is not here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch has no CUDA
        parser.error(f"--device {name} cannot be used: {str(error).splitlines()[0]}")
    return device


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def keep_json(kind: str, results: dict[str, Any], document: str = "") -> None:
    """Results, and a document of them, in place of the last of their kind: bench/results/<date>-<kind>.json, .md."""
    for ending, text in (("json", json.dumps(results, indent=1) + "\n"), ("md", document)):
        if text:
            for old in RESULTS.glob(f"*-{kind}.{ending}"):
                old.unlink()
            (RESULTS / f"{results['date']}-{kind}.{ending}").write_text(text)


def commit() -> str:
    """What is checked out, "-dirty" if it was changed since."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def machine(device: torch.device) -> str:
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{where}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, commit "
        f"{commit()}."
    )


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
        for old in RESULTS.glob(f"*-{what}-{kind}.md"):
            old.unlink()
        (RESULTS / f"{today()}-{what}-{kind}.md").write_text("\n".join(lines) + "\n")
