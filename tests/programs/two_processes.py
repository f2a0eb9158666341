"""Losses and training in two processes, compared with one process and the joint minibatch, as JSON lines.

torchrun --standalone --nproc-per-node 2 tests/programs/two_processes.py FOLDER
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fluxmatching import FluxOptions, Trainer, TrainingOptions, flux_matching_loss
from fluxmatching.distributed import average_gradients

F64 = torch.float64
GATHERED = FluxOptions(gather_across_ranks=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()


def gradients(x: Tensor, **options: Any) -> Tensor:
    net = network()
    flux_matching_loss(net, x, 0.7, FluxOptions(**options), seed=3).mean().backward()
    if len(x) < 24:
        average_gradients(list(net.parameters()))
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def compare(name: str, got: Tensor, expected: Tensor) -> None:
    if distributed.get_rank() == 0:
        print(json.dumps({"what": name, "error": float((got - expected).norm() / expected.norm())}), flush=True)


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    x = torch.randn(24, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    mine = x[12 * rank : 12 * rank + 12]
    for options in (
        {}, {"second_derivatives": "finite_difference"}, {"estimator": "single_chain"}, {"endpoint_fraction": 0.3},
        {"chunk_size": 5}, {"divergence": "exact"}, {"endpoint_fraction": 0.01},
    ):  # fmt: skip
        compare(f"gathered {options}", gradients(mine, gather_across_ranks=True, **options), gradients(x, **options))
    # Kept local, the density estimate is another: of half the centers.
    compare("local", gradients(mine), gradients(x))

    try:
        flux_matching_loss(network(), mine, 0.1 + rank, GATHERED, seed=3)
        refused = 0.0
    except ValueError as error:
        refused = float("sigma must be the same in all processes, got values from 0.1 to 1.1" in str(error))
    compare("refused", torch.tensor(refused), torch.tensor(1.0))

    numbers: list[Tensor] = []

    def recorded(net: nn.Module, batch: Tensor, seed: Tensor) -> Tensor:
        numbers.append(torch.rand(()))
        return net(batch).square().sum(1)

    Trainer(network(), recorded, x, TrainingOptions(iterations=4, batch_size=6, progress=False)).run()
    drawn = [torch.empty(4) for _ in range(2)]
    distributed.all_gather(drawn, torch.stack(numbers))
    # Dropout's random numbers repeat neither from iteration to iteration nor from process to process.
    compare("own numbers", torch.tensor(float(len(torch.cat(drawn).unique()))), torch.tensor(8.0))

    def loss(net: nn.Module, batch: Tensor, seed: Tensor) -> Tensor:
        return flux_matching_loss(net, batch, 0.7, GATHERED, seed=seed)

    options = TrainingOptions(iterations=7, batch_size=6, progress=False, checkpoint_every=3, log_every=3)
    net = network()
    if rank == 1:  # only the first process's parameters count
        nn.init.zeros_(net[0].weight)
    trainer = Trainer(net, loss, x, options, folder=sys.argv[1])
    trainer.run()
    state = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    others = [torch.empty_like(state) for _ in range(2)]
    distributed.all_gather(others, state)
    compare("processes agree", others[0], others[1])
    resumed = Trainer(network(), loss, x, options, folder=sys.argv[1])
    compare("resumed", torch.cat([p.detach().flatten() for p in resumed.model.parameters()]), state)
    if rank == 0:
        print(json.dumps({"what": "state", "values": state.tolist()}), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
