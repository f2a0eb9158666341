"""Checkpoints that survive a kill at any moment, and damage of the newest file."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

LAST, PREVIOUS = "last.pt", "previous.pt"
ENTRIES = {"iteration", "options", "samples", "processes", "recent", "model", "average", "optimizer"}

State = dict[str, Any]


class TrainingError(RuntimeError):
    """Training cannot continue; the message says at which iteration and why."""


def write_checkpoint(folder: Path, state: State) -> None:
    """Write `last.pt`; the file before it becomes `previous.pt`. Neither name ever holds a truncated file."""
    part = folder / f"part-{os.getpid()}.pt"
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    last = folder / LAST
    if last.exists():
        last.replace(folder / PREVIOUS)
    part.replace(last)


def remove_partial_checkpoints(folder: Path) -> None:
    """Delete what a process that was killed while writing left behind."""
    for part in folder.glob("part-*.pt"):
        part.unlink()


def read_newest_checkpoint(folder: Path, device: torch.device) -> tuple[State, Path] | None:
    """Return the newest checkpoint that can be read and its file; None if there is none.

    Raises:
        TrainingError: there are checkpoints, and none can be read.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        file = folder / name
        if not file.exists():
            continue
        try:
            state = _read(file, device)
        except Exception as error:  # a damaged file can raise anything
            problems.append(f"{name} ({type(error).__name__})")
            continue
        if problems:
            warnings.warn(f"Trainer: {problems[0]} in {folder} cannot be read; {name} is used", stacklevel=4)
        return state, file
    if problems:
        raise TrainingError(f"no checkpoint in {folder} can be read: {', '.join(problems)}")
    return None


def _read(file: Path, device: torch.device) -> State:
    """Read a checkpoint after a check of its contents; `torch.load` alone accepts damaged numbers."""
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise OSError(f"{damaged} is damaged")
    state = torch.load(file, map_location=device, weights_only=True)
    if not isinstance(state, dict) or not set(state) >= ENTRIES:
        raise KeyError("not a checkpoint of Trainer")
    return state
