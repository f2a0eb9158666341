"""`Trainer` in several processes, as JSON lines.

torchrun --standalone --nproc-per-node 2 -m tests.programs.distributed_training STRATEGY FOLDER [ITERATIONS]

With ITERATIONS, only trains that far, with a checkpoint after every iteration: it is killed on the way.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from fluxmatching import FluxMatching, FluxOptions, Trainer, TrainingOptions

F64 = torch.float64
SIGMA = 0.7


def data() -> Tensor:
    return torch.randn(48, 2, dtype=F64, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()


def loss(field: nn.Module) -> FluxMatching:
    # The default of float64, a double backward, does not work on sharded parameters.
    options = FluxOptions(gather_across_ranks=True, second_derivatives="finite_difference")
    return FluxMatching(field, SIGMA, options)


class Unusual(nn.Module):
    """Parameters and buffers of unusual dtypes and memory layouts."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.full((3, 2), value).t())
        self.channels_last = nn.Parameter(torch.full((2, 3, 4, 4), value).to(memory_format=torch.channels_last))
        self.wave = nn.Parameter(torch.full((2,), value, dtype=torch.complex64))
        self.precise = nn.Parameter(torch.full((2,), value, dtype=F64))
        self.register_buffer("turned_buffer", torch.full((3, 2), value).t())
        self.register_buffer("repeated", torch.full((1,), value).expand(4))
        self.register_buffer("count", torch.tensor(int(value)))
        self.register_buffer("hidden", torch.full((2,), value), persistent=False)

    def forward(self, x: Tensor, *, seed: Tensor) -> Tensor:
        parts = [p.abs().square().mean().float() for p in self.parameters()]
        return x.float().mean() * sum(parts) + self.repeated.sum() * 0


class Drawing(nn.Module):
    """Remember a number of torch's generator per call, as dropout would use it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.numbers = nn.Parameter(torch.ones(2, dtype=F64)), []

    def forward(self, x: Tensor, *, seed: Tensor) -> Tensor:
        self.numbers.append(torch.rand(()))
        return (x * self.weight).square().mean()


def report(what: str, **values: Any) -> None:
    if distributed.get_rank() == 0:
        print(json.dumps({"what": what, **values}) + "\n", end="", flush=True)


def spread(tensors: list[Tensor]) -> float:
    """Return the largest difference of any entry between processes."""
    flat = torch.cat(
        [
            torch.view_as_real(t.resolve_conj()).flatten().double() if t.is_complex() else t.flatten().double()
            for t in map(Tensor.detach, tensors)
        ]
    )
    every = [torch.empty_like(flat) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, flat)
    return float((torch.stack(every) - every[0]).abs().max())


def flat(state: dict[str, Any]) -> list[float]:
    return torch.cat([v.flatten() for v in state.values() if isinstance(v, Tensor)]).tolist()


def different(a: Any, b: Any, name: str = "") -> list[str]:
    """Return the names of entries in which two nested states differ."""
    if isinstance(a, dict):
        return [found for key in {**a, **b} for found in different(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return different(dict(enumerate(a)), dict(enumerate(b)), name)
    same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
    return [] if same else [f"{name}: {a} {b}"]


def nested(module: nn.Module, mesh: Any) -> nn.Module:
    for part in [m for m in module.modules() if isinstance(m, nn.Linear)]:
        fully_shard(part, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])
    return module


def strategy(name: str) -> Any:
    if name != "nested":
        return name
    return ModelParallelStrategy(nested, data_parallel_size=int(os.environ["WORLD_SIZE"]), tensor_parallel_size=1)


def check_layouts(options: TrainingOptions) -> None:
    rank = distributed.get_rank()
    module = Unusual(1.0 + rank)
    trainer = Trainer(module, data(), options)
    tensors = [*module.parameters(), *module.buffers()]
    report("replicas at the start", error=spread(tensors))
    for _ in range(3):
        trainer.step()
    report("replicas after three steps", error=spread(tensors))
    report("gradients", error=spread([p.grad for p in module.parameters() if p.grad is not None]))


class Counted(nn.Module):
    """Change a buffer by the samples of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=F64))
        self.register_buffer("mean", torch.zeros(3, 2, dtype=F64).t())

    def forward(self, x: Tensor, *, seed: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.mean(0)[:, None])
        return (x * self.weight - self.mean[:, 0]).square().mean()


def check_buffers(options: TrainingOptions) -> None:
    module = Counted()
    trainer = Trainer(module, data(), options)
    errors = []
    for _ in range(2):
        trainer.step()
        errors.append(spread([module.mean, *trainer.average.module.buffers(), *module.parameters()]))
    report("buffers", error=max(errors))


def check_refusals(options: TrainingOptions) -> None:
    rank = distributed.get_rank()
    wide = nn.Sequential(nn.Linear(2, 8 + rank), nn.Linear(8 + rank, 2)).double()
    attempts: dict[str, Callable[[], Trainer]] = {
        "options": lambda: Trainer(loss(network()), data(), replace(options, lr=0.1 * (1 + rank), seed=rank)),
        "batch": lambda: Trainer(loss(network()), data(), replace(options, batch_size=4 - rank)),
        "samples": lambda: Trainer(loss(network()), data()[rank:], options),
        "architecture": lambda: Trainer(loss(wide), data(), options),
        "devices": lambda: Trainer(loss(network()), data(), replace(options, devices=1, num_nodes=1)),
    }
    for name, attempt in attempts.items():
        try:
            said = str(attempt())
        except ValueError as problem:
            said = f"ValueError: {problem}"
        every: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(every, said)
        report("refused", name=name, messages=every)


def main() -> None:
    warnings.simplefilter("ignore")
    name, folder = sys.argv[1:3]
    iterations = int(sys.argv[3]) if len(sys.argv) > 3 else 7
    processes = int(os.environ["WORLD_SIZE"])
    options = TrainingOptions(
        iterations, 24 // processes, accelerator="cpu", strategy=strategy(name), progress=False, log_every=3,
        checkpoint_every=1 if len(sys.argv) > 3 else 3, clip=0.5,
    )  # fmt: skip
    field = network()
    trainer = Trainer(loss(field), data(), options, folder=folder)
    trainer.run()
    if len(sys.argv) <= 3:
        check(trainer, name, options)
    distributed.barrier()  # meanwhile gloo's threads release the tensors of the last collective
    distributed.destroy_process_group()


def check(trainer: Trainer, name: str, options: TrainingOptions) -> None:
    """Report what a strategy made of the training; with "ddp" also what does not depend on the strategy."""
    processes = trainer.processes
    state = trainer.state_dict()
    resumed = Trainer(loss(network()), data(), options, folder=trainer.folder).state_dict()
    if trainer.rank == 0:
        report("loss", values=flat(state["loss"]))
        report("average", values=flat(state["average"]["parameters"]))
        report("resumed", different=different(state, resumed))
    if name == "ddp":
        few = TrainingOptions(3, 4, accelerator="cpu", progress=False)
        check_layouts(few)
        check_buffers(few)
        check_refusals(few)
        drawing = Drawing()
        Trainer(drawing, data(), TrainingOptions(4, 4, accelerator="cpu", progress=False)).run()
        drawn = [torch.empty(4) for _ in range(processes)]
        distributed.all_gather(drawn, torch.stack(drawing.numbers))
        report("own numbers", different=len(torch.cat(drawn).unique()), drawn=4 * processes)
        field = network().float()
        if trainer.rank:  # only the first process's parameters count
            nn.init.zeros_(field[0].weight)
        module = FluxMatching(field, SIGMA, FluxOptions(endpoint_fraction=0.5), refs=32)
        trainer = Trainer(
            module, data().float(), TrainingOptions(4, 4, accelerator="cpu", accumulate=2, progress=False)
        )
        trainer.run()
        newest = module.refs.newest
        assert newest is not None
        report("replicas with a reference set", error=spread([*module.parameters(), newest]), kept=len(newest))


if __name__ == "__main__":
    main()
