"""Programs of the tests, run in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROCESSES = min(8, os.cpu_count() or 1)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a program: the packages of this checkout, one thread, and `more`."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python_api"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def run(module: str, arguments: Sequence[object], more: dict[str, str]) -> list[dict[str, Any]]:
    """Run a module and return the JSON lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def run_in_parts(module: str, *arguments: object, **more: str) -> list[dict[str, Any]]:
    """Run a module whose last arguments are PART PARTS, with its work shared out over processes."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = [pool.submit(run, module, (*arguments, k, PROCESSES), more) for k in range(PROCESSES)]
        return [row for part in parts for row in part.result()]


def started(processes: int, *arguments: object) -> subprocess.Popen[str]:
    """Start a program under torchrun."""
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes), "-m", "tests.programs.process", *map(str, arguments),
    ]  # fmt: skip
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows_of(processes: int, *arguments: object) -> list[dict[str, Any]]:
    """Run a program under torchrun and return the JSON lines that its processes print."""
    process = started(processes, *arguments)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-4000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]
