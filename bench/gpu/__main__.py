"""The check of a CUDA card: tests, then times of every run beside its baselines, into one dated JSON of bench/results.

python -m bench.gpu [--output FOLDER] [--skip-tests] [--minutes 7]     what `make gpu` runs

The exit status is 1 if a test fails, an error of ours is above its bound, or one of our ops fails. Whatever happens,
the JSON has what was measured until then.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.gpu.progress import Progress
from bench.gpu.worker import CARD_LOST
from bench.gpu.worker import main as work
from bench.origin import Origin

ROOT = Path(__file__).parents[2]
TESTS_SECONDS = 600  # after which the tests count as failed
# Seconds without a new result after which a process is ended: a kernel may hang, and a compiler may take minutes.
PATIENCE = 300
MOST_PROCESSES = 8
MOST_WORKERS = 12  # of the tests, which share the card's memory


def run_tests() -> dict[str, Any]:
    """The GPU's tests, in a process of their own; compiling for other cards needs none and is left out.

    They do not tune: that would compile each kernel three times, and the benchmarks do.
    """
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/fluxkernels/test_gpu.py",
        "tests/fluxmatching/test_gpu_training.py", "tests/fluxkernels/test_triton.py", "-k", "not compile_for",
    ]  # fmt: skip
    if importlib.util.find_spec("xdist"):  # most of the time goes into compilation, on one core
        command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1)), "--dist", "loadgroup"]
    environment = {**os.environ, "FLUXKERNELS_AUTOTUNE": "0"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=TESTS_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return {"passed": False, "summary": [str(problem)[:300]]}
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return {"passed": done.returncode == 0, "summary": done.stdout.strip().splitlines()[-1:]}


def supervise(file: Path, command: Sequence[str], patience: float = PATIENCE) -> None:
    """Run processes until one has taken all steps; each crash goes into the results, and the next step has its turn."""
    for _ in range(MOST_PROCESSES):
        begun = len(Progress.load(file).results["begun"])
        reason = run_process(file, command, patience)
        if reason is None:
            return
        progress = Progress.load(file)
        steps = progress.results["begun"]
        progress.results["crashes"].append({"step": steps[-1] if len(steps) > begun else "start", "reason": reason})
        progress.save()
        print(f"crash: {progress.results['crashes'][-1]}", flush=True)
        if len(steps) == begun:  # it does not even start
            return


def run_process(file: Path, command: Sequence[str], patience: float) -> str | None:
    """Reason why the process ended early, or None if it did all. The file must change once per `patience` seconds."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        changed, latest = time.monotonic(), file.stat().st_mtime_ns
        while True:
            try:
                status = process.wait(timeout=min(1.0, patience / 10))
            except subprocess.TimeoutExpired:
                if file.stat().st_mtime_ns != latest:
                    changed, latest = time.monotonic(), file.stat().st_mtime_ns
                if time.monotonic() - changed > patience:
                    return f"no result for {patience:.0f} s"
                continue
            if status == 0:
                return None
            return "the card was lost" if status == CARD_LOST else f"the process ended with status {status}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=records.RESULTS)
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--minutes", type=float, default=7, help="nothing further is measured after so long")
    parser.add_argument("--commit", help="commit of a copy without git")
    parser.add_argument("--continue", dest="file", type=Path, help=argparse.SUPPRESS)  # in a process that measures
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found: this check is for machines with an NVIDIA GPU")
    return options


def check(progress: Progress, options: argparse.Namespace, command: Sequence[str]) -> None:
    """Fill the file with results, until all are there or the user ends it."""
    try:
        if not options.skip_tests:
            progress.results["tests"] = run_tests()
            progress.save()
        supervise(progress.file, command)
    except KeyboardInterrupt:
        progress = Progress.load(progress.file)
        progress.results["interrupted"] = True
        progress.save()


def end(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    options = parse()
    if options.file:
        return work(Progress.load(options.file), options.deadline)
    begin = time.time()
    signal.signal(signal.SIGTERM, end)
    origin = Origin.here(torch.device("cuda"), options.commit)
    print(json.dumps(dict(origin.machine), indent=1), flush=True)
    progress = Progress.begin(origin, options.output.resolve())
    deadline = begin + 60 * options.minutes
    command = [
        sys.executable, "-m", "bench.gpu", "--continue", str(progress.file), "--deadline", str(deadline)
    ]  # fmt: skip
    check(progress, options, command)
    progress = Progress.load(progress.file)
    print(f"{progress.file} after {time.time() - begin:.0f} s; left out: {progress.results['left_out'] or 'none'}")
    if problems := progress.problems():
        sys.exit("failed:\n" + "\n".join(f"  {problem}" for problem in problems))


if __name__ == "__main__":
    main()
