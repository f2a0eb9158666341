"""Training on a GPU: no step waits for the device. Run by `make gpu`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fluxmatching import (
    DenoisingScoreMatching,
    EDMField,
    FluxMatching,
    FluxOptions,
    LearnedHorizon,
    LogNormalNoise,
    NoiseAnnealedFluxMatching,
    Trainer,
    TrainingOptions,
)
from tests.support.problems import smooth_field

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Network(nn.Module):
    """F(x, c_noise) of `EDMField`."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Dropout(dropout), nn.Linear(32, 2))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.net(torch.cat([x, c_noise[:, None]], 1))


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "flux": lambda: FluxMatching(smooth_field(2).float(), 0.5),
    "annealed flux": lambda: NoiseAnnealedFluxMatching(EDMField(Network(0.0))),
    "annealed flux, learned horizon": lambda: NoiseAnnealedFluxMatching(
        EDMField(Network(0.0)), options=FluxOptions(horizon=LearnedHorizon(), endpoint_fraction=0.5)
    ),
    "annealed flux, dropout": lambda: NoiseAnnealedFluxMatching(EDMField(Network(0.2))),
    "annealed flux, newest samples": lambda: NoiseAnnealedFluxMatching(EDMField(Network(0.0)), refs=256),
    "score matching": lambda: DenoisingScoreMatching(EDMField(Network(0.0)), LogNormalNoise()),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_wait_for_the_device(name: str, precision: str) -> None:
    """The loss is read when a row of the log is due, and values that are not finite are looked for there too."""
    options = TrainingOptions(10, 64, accelerator="cuda", precision=precision, progress=False)
    trainer = Trainer(LOSSES[name](), torch.randn(1024, 2), options)
    for _ in range(3):  # compilation, tuning, the first permutation
        trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [trainer.step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
