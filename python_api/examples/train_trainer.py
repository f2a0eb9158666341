"""Train with `Trainer` on one device, on eight GPUs, or on several machines; a run that is stopped resumes.

torchrun --nproc-per-node 8 train_trainer.py --folder runs/mixture
srun --nodes 4 --ntasks-per-node 8 python train_trainer.py --devices 8 --num-nodes 4 --folder runs/mixture
"""

import argparse

import torch
from problem import Field, samples

from fluxmatching import FluxOptions, LogUniformNoise, NoiseAnnealedFluxMatching, Trainer, TrainingOptions


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--num-nodes", default="auto")
    parser.add_argument("--strategy", default="auto", help="auto, ddp or fsdp")
    parser.add_argument("--folder", help="for checkpoints and metrics.csv, on a disk that all machines see")
    arguments = parser.parse_args()

    options = TrainingOptions(
        arguments.iterations, 256, lr=2e-3, ema=0.99, accelerator=arguments.accelerator,
        strategy=arguments.strategy,
        devices=arguments.devices if arguments.devices == "auto" else int(arguments.devices),
        num_nodes=arguments.num_nodes if arguments.num_nodes == "auto" else int(arguments.num_nodes),
    )  # fmt: skip
    loss_module = NoiseAnnealedFluxMatching(Field(), LogUniformNoise(0.05, 10.0), FluxOptions(gather_across_ranks=True))
    data = samples(65536, torch.Generator().manual_seed(0))
    trainer = Trainer(loss_module, data, options, folder=arguments.folder)
    trainer.run()
    trainer.fabric.print(f"{trainer.iteration} iterations, {trainer.processes} processes")
    if trainer.processes > 1:
        trainer.fabric.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
