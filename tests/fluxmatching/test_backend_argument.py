"""Every loss hands its `backend=` to every op it calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fluxkernels as fk
from fluxmatching import LossNormalizer
from tests.support.losses import annealed_loss, flux_loss, score_matching_loss


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that ran on a second backend, which is the reference under another name."""
    names: list[str] = []

    class Recorder:
        def __getattr__(self, op: str) -> Callable[..., Any]:
            names.append(op)
            return getattr(fk.reference, op)

    recorder = Recorder()
    entry = fk.backend._Entry("recorder", (), lambda: None, lambda: recorder)
    monkeypatch.setitem(fk.backend._ENTRIES, "recorder", entry)
    # Whoever forgets to name it falls to an automatic choice that cannot run.
    monkeypatch.setenv(fk.backend.ENVIRONMENT, "triton")
    return names


def test_flux(ran: list[str]) -> None:
    x = torch.randn(4, 2)
    flux_loss(lambda z: -z, x, 0.7, backend="recorder")
    assert set(ran) == {"flux_pass", "residual_gradient", "transition_average"}
    flux_loss(lambda z: -z, x, 0.7, estimator="single_chain", backend="recorder")
    assert {"langevin_chain", "kde_backward"} <= set(ran)


def test_annealed_and_dsm(ran: list[str]) -> None:
    x = torch.randn(4, 2)
    annealed_loss(lambda z, s: -z, x, 0.5, LossNormalizer(), backend="recorder")
    score_matching_loss(lambda z: -z, x, 0.7, backend="recorder")
    assert set(ran) == {"flux_pass", "residual_gradient", "transition_average", "kde"}
