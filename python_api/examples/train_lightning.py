"""Train as a LightningModule."""

from typing import Any

import pytorch_lightning as lightning
import torch
from problem import Field, samples
from torch import Tensor
from torch.utils.data import DataLoader

from fluxmatching import LogUniformNoise, NoiseAnnealedFluxMatching

STEPS = 100


class FluxMatchingTask(lightning.LightningModule):
    """Noise-annealed Flux Matching of a field."""

    def __init__(self, field: torch.nn.Module) -> None:
        super().__init__()
        self.loss_module = NoiseAnnealedFluxMatching(field, LogUniformNoise(0.05, 10.0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss, logged = self.loss_module(batch)
        self.log_dict({f"train/{name}": value for name, value in logged.items()})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    data: Any = samples(4096, torch.Generator().manual_seed(0))
    trainer = lightning.Trainer(
        max_steps=STEPS, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(FluxMatchingTask(Field()), DataLoader(data, batch_size=256, shuffle=True, drop_last=True))
    print(f"loss {trainer.callback_metrics['train/loss'].item():.4g}")


if __name__ == "__main__":
    main()
