"""Train with Hugging Face Accelerate: accelerate launch train_accelerate.py."""

from typing import Any

import torch
from accelerate import Accelerator
from problem import Field, samples
from torch.utils.data import DataLoader

from fluxmatching import LogUniformNoise, NoiseAnnealedFluxMatching

EPOCHS = 6


def main() -> None:
    accelerator = Accelerator()
    loss_module = NoiseAnnealedFluxMatching(Field(), LogUniformNoise(0.05, 10.0))
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=2e-3)
    data: Any = samples(4096, torch.Generator().manual_seed(0))
    loader = DataLoader(data, batch_size=256, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(loss_module, optimizer, loader)

    for _ in range(EPOCHS):
        for x in loader:
            loss, _ = model(x)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    accelerator.print(f"loss {loss.item():.4g}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
