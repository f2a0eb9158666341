"""Couplings of the joint minibatch of several processes, as JSON lines.

torchrun --standalone --nproc-per-node 2 -m tests.programs.process tests.programs.couplings
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from fluxmatching import FlowMatching
from fluxmatching.flows.couplings import Coupling, ExactCoupling, IndependentCoupling, SinkhornCoupling, couple

SEED = 5
# Name of a case: the coupling, and how many samples of the source each process has for each sample of the data.
CASES: dict[str, tuple[Callable[..., Coupling], int]] = {
    "exact": (ExactCoupling, 1),
    "exact, larger source": (ExactCoupling, 2),
    "sinkhorn": (SinkhornCoupling, 1),
    "independent": (IndependentCoupling, 1),
    "independent, larger source": (IndependentCoupling, 3),
}


def minibatch(rank: int, times: int) -> tuple[Tensor, Tensor]:
    """Return x0 `[12 times, 2]` and x1 `[12, 2]` of one process; the sources of the processes hardly overlap."""
    generator = torch.Generator().manual_seed(rank)
    x0 = torch.randn(12 * times, 2, dtype=torch.float64, generator=generator) + 2 * rank
    return x0, torch.randn(12, 2, dtype=torch.float64, generator=generator)


def still(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x)


def from_all(value: Any) -> list[Any]:
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, value)
    return every


def report(what: str, **values: Any) -> None:
    if distributed.get_rank() == 0:
        print(json.dumps({"what": what, **values}) + "\n", end="", flush=True)


def message(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except (ValueError, RuntimeError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing"


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for name, (kind, times) in CASES.items():
        x0, x1 = minibatch(rank, times)
        for gather in (True, False):
            paired, kept = couple(kind(gather_across_ranks=gather), x0, x1, SEED)
            report("pairs", name=name, gather=gather, x0=from_all(paired.tolist()), kept=from_all(kept is x1))
    x0, x1 = minibatch(rank, 2)
    joint = ExactCoupling(gather_across_ranks=True)
    torch.manual_seed(rank)
    report("without a seed", x0=from_all(couple(joint, x0, x1)[0].tolist()))
    report("module", loss=from_all(FlowMatching(still, coupling=joint)(x1, seed=SEED)[0].item()))
    attempts: dict[str, Callable[[], Any]] = {
        "NaN in one process": lambda: couple(joint, x0, x1.where(torch.tensor(rank == 0), torch.nan), SEED),
        "shape": lambda: couple(joint, x0[rank:], x1, SEED),
        "seed": lambda: couple(joint, x0, x1, SEED + rank),
        "index": lambda: joint(x0, x1, seed=SEED),
    }
    for name, attempt in attempts.items():
        report("refused", name=name, messages=from_all(message(attempt)))
    distributed.barrier()  # meanwhile gloo's threads release the tensors of the last collective
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
