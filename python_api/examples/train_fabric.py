"""Train with Lightning Fabric, the network in bfloat16.

`Fabric(precision="bf16-mixed")` would round the data too; the plugin does not.
"""

import torch
from lightning_fabric import Fabric
from problem import Field, samples

from fluxmatching import LogUniformNoise, NoiseAnnealedFluxMatching
from fluxmatching.training import mixed_precision

STEPS = 100


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fabric = Fabric(accelerator=device, devices=1, plugins=[mixed_precision("bf16-mixed", device)])
    fabric.launch()
    loss_module = NoiseAnnealedFluxMatching(Field(), LogUniformNoise(0.05, 10.0))
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=2e-3)
    model, optimizer = fabric.setup(loss_module, optimizer)
    data = samples(4096, torch.Generator().manual_seed(0)).to(fabric.device)

    for step in range(STEPS):
        x = data[torch.randint(len(data), (256,), device=fabric.device)]
        loss, _ = model(x, seed=step)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
    fabric.print(f"loss {loss.item():.4g}")


if __name__ == "__main__":
    main()
