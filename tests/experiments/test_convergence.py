"""The comparison by hand, exact distances, resuming, and the smoke run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.common.distances import wasserstein2
from experiments.common.run import Run
from experiments.convergence import experiment as convergence
from experiments.convergence.training import METHODS, PROBLEMS, make_loss


def make_run(out: Path) -> Run:
    config = convergence.EXPERIMENT.presets["smoke"]
    return Run(convergence.EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


def test_wasserstein_distance_by_hand() -> None:
    x = torch.tensor([[[0.0], [0.0]], [[4.0], [0.0]]])
    y = torch.tensor([[[4.0], [3.0]], [[0.0], [1.0]]])
    assert wasserstein2(x, y) == pytest.approx(((9 + 1) / 2) ** 0.5)
    assert wasserstein2(x, x.flip(0)) == 0
    # One point against two: half of it moves to each.
    assert wasserstein2(torch.zeros(1, 1), torch.tensor([[1.0], [3.0]])) == pytest.approx(5**0.5)


def test_wasserstein_distance_of_shifted_normals_in_many_dimensions() -> None:
    x = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    assert wasserstein2(x, x + 0.3) == pytest.approx(0.3 * 50**0.5, rel=1e-6)


def test_difference_of_curves_by_hand() -> None:
    exact = [[0.0, 10.0], [2.0, 14.0]]  # means 1 and 12, deviations √2 and √8
    fast = [[2.0, 12.0], [4.0, 12.0]]  # means 3 and 12
    assert convergence.difference_of_curves(exact, fast) == pytest.approx(1.0)


def test_both_methods_see_the_same_numbers(tmp_path: Path) -> None:
    """Only the derivative differs, so the losses agree up to its error."""
    run, problem = make_run(tmp_path), PROBLEMS["mixture"]
    x = problem.data(32, torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for method in METHODS:
        torch.manual_seed(0)
        module = make_loss(run, "mixture", method, 0.5)
        loss, logged = module(x, seed=3)
        assert {"sigma", "tau"} < set(logged)
        losses.append(loss)
        parameters = list(module.field.parameters())
        gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]))
    torch.testing.assert_close(*losses, rtol=2e-3, atol=2e-3)
    assert not torch.equal(*gradients)


def test_smoke_run_and_its_summary(finished: Run) -> None:
    assert len(finished.rows("result")) == 2 * 2 * finished.config.seeds
    assert len(finished.rows("curve")) == 20 * 2 * 2 * finished.config.seeds
    assert {path.stem for path in finished.figures} == {"loss", "distance"}
    text = (finished.out / "summary.md").read_text()
    assert "mixture: final W2" in text
    assert "springs: final W2" in text


def test_an_interrupted_run_resumes(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = make_run(tmp_path)
    log, rows = cut.log, []

    def stop_late(**row: object) -> None:
        rows.append(row)
        if len(rows) == 70:  # amid a curve
            raise KeyboardInterrupt
        log(**row)

    monkeypatch.setattr(cut, "log", stop_late)
    with pytest.raises(KeyboardInterrupt):
        convergence.main(cut)
    resumed = make_run(tmp_path)
    convergence.main(resumed)

    def numbers(run: Run) -> list[dict[str, object]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in run.rows()]

    assert numbers(resumed) == numbers(finished)


@pytest.mark.parametrize(("name", "value"), [("seeds", 1), ("mixture_iterations", 19), ("springs_lr", 0.0)])
def test_bad_settings(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0|{name} must be at least"):
        convergence.Config(**{name: value})
