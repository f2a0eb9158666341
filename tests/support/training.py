"""A small training run, for tests that look at one side of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fluxmatching import FluxMatching, Trainer, TrainingOptions

OPTIONS = TrainingOptions(
    iterations=12, batch_size=16, checkpoint_every=5, log_every=4, progress=False, ema=0.9, accelerator="cpu"
)


class ChangedLoss(FluxMatching):
    """Flux Matching whose result a function may change: change(result, x, seed)."""

    def __init__(self, field: nn.Module, change: Callable[..., Any] | None = None) -> None:
        super().__init__(field, sigma=0.7)
        self.change = change

    def forward(self, x: Tensor, *, seed: Any = None) -> Any:
        found = super().forward(x, seed=seed)
        return found if self.change is None else self.change(found, x, seed)


def model() -> nn.Sequential:
    """Make a network with dropout, the same one in every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2))


def loss(change: Callable[..., Any] | None = None) -> ChangedLoss:
    return ChangedLoss(model(), change)


def data() -> Tensor:
    return torch.randn(70, 2, generator=torch.Generator().manual_seed(1))


def trained(options: TrainingOptions = OPTIONS, **more: Any) -> Trainer:
    """Train to the end; further arguments go to the trainer."""
    trainer = Trainer(loss(), data(), options, **more)
    trainer.run()
    return trainer


def assert_same(a: Trainer, b: Trainer) -> None:
    """Compare parameters, moving averages and the state of the optimizer bit for bit."""
    assert a.iteration == b.iteration
    for first, second in ((a.loss, b.loss), (a.average, b.average)):
        for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
            assert torch.equal(p, q), name
    for p, q in zip(a.loss.parameters(), b.loss.parameters(), strict=True):
        for key, value in a.optimizer.state[p].items():
            assert torch.equal(value, b.optimizer.state[q][key])
