"""Trainings killed at random moments and started again, compared bit for bit with ones that were not.

python -m bench.reliability.resume FOLDER SEED ITERATIONS THREADS     one training; goes on from what is in FOLDER
"""

from __future__ import annotations

import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fluxmatching import FluxMatching, FluxOptions, Trainer, TrainingOptions, UniformHorizon
from fluxmatching.training.checkpoint import LAST

ROOT = Path(__file__).parents[2]
ITERATIONS = 400
SIGMA = math.sqrt(0.5)
MOST_KILLS = 3
WHAT = "trainings killed by SIGKILL at random moments and started again, against ones that were not"


def train(folder: Path, seed: int, iterations: int) -> None:
    """Dropout, warm-up, moving average and all; a checkpoint every one to seven iterations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        field = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Dropout(0.1), nn.Linear(32, 2))
        data = torch.randn(300, 2)
    options = TrainingOptions(
        iterations, batch_size=64, warmup=20, seed=seed, checkpoint_every=1 + seed % 7, log_every=20,
        accelerator="cpu", progress=False,
    )  # fmt: skip
    loss = FluxMatching(field, SIGMA, FluxOptions(horizon=UniformHorizon()))
    Trainer(loss, data, options, folder=folder).run()


def train_and_kill(folder: Path, seed: int, iterations: int, seconds: float | None) -> bool:
    """Train in a process of its own; True if it was killed that long after its start, False if it came to its end."""
    arguments = [str(folder), str(seed), str(iterations), str(torch.get_num_threads())]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "bench.reliability.resume", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    printed = process.stdout.readline()  # the imports before it are no moment of the training
    try:
        printed += process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the training of seed {seed} ended with {process.returncode}: {printed[-2000:]}")
    return process.returncode != 0


def same(a: Any, b: Any) -> bool:
    """True if two states of a run have the same numbers, to the last bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def trial(folder: Path, seed: int, iterations: int = ITERATIONS) -> tuple[int, bool]:
    """Number of times that a training was killed; True if its last checkpoint is that of one that was not."""
    begin = time.perf_counter()
    train(folder / "whole", seed, iterations)
    seconds = time.perf_counter() - begin
    rng, kills = random.Random(seed), 0
    planned = rng.randint(1, MOST_KILLS)
    while train_and_kill(folder / "parts", seed, iterations, rng.uniform(0, seconds) if kills < planned else None):
        kills += 1
    whole, parts = (torch.load(folder / run / LAST, weights_only=True) for run in ("whole", "parts"))
    return kills, same(whole, parts)


def check(trials: int) -> dict[str, Any]:
    kills, different = 0, []
    for seed in tqdm(range(trials), desc="trials"):
        with TemporaryDirectory() as folder:
            killed, identical = trial(Path(folder), seed)
        kills += killed
        different += [] if identical else [seed]
    return {
        "passed": kills > 0 and not different,
        "trials": trials,
        "kills": kills,
        "identical": trials - len(different),
        "different_seeds": different,
    }


def describe(entry: dict[str, Any]) -> str:
    return f"{entry['identical']} of {entry['trials']} identical bit for bit, after {entry['kills']} kills"


if __name__ == "__main__":
    where, *numbers = sys.argv[1:]
    seed, iterations, threads = map(int, numbers)
    torch.set_num_threads(threads)
    print("started", flush=True)
    train(Path(where), seed, iterations)
