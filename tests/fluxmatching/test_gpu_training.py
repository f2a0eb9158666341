"""Training on a GPU: no step waits for the device. Run by `make gpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fluxmatching import (
    CosineFeatures,
    DenoisingScoreMatching,
    DualFluxMatching,
    EDMField,
    FlowMatching,
    FlowOptions,
    FluxMatching,
    FluxOptions,
    LearnedHorizon,
    LinearFeatures,
    LogNormalNoise,
    LossNormalizer,
    NoiseAnnealedFluxMatching,
    QuadraticFeatures,
    Trainer,
    TrainingOptions,
    UniformTimes,
    VariancePreservingPath,
    VFluxMatching,
    dual_flux_loss,
    quadratic_flux_loss,
)
from tests.support.problems import smooth_field

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


TIMES, CLASSES = UniformTimes(0.1, 0.9), 3


class Network(nn.Module):
    """F(x, c_noise) of `EDMField`, and v(x, t) or v(x, t, labels) of a flow."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Dropout(dropout), nn.Linear(32, 2))

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        number = c_noise if labels is None else c_noise + labels
        return self.net(torch.cat([x, number[:, None]], 1))


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "flux": lambda: FluxMatching(smooth_field(2).float(), 0.5),
    "annealed flux": lambda: NoiseAnnealedFluxMatching(EDMField(Network(0.0))),
    "annealed flux, learned horizon": lambda: NoiseAnnealedFluxMatching(
        EDMField(Network(0.0)), options=FluxOptions(horizon=LearnedHorizon(), endpoint_fraction=0.5)
    ),
    "annealed flux, dropout": lambda: NoiseAnnealedFluxMatching(EDMField(Network(0.2))),
    "annealed flux, newest samples": lambda: NoiseAnnealedFluxMatching(EDMField(Network(0.0)), refs=256),
    "dual flux": lambda: DualFluxMatching(smooth_field(2).float(), [LinearFeatures(), QuadraticFeatures()]),
    "score matching": lambda: DenoisingScoreMatching(EDMField(Network(0.0)), LogNormalNoise()),
    "score matching, one level": lambda: DenoisingScoreMatching(smooth_field(2).float(), 0.5),
    "flow": lambda: FlowMatching(Network(0.2)),
    "flow between data": lambda: FlowMatching(Network(0.0), source=torch.randn(512, 2)),
    "flow, noise of a variance-preserving path": lambda: FlowMatching(
        Network(0.0), FlowOptions(path=VariancePreservingPath(), prediction="noise", error="velocity", times=TIMES)
    ),
    "flow, stable target": lambda: FlowMatching(
        Network(0.0), FlowOptions(stable_target=True, times=TIMES), refs=torch.randn(512, 2)
    ),
    "v-flux": lambda: VFluxMatching(Network(0.0), times=TIMES),
    "v-flux, learned": lambda: VFluxMatching(
        Network(0.0),
        options=FluxOptions(horizon=LearnedHorizon(), endpoint_fraction=0.5),
        times=TIMES,
        normalizer=LossNormalizer(),
        refs=256,
    ),
}
LABELED: dict[str, Callable[[], nn.Module]] = {
    "flow": lambda: FlowMatching(Network(0.0), FlowOptions(num_classes=CLASSES)),
    "flow, stable target": lambda: FlowMatching(
        Network(0.0),
        FlowOptions(num_classes=CLASSES, stable_target=True, times=TIMES),
        refs=[torch.randn(100 + k, 2) for k in range(CLASSES)],
    ),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_wait_for_the_device(name: str, precision: str) -> None:
    """The loss is read when a row of the log is due, and values that are not finite are looked for there too."""
    check_that_no_step_waits(LOSSES[name](), torch.randn(1024, 2), precision)


@pytest.mark.parametrize("name", LABELED)
def test_a_step_with_labels_does_not_wait_for_the_device(name: str) -> None:
    data = TensorDataset(torch.randn(1024, 2), torch.arange(1024) % CLASSES)
    check_that_no_step_waits(LABELED[name](), data, "32-true")


def check_that_no_step_waits(loss: nn.Module, data: Any, precision: str) -> None:
    """Train some iterations in a mode in which PyTorch raises an error where the host waits."""
    options = TrainingOptions(10, 64, accelerator="cuda", precision=precision, progress=False)
    trainer = Trainer(loss, data, options)
    for _ in range(3):  # compilation, tuning, the first permutation
        trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [trainer.step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


def test_dual_losses_on_the_device_are_those_of_the_cpu() -> None:
    x = torch.randn(4096, 5) @ torch.randn(5, 5) + 3
    field, on_device = smooth_field(5), x.cuda()
    features = [LinearFeatures(), QuadraticFeatures(), CosineFeatures.draw(x.double(), 40)]
    wanted = dual_flux_loss(field, x.double(), features), quadratic_flux_loss(field, x.double())
    field, features[2] = field.float().cuda(), CosineFeatures.draw(on_device, 40)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dual = dual_flux_loss(field, on_device, features)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = dual, quadratic_flux_loss(field, on_device)  # which waits: torch.linalg.eigh does
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
