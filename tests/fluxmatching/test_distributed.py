"""Several processes under torchrun do what one does with the joint minibatch, whatever engine wraps the loss."""

import csv
import gc
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fluxmatching import FluxMatching, FluxOptions, Trainer, TrainingOptions
from fluxmatching.distributed import check_shared
from fluxmatching.training.checkpoint import read_newest_checkpoint
from tests.programs.distributed_training import F64, SIGMA, data, network
from tests.support.processes import environment, rows_of, started

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two() -> Rows:
    return rows_of(2, "tests.programs.engines")


@pytest.fixture(scope="module")
def four() -> Rows:
    return rows_of(4, "tests.programs.engines", "DDP", "FSDP2, nested")


@pytest.mark.parametrize(("processes", "count"), [("two", 9), ("four", 2)])
def test_every_engine_gives_a_loss_module_the_gradients_of_one_process(
    processes: str, count: int, request: pytest.FixtureRequest
) -> None:
    """With and without gathering; finite differences, and for DDP also a double backward."""
    rows = [row for row in request.getfixturevalue(processes) if row["what"] == "module"]
    assert len({row["engine"] for row in rows}) == count
    assert len({row["loss"] for row in rows}) == 5
    assert not [row for row in rows if not row["error"] < 1e-6]


def test_a_wrapped_field_gives_the_same_gradients_or_is_refused(two: Rows) -> None:
    """A function hides the wrapper, so that it cannot be avoided: two engines would count its calls."""
    rows = [row for row in two if row["what"] == "function"]
    assert len(rows) == 32
    refused = [row for row in rows if "refused" in row]
    assert {(row["engine"], row["hidden"]) for row in refused} == {("DDP(static_graph)", True), ("Fabric", True)}
    assert all("wrap the loss module in place of the field" in row["refused"] for row in refused)
    assert not [row for row in rows if "error" in row and not row["error"] < 1e-6]


def test_every_option_of_the_loss_works_on_a_joint_minibatch(two: Rows) -> None:
    # A fraction of 0.01 of 16 is one end: one process differentiates nothing at all.
    errors = {row["options"]: row["error"] for row in two if row["what"] == "option"}
    assert len(errors) == 10
    assert all(error < 1e-12 for error in errors.values()), errors


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "sigma",
            "ValueError: flux_matching_loss: sigma must be the same in all processes, got values from 0.1 to 1.1",
        ),
        (
            "samples",
            "x must have the same shape and dtype in all processes, got rank 0 [8, 2] torch.float32; rank 1 [7",
        ),
        ("dtypes", "got rank 0 [8, 2] torch.float32; rank 1 [8, 2] torch.float64"),
        ("seed", "ValueError: flux_matching_loss: seed must be the same in all processes, got values from 3 to 4"),
        ("refs", "flux_matching_loss: the sum of refs must be the same in all processes, got values from 8 to 16"),
        ("layout of refs", "refs must have the same shape and dtype in all processes, got rank 0 [4, 2] torch.float32"),
        ("double backward under FSDP", "does not work on a network whose parameters FSDP shards"),
    ],
)
def test_mistakes_raise_an_error_in_every_process(name: str, text: str, two: Rows) -> None:
    (row,) = [row for row in two if row["what"] == "refused" and row["name"] == name]
    assert len(row["messages"]) == 2
    assert all(text in message for message in row["messages"]), row


def test_processes_draw_numbers_of_their_own_without_a_seed_too(two: Rows) -> None:
    (row,) = [row for row in two if row["what"] == "without a seed"]
    assert len(set(row["sigma"])) == 2


REFUSED = {
    "options": "must have the same options, data and loss, got lr 0.1 and 0.2; seed 0 and 1",
    "batch": "got batch_size 4 and 3",
    "samples": "got samples 48 and 47",
    "architecture": "got loss.field.0.weight [8, 2] torch.float64 and [9, 2] torch.float64",
    "devices": "2 processes were started (WORLD_SIZE or SLURM_NTASKS), TrainingOptions(devices=1, num_nodes=1) asks",
}


@pytest.mark.parametrize(("processes", "strategy"), [(2, "ddp"), (2, "fsdp"), (4, "nested")])
def test_training_ends_where_one_process_with_the_joint_minibatch_ends(
    processes: int, strategy: str, tmp_path: Path
) -> None:
    every = rows_of(processes, "tests.programs.distributed_training", strategy, tmp_path)
    rows = {row["what"]: row for row in every}
    alone = trained_alone(7)
    for name, module in (("loss", alone.loss), ("average", alone.average.module)):
        wanted = torch.cat([p.detach().flatten() for p in module.parameters()])
        torch.testing.assert_close(torch.tensor(rows[name]["values"], dtype=F64), wanted, rtol=1e-9, atol=1e-11)
    assert rows["resumed"]["different"] == []
    assert [row[0] for row in csv.reader((tmp_path / "metrics.csv").open())] == ["iteration", "3", "6", "7"]
    if strategy == "ddp":
        for what in (
            "replicas at the start",
            "replicas after three steps",
            "replicas with a reference set",
            "gradients",
            "buffers",
        ):
            assert rows[what]["error"] == 0, what
        assert rows["replicas with a reference set"]["kept"] == 32
        refused = {row["name"]: row["messages"] for row in every if row["what"] == "refused"}
        assert set(refused) == set(REFUSED)
        for what, text in REFUSED.items():
            assert [text in message for message in refused[what]] == [True] * processes, refused[what]
        # Dropout's random numbers repeat neither from iteration to iteration nor from process to process.
        assert rows["own numbers"]["different"] == rows["own numbers"]["drawn"] == 4 * processes


def test_no_group_of_processes_is_kept_alive(tmp_path: Path) -> None:
    """Its threads would run on while the interpreter ends."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = weakref.ref(torch.distributed.group.WORLD)
    check_shared("f", "number", torch.ones(2))
    torch.distributed.destroy_process_group()
    gc.collect()
    assert group() is None


SCRIPT = """
import sys
import torch
from fluxmatching import FluxMatching, Trainer, TrainingOptions

options = TrainingOptions(3, 8, progress=False, accelerator="cpu", devices=2)
trainer = Trainer(FluxMatching(torch.nn.Linear(2, 2), 0.7), torch.randn(64, 2), options, folder=sys.argv[1])
trainer.run()
sys.stdout.write(f"rank {trainer.rank} of {trainer.processes} at {trainer.iteration}\\n")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_a_plain_script_starts_its_processes(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(file), str(tmp_path / "run")],
        env=environment(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0 of 2 at 3",
        "rank 1 of 2 at 3",
    ]


def trained_alone(iterations: int) -> Trainer:
    loss = FluxMatching(network(), SIGMA, FluxOptions(second_derivatives="finite_difference"))
    options = TrainingOptions(iterations, 24, accelerator="cpu", clip=0.5, progress=False)
    trainer = Trainer(loss, data(), options)
    trainer.run()
    return trainer


def test_a_run_of_two_processes_that_is_killed_resumes(tmp_path: Path) -> None:
    """SIGKILL of all processes at once, while most of the time a checkpoint is written."""
    last, reached = tmp_path / "last.pt", 0
    for k in range(2):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = started(2, "tests.programs.distributed_training", "ddp", tmp_path, 100_000)
        while not last.exists() or last.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.05 + 0.1 * k)
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.kill()
        process.communicate()
        state, _ = read_newest_checkpoint(tmp_path) or pytest.fail("no checkpoint is left")
        before, reached = reached, state["iteration"]
        assert max(before, 1) <= reached
    rows_of(2, "tests.programs.distributed_training", "ddp", tmp_path, reached + 3)
    state = torch.load(last, weights_only=True)
    assert state["iteration"] == reached + 3
    for name, value in trained_alone(reached + 3).loss.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(state["loss"][name], value, rtol=1e-9, atol=1e-11)
