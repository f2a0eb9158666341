"""Two processes under torchrun do what one does with the joint minibatch."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxmatching import Trainer, TrainingOptions
from tests.programs.two_processes import F64, network
from tests.support.losses import flux_loss

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python_api"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "tests/programs/two_processes.py", str(folder)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["what"]: row for row in rows}


def test_gradients_are_those_of_the_joint_minibatch(found: dict[str, dict[str, Any]]) -> None:
    errors = {what: row["error"] for what, row in found.items() if what.startswith("gathered")}
    assert len(errors) == 7
    # A share of 0.01 of 24 is one end: one process differentiates nothing at all.
    assert all(error < 1e-12 for error in errors.values()), errors


def test_without_gathering_the_estimates_are_the_processes_own(found: dict[str, dict[str, Any]]) -> None:
    assert found["local"]["error"] > 1e-3


def test_training_ends_where_one_process_with_twice_the_minibatch_ends(
    found: dict[str, dict[str, Any]], folder: Path
) -> None:
    x = torch.randn(24, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        network(), lambda net, batch, seed: flux_loss(net, batch, 0.7, seed=seed), x,
        TrainingOptions(iterations=7, batch_size=12, progress=False),
    )  # fmt: skip
    trainer.run()
    state = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    torch.testing.assert_close(torch.tensor(found["state"]["values"], dtype=F64), state, rtol=1e-9, atol=1e-11)
    assert found["processes agree"]["error"] == 0
    assert found["resumed"]["error"] == 0
    assert [row[0] for row in csv.reader((folder / "metrics.csv").open())] == ["iteration", "3", "6", "7"]


def test_noise_levels_that_differ_are_refused(found: dict[str, dict[str, Any]]) -> None:
    assert found["refused"]["error"] == 0


def test_no_process_repeats_the_numbers_of_another(found: dict[str, dict[str, Any]]) -> None:
    assert found["own numbers"]["error"] == 0
