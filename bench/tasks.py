"""Tasks of the benchmarks: every op of `tests/support/ops.py`, alone and with its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.workloads import TAU
from tests.support.ops import BY_NAME, NUM_STEPS, OPS, Arithmetic, Op

HALF = (torch.bfloat16, torch.float16)
ONE_ROUNDING = 1e-2  # of a result in half precision


@dataclass(frozen=True)
class Task:
    """An op, or the op with its gradient in queries and reference points."""

    op: Op
    backward: bool = False

    @property
    def name(self) -> str:
        return self.op.table + (", forward and backward" if self.backward else "")

    @property
    def arithmetic(self) -> Arithmetic:
        return self.op.backward if self.backward else self.op.forward

    def tolerance(self, dtype: torch.dtype = torch.float32) -> float:
        """Relative error above which an answer of ours is wrong and its time means nothing."""
        if dtype in HALF:
            return ONE_ROUNDING
        return self.op.gradient_tolerance if self.backward else self.op.tolerance

    def with_gradient(self) -> Task:
        return Task(self.op, backward=True)


SCORE, MEAN, LOG_DENSITY = Task(BY_NAME["kde_score"]), Task(BY_NAME["kde_mean"]), Task(BY_NAME["kde_log_density"])
STEP, CHAIN, PASS = Task(BY_NAME["langevin_step"]), Task(BY_NAME["langevin_chain"]), Task(BY_NAME["flux_pass"])
WEIGHTS, AVERAGE = Task(BY_NAME["transition_weights"]), Task(BY_NAME["transition_average"])
RESIDUAL, KERNEL_AVERAGE = Task(BY_NAME["residual_gradient"]), Task(BY_NAME["kernel_average"])
FORWARD = tuple(Task(op) for op in OPS)
TASKS = {task.name: task for task in (*FORWARD, *(task.with_gradient() for task in FORWARD))}


def inputs_of(x: Tensor, refs: Tensor, sigma2: float) -> dict[str, Any]:
    """Inputs of every op by name, made from those of a density estimate `[groups, points, dimensions]`."""
    return {
        "x": x,
        "refs": refs,
        "per_query": sigma2,
        "per_group": sigma2,
        "tau": TAU,
        "h": TAU / NUM_STEPS,
        "xt": 0.9 * x.flip(1),  # of the points' own spread, each near another point's mean
        "values": x,
        "field": -x,
    }


def noise_of(op: Op, noise: Tensor) -> dict[str, Tensor]:
    """The op's noise by name, from its draws `[draws, groups, points, dimensions]`."""
    assert op.noise is not None
    return {op.noise: noise[0] if op.noise == "step_noise" else noise}
