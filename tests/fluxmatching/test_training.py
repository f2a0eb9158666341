"""The training loop: what it computes, that it resumes exactly, and that nothing is lost when it is killed."""

import csv
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric.loggers import CSVLogger
from torch import Tensor, nn

from fluxmatching import FluxMatching, Trainer, TrainingError
from fluxmatching.training.average import MovingAverage
from fluxmatching.training.engine import number_of_processes, shard
from tests.support.training import OPTIONS, assert_same, data, loss, trained

ROOT = Path(__file__).parents[2]


def test_time_that_is_up_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    """At least one iteration is made, so that commands with too little time get somewhere too."""
    parts = 0
    while (trainer := Trainer(loss(), data(), OPTIONS, folder=tmp_path)).iteration < OPTIONS.iterations:
        trainer.run(seconds=0.0)
        parts += 1
    assert parts == OPTIONS.iterations
    assert_same(trainer, trained())
    trainer.run(seconds=0.0)  # finished: nothing more is done
    assert trainer.iteration == OPTIONS.iterations


@pytest.mark.parametrize("seed", [2**63 - 1, -5])
def test_any_seed(seed: int) -> None:
    options = replace(OPTIONS, seed=seed)
    assert_same(trained(options), trained(options))
    assert not torch.equal(trained(options).loss.field[0].weight, trained().loss.field[0].weight)


def test_is_the_loop_one_would_write() -> None:
    """Plain SGD-style code with torch's own optimizer, given the same minibatches and seeds."""
    seen: list[tuple[Tensor, Tensor]] = []

    def recorded(found: Any, x: Tensor, seed: Tensor) -> Any:
        seen.append((x, seed))
        return found

    options = replace(OPTIONS, warmup=5, clip=0.1, lr=0.01)
    net = loss(recorded).eval()
    trainer = Trainer(net, data(), options)
    trainer.run()

    other = loss().eval()
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0)
    average: list[Tensor] = []
    for k, (x, seed) in enumerate(seen):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (k + 1) / 5)
        optimizer.zero_grad()
        other(x, seed=seed)[0].backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        optimizer.step()
        now = [p.detach().clone() for p in other.parameters()]
        average = now if not average else [0.9 * a + 0.1 * p for a, p in zip(average, now, strict=True)]
    for p, q, a, b in zip(net.parameters(), other.parameters(), trainer.average.parameters(), average, strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(a.detach(), b)


def test_the_default_average_forgets_the_initial_parameters() -> None:
    """Its decay begins at 1/10 and rises to 0.999; a number is used from the first step on."""
    module = nn.Linear(1, 1, bias=False)
    default, fixed = MovingAverage(module, None), MovingAverage(module, 0.999)
    expected = [0.0, 0.0]
    for step in range(60):
        with torch.no_grad():
            module.weight.fill_(100.0 if step == 0 else math.sin(step))
        now = module.weight.item()
        decays = (min(0.999, (1 + step) / (10 + step)), 0.999)
        expected = [now if step == 0 else d * e + (1 - d) * now for d, e in zip(decays, expected, strict=True)]
        for average in (default, fixed):
            average.update_parameters(module)
    for average, value in zip((default, fixed), expected, strict=True):
        torch.testing.assert_close(average.module.weight.item(), value, rtol=1e-5, atol=1e-6)
    assert abs(expected[0]) < 1 < abs(expected[1])


def test_learning_rate_follows_a_schedule_across_a_resume(tmp_path: Path) -> None:
    """The factor multiplies the rate after warm-up, by the iteration and not by the steps of this process."""
    asked: list[int] = []

    def halved(iteration: int) -> float:
        asked.append(iteration)
        return 0.5**iteration

    options = replace(OPTIONS, iterations=8, warmup=2, lr=0.01)
    whole = trained(options, lr_factor=halved)
    assert whole.optimizer.param_groups[0]["lr"] == 0.01 * 0.5**7
    asked.clear()
    trainer = Trainer(loss(), data(), options, folder=tmp_path, lr_factor=halved)
    trainer.run(seconds=0.0)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.005
    resumed = trained(options, folder=tmp_path, lr_factor=halved)
    assert asked == list(range(8))
    assert_same(whole, resumed)
    assert not torch.equal(resumed.loss.field[0].weight, trained(options).loss.field[0].weight)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e76, -1.0, torch.tensor(float("nan"))])
def test_a_rate_that_is_no_rate_is_refused(factor: Any, tmp_path: Path) -> None:
    trainer = Trainer(loss(), data(), OPTIONS, folder=tmp_path, lr_factor=lambda k: factor if k == 7 else 1.0)
    with pytest.raises(
        ValueError, match=r"lr_factor must give a finite .*, got lr (nan|inf|1\.0\d*e\+73|-0\.001) at iteration 7"
    ):
        trainer.run()
    assert Trainer(loss(), data(), OPTIONS, folder=tmp_path).iteration == 5


def test_each_pass_shows_every_sample_once_in_an_order_of_its_own() -> None:
    seen: list[Tensor] = []

    def recorded(found: Any, x: Tensor, seed: Tensor) -> Any:
        seen.append(x)
        return found

    Trainer(loss(recorded), data(), OPTIONS).run()
    passes = [torch.cat(seen[k : k + 4]) for k in (0, 4, 8)]  # four minibatches of 16 out of 70
    for samples in passes:
        assert len(samples.unique(dim=0)) == 64
    assert not torch.equal(passes[0], passes[1])


def test_torch_generators_are_left_alone() -> None:
    trainer = Trainer(loss(), data(), OPTIONS)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer.run()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stop", [1, 5, 7, 10])
def test_interrupted_and_resumed_equals_uninterrupted(stop: int, tmp_path: Path) -> None:
    """Stopped as by Ctrl-C, at a checkpoint or between two: dropout, seeds, order, moments and average go on."""
    whole = trained(folder=tmp_path / "whole")
    begun = Trainer(loss(), data(), OPTIONS, folder=tmp_path / "parts")

    def interrupted(found: Any, x: Tensor, seed: Tensor) -> Any:
        if begun.iteration == stop:
            raise KeyboardInterrupt
        return found

    begun.loss.change = interrupted  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        begun.run()
    resumed = Trainer(loss(), data(), OPTIONS, folder=tmp_path / "parts")
    assert resumed.iteration == stop // 5 * 5
    resumed.run()
    assert_same(whole, resumed)
    tables = [list(csv.reader((tmp_path / run / "metrics.csv").open())) for run in ("whole", "parts")]
    assert [row[0] for row in tables[0]] == ["iteration", "4", "8", "12"]
    assert [row[:2] for row in tables[1]] == [row[:2] for row in tables[0]]  # the rest are speed and memory


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    trained(folder=tmp_path)
    longer = trained(replace(OPTIONS, iterations=20), folder=tmp_path)
    assert_same(longer, trained(replace(OPTIONS, iterations=20)))


def written(file: Path) -> int | None:
    """When, in nanoseconds; None while it is not there, as for a moment between two checkpoints."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_killed_again_and_again_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """SIGKILL at any moment, most of the time while a checkpoint is written."""
    script = (
        "from tests.fluxmatching.test_training import *\n"
        "options = replace(OPTIONS, iterations=400, checkpoint_every=1)\n"
        f"trained(options, folder={str(tmp_path)!r})"
    )
    started = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'python_api')!r}]\n{script}",
    ]
    reached = []
    for k in range(4):
        process = subprocess.Popen(started)
        while (at := written(tmp_path / "last.pt")) is None or at in reached:
            time.sleep(0.01)
        reached.append(at)
        time.sleep(0.05 + 0.07 * k)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = Trainer(loss(), data(), replace(OPTIONS, iterations=400, checkpoint_every=1), folder=tmp_path)
        assert 0 < resumed.iteration < 400
        assert list(tmp_path.glob("part-*")) == []
    options = replace(OPTIONS, iterations=400)
    assert_same(trained(options, folder=tmp_path), trained(options))


@pytest.mark.parametrize("damage", ["cut", "numbers"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage: str, tmp_path: Path) -> None:
    trained(folder=tmp_path)
    last = tmp_path / "last.pt"
    whole = last.read_bytes()
    weights = trained().loss.field[0].weight.detach().numpy().tobytes()
    assert weights in whole
    # Damaged numbers are still a file that torch reads: only the archive's checksums know.
    last.write_bytes(whole[:1000] if damage == "cut" else whole.replace(weights[:8], b"\xff" * 8))
    with pytest.warns(UserWarning, match=r"last\.pt \(\w+\) in .* cannot be read; previous\.pt is used"):
        resumed = Trainer(loss(), data(), OPTIONS, folder=tmp_path)
    assert resumed.iteration == 10
    resumed.run()
    assert_same(resumed, trained())
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"no")
    with pytest.raises(TrainingError, match=r"no checkpoint in .* can be read: last\.pt \(\w+\), previous\.pt \(\w+\)"):
        Trainer(loss(), data(), OPTIONS, folder=tmp_path)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_and_leaves_the_model_as_it_was(what: str, tmp_path: Path) -> None:
    def breaks(found: Any, x: Tensor, seed: Tensor) -> Any:
        value, logged = found
        if trainer.iteration == 7:
            value = value * float("nan") if what == "loss" else value + (value - value.detach()).abs().sqrt()
        return value, logged | {"sigma": torch.tensor(0.25), "tau": torch.tensor(1.5)}

    trainer = Trainer(loss(breaks), data(), OPTIONS, folder=tmp_path)
    with pytest.raises(TrainingError, match=rf"iteration 7: the {what} is not finite \(.*tau 1\.5, .*sigma 0\.25"):
        trainer.run()
    assert_same(trainer, trained(replace(OPTIONS, iterations=7)))
    assert Trainer(loss(), data(), OPTIONS, folder=tmp_path).iteration == 5


def test_a_network_that_turns_nan_stops_with_sigma_and_tau(tmp_path: Path) -> None:
    """On a CPU the loss itself refuses it, before there is a number to look at."""
    trainer = Trainer(loss(), data(), OPTIONS, folder=tmp_path)
    for _ in range(5):
        trainer.step()
    trainer.save()
    nn.init.constant_(trainer.loss.field[0].bias, float("nan"))
    said = r"iteration 5: .*field must be finite, got NaN or infinity at sigma 0\.7, tau [\d.]+; .*last good checkpoint"
    with pytest.raises(TrainingError, match=said):
        trainer.run()
    assert Trainer(loss(), data(), OPTIONS, folder=tmp_path).iteration == 5


def test_errors_of_the_loss_that_are_no_numbers_are_its_own() -> None:
    def breaks(*_: Any) -> Any:
        raise ValueError("some mistake")

    with pytest.raises(ValueError, match="some mistake"):
        Trainer(loss(breaks), data(), OPTIONS).step()


@pytest.mark.parametrize("result", [1.0, [1.0], (torch.ones(()), 3), torch.ones(2)])
def test_a_loss_that_returns_something_else(result: Any) -> None:
    with pytest.raises(
        TypeError, match=r"forward of the loss must return its mean, a tensor of shape \[\], or that and"
    ):
        Trainer(loss(lambda *_: result), data(), OPTIONS).step()


def test_what_is_logged_may_be_numbers_or_nothing() -> None:
    nan = Trainer(loss(lambda found, x, seed: (found[0] * float("nan"), {"sigma": 0.25})), data(), OPTIONS)
    with pytest.raises(TrainingError, match=r"sigma 0\.25"):
        nan.step()
    alone = Trainer(loss(lambda found, x, seed: found[0]), data(), OPTIONS)
    alone.run()
    assert_same(alone, trained())


def test_what_is_logged_is_no_string() -> None:
    with pytest.raises(TypeError, match="what the loss logs must be tensors or numbers, got 'name': 'abc'"):
        Trainer(loss(lambda found, x, seed: (found[0], {"name": "abc"})), data(), OPTIONS).step()


def test_samples_need_not_be_a_tensor() -> None:
    class Squares:
        def __len__(self) -> int:
            return 70

        def __getitem__(self, indices: Tensor) -> Tensor:
            return data()[indices]

    assert_same(trained(), _trained_on(Squares()))
    with pytest.raises(TypeError, match=r"data must be a tensor, or return one or \(samples, labels\) .*; got ndarray"):
        _trained_on(data().numpy())


def _trained_on(samples: Any) -> Trainer:
    trainer = Trainer(loss(), samples, OPTIONS)
    trainer.run()
    return trainer


def test_numbers_of_numpy_are_kept_as_pythons(tmp_path: Path) -> None:
    """Others would make checkpoints that cannot be read safely."""
    options = replace(OPTIONS, lr=np.float64(1e-3), ema=np.float32(0.5), iterations=np.int64(12), seed=np.int32(0))
    trained(options, folder=tmp_path)
    assert Trainer(loss(), data(), options, folder=tmp_path).iteration == 12


@pytest.mark.parametrize(
    ("name", "value"),
    [("iterations", 10.5), ("batch_size", "16"), ("lr", None), ("warmup", float("nan")), ("clip", "x")],
)
def test_options_of_a_wrong_type(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a (whole )?number, got "):
        replace(OPTIONS, **{name: value})


def test_save_without_a_folder() -> None:
    with pytest.raises(ValueError, match="save needs the folder"):
        Trainer(loss(), data(), OPTIONS).save()


def test_a_checkpoint_of_another_model_or_other_data_is_refused(tmp_path: Path) -> None:
    trained(folder=tmp_path)
    with pytest.raises(ValueError, match=r"last\.pt belongs to another model"):
        Trainer(FluxMatching(nn.Linear(2, 2), 0.7), data(), OPTIONS, folder=tmp_path)
    with pytest.raises(ValueError, match="samples 70 there, 60 here"):
        Trainer(loss(), data()[:60], OPTIONS, folder=tmp_path)
    torch.save({"loss": {}}, tmp_path / "last.pt")
    with pytest.warns(UserWarning, match=r"last\.pt \(KeyError\)"):
        Trainer(loss(), data(), OPTIONS, folder=tmp_path)


def test_bfloat16_trains_parameters_in_float32() -> None:
    trainer = trained(replace(OPTIONS, precision="bf16-mixed"))
    assert all(p.dtype == torch.float32 for p in trainer.loss.parameters())
    assert not torch.equal(trainer.loss.field[0].weight, trained().loss.field[0].weight)


def test_progress_says_loss_speed_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    trained(replace(OPTIONS, progress=True))
    said = capsys.readouterr().err
    assert "12/12" in said
    assert "loss=" in said
    assert "memory=" in said


def test_loggers_receive_the_rows(tmp_path: Path) -> None:
    trained(loggers=[CSVLogger(tmp_path, name="run", flush_logs_every_n_steps=1)])
    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    assert [row["step"] for row in rows] == ["4", "8", "12"]
    assert {"loss", "lr", "tau", "iterations_per_second"} <= set(rows[0])


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trained(folder=tmp_path)
    with pytest.raises(ValueError, match=r"run with other options: lr 0\.001 there, 0\.1 here; seed 0 there, 3 here"):
        Trainer(loss(), data(), replace(OPTIONS, lr=0.1, seed=3), folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", 0), ("batch_size", 0), ("lr", 0.0), ("lr", float("nan")), ("clip", -1.0), ("warmup", -1),
        ("weight_decay", -0.1), ("ema", 1.0), ("optimizer", "sgd"), ("precision", "fp8"), ("log_every", 0),
        ("checkpoint_every", 0), ("accumulate", 0), ("devices", 0), ("num_nodes", -1),
    ],
)  # fmt: skip
def test_bad_options(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"TrainingOptions: .*{name}.*{value}"):
        replace(OPTIONS, **{name: value})


def test_fewer_samples_than_a_minibatch() -> None:
    with pytest.raises(ValueError, match="batch_size must be at most the 70 samples, got 71"):
        Trainer(loss(), data(), replace(OPTIONS, batch_size=71))


def test_a_loss_with_nothing_to_train() -> None:
    for nothing in (nn.Tanh(), loss().requires_grad_(False)):
        with pytest.raises(ValueError, match="loss must have parameters that need a gradient, got"):
            Trainer(nothing, data(), OPTIONS)


@pytest.mark.filterwarnings("ignore")
def test_modules_that_cannot_be_trained_are_named() -> None:
    layer = nn.Linear(2, 2)
    for field, error, text in (
        (layer.to("meta"), ValueError, r"loss must have values, field\.weight is on meta; its to_empty"),
        (nn.LazyLinear(2), ValueError, r"loss must be initialized, field\.weight is lazy; call the loss once"),
        (
            nn.utils.weight_norm(nn.Linear(2, 2)),
            TypeError,
            r"field has torch\.nn\.utils\.weight_norm, .*torch\.nn\.utils\.parametrizations\.weight_norm",
        ),
    ):
        with pytest.raises(error, match=text):
            Trainer(FluxMatching(field, 0.7), data(), OPTIONS)
    with pytest.raises(TypeError, match="TrainingOptions: accelerator must be a string, got None"):
        replace(OPTIONS, accelerator=None)


def test_parameters_of_several_dtypes_are_not_sharded() -> None:
    module = FluxMatching(nn.Linear(2, 2), 0.7)
    module.wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"'fsdp' shards parameters of one dtype, got torch\.complex64, torch\.float32"):
        shard(module, SimpleNamespace(ndim=1))


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, {}, (1, 1)),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}, {}, (2, 3)),
        ({"WORLD_SIZE": "2"}, {"devices": 2}, (2, 1)),  # a process that Fabric has started
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}, {}, (4, 2)),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "interactive"}, {}, (1, 1)),
    ],
)
def test_processes_are_those_that_were_started(
    environment: dict[str, str], given: dict[str, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert number_of_processes(replace(OPTIONS, **given)) == expected


def test_processes_of_slurm_never_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ValueError, match=r"Slurm starts 2 processes, .*use srun --nodes and --ntasks-per-node"):
        Trainer(loss(), data(), OPTIONS)
    names = ("NTASKS_PER_NODE", "NNODES", "PROCID", "LOCALID", "NODEID")
    for name, value in zip(names, ("2", "1", "0", "0", "0"), strict=True):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(ValueError, match=r"2 processes were started .*, TrainingOptions\(devices=1, .*asks for 1"):
        Trainer(loss(), data(), replace(OPTIONS, devices=1))


def test_arguments_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"loss must be a torch\.nn\.Module, got function"):
        Trainer(loss, data(), OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loss must take forward\(x, seed=\.\.\.\), such as .*; Linear does not"):
        Trainer(nn.Linear(2, 2), data(), OPTIONS)
    with pytest.raises(TypeError, match="options must be TrainingOptions, got NoneType"):
        Trainer(loss(), data(), None)  # type: ignore[arg-type]
