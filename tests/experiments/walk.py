"""A small experiment on which the framework of the experiments is tested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.__main__ import main
from experiments.common import figures, registry
from experiments.common.results import Figure, Result
from experiments.common.run import Run


@dataclass(frozen=True)
class Config:
    """Sizes of the walk.

    Args:
        steps: how many steps
        sigmas: noise levels
    """

    steps: int = 6
    lr: float = 0.1
    ema: bool = True
    label: str = "a|b"
    sigmas: tuple[float, ...] = (0.1, 0.5)
    window: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


class Walk:
    """A random walk, the state of which goes through the checkpoint. `stop_at` interrupts it once."""

    stop_at: int | None = None

    def __call__(self, run: Run) -> None:
        state = run.load_state() or {"step": 0, "x": torch.zeros(2)}
        done = {row["step"] for row in run.rows("step")}
        for step in run.bar(range(state["step"], run.config.steps), "walk"):
            x = state["x"] + run.config.lr * torch.randn(2, generator=run.generator("step", step))
            if step not in done:
                run.log(kind="step", step=step, norm=x.norm())
            if step == self.stop_at:  # after the row and before the checkpoint: the worst moment
                self.stop_at = None
                raise KeyboardInterrupt
            state = {"step": step + 1, "x": x}
            run.save_state(state)
        run.log(kind="end", norm=state["x"].norm(), label=run.config.label)
        figure, axes = figures.new_figure(3, 2)
        axes.plot([row["norm"] for row in run.rows("step")], color=figures.FLUX)
        figures.save(figure, run.figure("walk"))
        norm = run.rows("end")[0]["norm"]
        run.summary(
            [
                Result("|x| < 1e9", f"{norm:.3f}", "1.0", norm < 1e9),
                Result("impossible <b>", f"{norm:.3f}", "-1", norm < 0),
                Result("steps", str(run.config.steps)),
            ],
            [Figure(run.figure("walk"), "A walk [of 2-D].")],
            ["A note."],
        )


def make_run(walk: Walk, seed: int = 0) -> Run:
    experiment = registry.load_experiment("walk")
    return Run(experiment, "smoke", Config(), "torch", torch.device("cpu"), seed, Path("out"), progress=False)


def start(*more: str) -> int:
    return main(["run", "walk", "--preset", "smoke", "--backend", "torch", "--device", "cpu", "--quiet", *more])
