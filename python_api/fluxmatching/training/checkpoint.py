"""Checkpoints that survive a kill at any moment, and damage of the newest file."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAST, PREVIOUS = "last.pt", "previous.pt"
ENTRIES = {"iteration", "options", "samples", "processes", "recent", "loss", "loss scale", "average", "optimizer"}

State = dict[str, Any]


class TrainingError(RuntimeError):
    """Training cannot continue; the message says at which iteration and why."""


class RefusedTypeError(Exception):
    """A sound file holds an object of a type that cannot be read safely."""


def check_readable(state: State) -> None:
    """Raise TypeError unless everything in `state` but its tensors can be read again with weights_only=True.

    A checkpoint is read that way because any other way would run code that a file contains.
    """
    for name, value in state.items():
        file = io.BytesIO()
        try:
            torch.save(_without_numbers(value), file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:  # whatever an object's own pickling raises
            raise not_kept(name, error) from error


def not_kept(name: str, error: Exception) -> TypeError:
    """Return an error that says what a checkpoint takes."""
    return TypeError(
        f"Trainer: {name!r} cannot be kept in a checkpoint, which takes tensors, Python's numbers, strings, "
        f"lists and dictionaries; convert what get_extra_state or state_dict returns: {_refused(error)}"
    )


def _without_numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(0, dtype=value.dtype, device="cpu")
    if isinstance(value, dict):
        return {key: _without_numbers(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_numbers, value))
    return value


def _refused(error: Exception) -> str:
    """Return the line of an error that names the type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or [type(error).__name__])[0]


def write_checkpoint(folder: Path, state: State) -> None:
    """Write `last.pt`; the file before it becomes `previous.pt`. Neither name ever holds a truncated file."""
    check_readable(state)
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


def read_newest_checkpoint(folder: Path) -> tuple[State, Path] | None:
    """Return the newest checkpoint that can be read and its file; None if there is none. Tensors are on the CPU.

    Raises:
        TrainingError: there are checkpoints, and none can be read; or a sound one holds a type that is refused.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        file = folder / name
        if not file.exists():
            continue
        try:
            state = _read(file)
        except RefusedTypeError as error:
            raise TrainingError(f"{file} is sound but holds a type that cannot be read safely: {error}") from error
        except Exception as error:  # a damaged file can raise anything
            problems.append(f"{name} ({type(error).__name__})")
            continue
        if problems:
            warnings.warn(f"Trainer: {problems[0]} in {folder} cannot be read; {name} is used", stacklevel=4)
        return state, file
    if problems:
        raise TrainingError(f"no checkpoint in {folder} can be read: {', '.join(problems)}")
    return None


def _read(file: Path) -> State:
    """Read a checkpoint after a check of its contents; `torch.load` alone accepts damaged numbers."""
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise OSError(f"{damaged} is damaged")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RefusedTypeError(_refused(error)) from error
    if not isinstance(state, dict) or not set(state) >= ENTRIES:
        raise KeyError("not a checkpoint of Trainer")
    return state
