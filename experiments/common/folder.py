"""The rule that a folder belongs to one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from experiments.common.registry import UsageError
from experiments.common.run import FILES, FOLDERS, is_finished, read_config

LOCK = ".lock"  # held while a run writes; the system releases it when the process ends, however it ends


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it does not exist.

    Raises:
        UsageError: another run is in it, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"another run is writing to {folder}; wait for it, or give another --out") from None
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def prepare_folder(out: Path, description: dict[str, Any], restart: bool) -> str:
    """Decide what a run of this description may do in the folder `out`; `restart` first deletes a run there.

    Returns:
        "new", "resume" (the same run began there) or "finished" (and ended there).

    Raises:
        UsageError: the folder holds files that are not of a run, or another run and `restart` is not set.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; choose another --out")
    # The temporary file alone is what a kill in the first instant leaves.
    if not out.exists() or {path.name for path in out.iterdir()} <= {"config.json.tmp", LOCK}:
        return "new"
    found = read_config(out)
    if found is None:
        raise UsageError(f"{out} is not empty and holds no config.json of a run; choose another --out")
    if restart:
        remove_run(out)
        return "new"
    there, here = _identity(found), _identity(description)
    differ = [
        f"{key} {there.get(key, 'absent')} there, {here.get(key, 'absent')} now"
        for key in dict.fromkeys([*here, *there])
        if there.get(key) != here.get(key)
    ]
    if differ:
        ways = "give another folder with --out, or delete that run with --restart"
        raise UsageError(f"{out} holds a different run ({'; '.join(differ)}); {ways}")
    return "finished" if is_finished(out) else "resume"


def remove_run(out: Path) -> None:
    """Delete what a run writes, and nothing else. config.json goes last, so that a kill can be repeated."""
    for name in FOLDERS:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in reversed(FILES):
        (out / f"{name}.tmp").unlink(missing_ok=True)
        (out / name).unlink(missing_ok=True)


def _identity(description: dict[str, Any]) -> dict[str, str]:
    """Return the entries in which two parts of one run must agree."""
    entries = {key: description[key] for key in ("experiment", "preset", "seed")}
    entries["backend"] = description["backend"]["resolved"]
    entries["device"] = torch.device(description["device"]).type
    entries |= {f"config.{key}": value for key, value in description["config"].items()}
    return {key: json.dumps(value) for key, value in entries.items()}  # as text, so that nan equals nan
