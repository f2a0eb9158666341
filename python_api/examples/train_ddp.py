"""Train with DistributedDataParallel: torchrun --nproc-per-node 2 train_ddp.py.

The engine wraps the loss module. `gather_across_ranks` makes one density estimate from all minibatches.
"""

import os

import torch
from problem import Field, samples
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from fluxmatching import FluxOptions, LogUniformNoise, NoiseAnnealedFluxMatching

STEPS = 100


def main() -> None:
    on_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")

    data = samples(4096, torch.Generator().manual_seed(0)).to(device)
    options = FluxOptions(gather_across_ranks=True)
    loss_module = NoiseAnnealedFluxMatching(Field(), LogUniformNoise(0.05, 10.0), options).to(device)
    model = DistributedDataParallel(loss_module)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    order = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        joint = torch.randint(len(data), (256 * processes,), generator=order)
        x = data[joint.tensor_split(processes)[rank].to(device)]
        loss, _ = model(x, seed=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if rank == 0:
        print(f"loss {loss.item():.4g}, {processes} processes")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
