"""Time that the trainings of the experiments' presets would take here, from measured steps.

python -m bench.training.presets [--preset paper] [--device cuda] [--steps 5]

Data do not change the time of a step, so made ones stand for CIFAR-10 and CelebA.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.timing import medians
from experiments.common.objectives import OBJECTIVES
from experiments.common.run import Run
from experiments.fast_mixing import experiment as fast_mixing
from experiments.fast_mixing.mixture import make_trainer as make_mixture_trainer
from experiments.fast_mixing.mixture import trained as trained_on_mixture
from experiments.images import experiment as images
from experiments.images.datasets import Images
from experiments.images.training import make_trainer as make_images_trainer
from experiments.springs import experiment as springs
from experiments.springs.training import FULL, MASKS
from experiments.springs.training import OBJECTIVES as SPRINGS_OBJECTIVES
from experiments.springs.training import make_trainer as make_springs_trainer
from fluxmatching import Trainer

HEAD = "| preset | objective | time per step | GPU memory | iterations × trainings | training |\n" + 6 * "|---" + "|"


@dataclass(frozen=True)
class Training:
    """One training of a preset, and how many like it the preset has."""

    experiment: str
    objective: str
    iterations: int
    count: int
    make: Callable[[], Trainer]


def trainings(preset: str, device: torch.device, out: Path) -> Iterator[Training]:
    """All trainings of the three noise-annealed experiments, those of the fast-mixing mixture included."""

    def start(module: ModuleType, name: str, **changes: Any) -> Run:
        config = replace(module.EXPERIMENT.presets[preset], **changes)
        return Run(module.EXPERIMENT, preset, config, None, device, 0, out / name, progress=False)

    run = start(springs, "springs")
    for objective in SPRINGS_OBJECTIVES:
        make = partial(make_springs_trainer, run, objective, FULL, 0, iterations=10**9)
        yield Training("springs", objective, run.config.iterations, len(MASKS) * run.config.seeds, make)
    variants: list[tuple[str, ModuleType, int, dict[str, Any]]] = [
        ("images", images, 32, {}),
        ("fast_mixing", fast_mixing, 32, {}),
    ]
    if preset == "paper":
        variants.append(("images, CelebA", images, 64, {"dataset": "celeba64", "batch": 128, "chunk_size": 32}))
    for name, module, size, changes in variants:
        run = start(module, name, **changes)
        made = torch.randint(0, 256, (run.config.batch, 3, size, size), dtype=torch.uint8)
        for objective in OBJECTIVES if module is fast_mixing else images.TRAINED:
            make = partial(make_images_trainer, run, objective, Images(made, made, "made"), iterations=10**9)
            yield Training(name, objective, run.config.iterations, 1, make)
    run = start(fast_mixing, "mixture")
    for objective in trained_on_mixture(run.config):
        make = partial(make_mixture_trainer, run, objective, 0, iterations=10**9)
        yield Training("fast_mixing, mixture", objective, run.config.mixture_iterations, run.config.seeds, make)


def measured(preset: str, device: torch.device, num_steps: int) -> Iterator[dict[str, Any]]:
    """Yield a row per training; one that fails has its error's text instead of figures."""
    with tempfile.TemporaryDirectory() as folder:
        for training in trainings(preset, device, Path(folder)):
            row: dict[str, Any] = {name: value for name, value in vars(training).items() if name != "make"}
            try:
                row["seconds"], row["gigabytes"] = step_seconds(training.make(), device, num_steps)
            except Exception as problem:  # out of memory: the others stay
                row["failed"] = f"{type(problem).__name__}: {problem}"[:300]
            print(line(row), flush=True)
            yield row


def step_seconds(trainer: Trainer, device: torch.device, num_steps: int) -> tuple[float, float | None]:
    """Median time of a step after two, and the most GPU memory in GB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    (seconds,) = medians([trainer.step], num_steps, warm_up=2)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return seconds, memory


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    start = f"| {row['experiment']} | {row['objective']} |"
    if "failed" in row:
        return f"{start} {row['failed'].split(':')[0]} | – | {row['iterations']} × {row['count']} | – |"
    hours = row["seconds"] * row["iterations"] * row["count"] / 3600
    memory = "–" if row["gigabytes"] is None else f"{row['gigabytes']:.1f} GB"
    return f"{start} {1e3 * row['seconds']:.3g} ms | {memory} | {row['iterations']} × {row['count']} | {hours:.3g} h |"


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.training.presets", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="paper", choices=["smoke", "small", "paper"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    print(HEAD)
    for _ in measured(options.preset, torch.device(options.device), options.steps):
        pass


if __name__ == "__main__":
    main()
