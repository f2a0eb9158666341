"""Export of trained fields: what is written is what was trained, and its card runs and states what was measured."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import fast_mixing, images, springs
from experiments.__main__ import main
from experiments.common import export
from experiments.common.clock import Clock
from experiments.common.export import TrainedField, export_example, open_run
from experiments.common.objectives import FLUX
from experiments.common.registry import Experiment, UsageError
from experiments.common.run import Run
from experiments.fast_mixing.measure import log_steps
from experiments.fast_mixing.mixture import make_trainer
from experiments.images.datasets import load, shapes, to_numbers
from experiments.images.example import color_distance, single_share
from experiments.images.experiment import judge
from experiments.images.stages import log_floor
from experiments.images.stages import train as train_images
from experiments.springs.example import deviation, roughness
from experiments.springs.training import CAUSAL
from experiments.springs.training import train as train_springs
from fluxmatching import Example, load_example

pytest.importorskip("safetensors", reason="safetensors is not installed")


def train_mixture(run: Run) -> None:
    trainer = make_trainer(run, FLUX, 0, iterations=run.config.mixture_iterations)
    trainer.run()
    log_steps(run, export.averaged_field(trainer), FLUX, 0)


def train_on_shapes(run: Run) -> None:
    data = load(run.config.dataset)
    log_floor(run, data, run.config.samples)
    train_images(run, [FLUX], data, Clock.start(0))
    judge(run, FLUX, data, Clock.start(0))


# Only the part of a run that the export reads, at its smallest.
PARTS: dict[str, tuple[Experiment, Callable[[Run], None], dict[str, Any]]] = {
    "mixture": (fast_mixing.EXPERIMENT, train_mixture, {"mixture_iterations": 60}),
    "springs": (springs.EXPERIMENT, lambda run: train_springs(run, FLUX, CAUSAL, 0, Clock.start(0)), {}),
    "images": (images.EXPERIMENT, train_on_shapes, {"evaluations": 1, "likelihood_images": 0}),
}


def make_run(name: str, out: Path, **changes: Any) -> Run:
    experiment, train, more = PARTS[name]
    config = dataclasses.replace(experiment.config("smoke"), **more, **changes)
    run = Run(experiment, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)
    train(run)
    run.summary([], [])
    return run


@pytest.fixture(scope="module", params=PARTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A finished run, and the folder of examples that it was exported to."""
    if request.param == "images":
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    run = make_run(request.param, folder / "run")
    return run, export_example(folder / "run", folder / "examples").parent


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run("springs", tmp_path_factory.mktemp("springs") / "run")


@pytest.fixture
def copied(trajectories: Run, tmp_path: Path) -> Path:
    """A copy of a finished run, to be spoiled."""
    return Path(shutil.copytree(trajectories.out, tmp_path / "run"))


def trained(run: Run) -> TrainedField:
    assert run.experiment.example is not None
    found = run.experiment.example(run)
    assert isinstance(found, TrainedField)
    return found


def loaded(folder: Path) -> Example:
    (place,) = folder.iterdir()
    return load_example(place.name, folder)


def test_the_loaded_field_is_the_trained_one(exported: tuple[Run, Path]) -> None:
    """Bit for bit the one with weights rounded to float16, and the trained one up to that rounding."""
    run, folder = exported
    wanted, found = trained(run), loaded(folder)
    z, sigma = torch.randn(6, *found.shape), torch.tensor(0.3)
    with torch.no_grad():
        torch.testing.assert_close(found.field(z, sigma), wanted.field(z, sigma), rtol=2e-2, atol=2e-2)
        wanted.field.load_state_dict({name: value.half() for name, value in wanted.field.state_dict().items()})
        assert torch.equal(found.field(z, sigma), wanted.field(z, sigma))
    assert (found.sigma_min, found.sigma_max, found.shape) == (wanted.sigma_min, wanted.sigma_max, wanted.shape)
    assert found.field.sigma_data == wanted.field.sigma_data


def test_the_average_is_exported_and_not_the_last_iterate(exported: tuple[Run, Path]) -> None:
    """As the checkpoint of the training has both."""
    run, folder = exported
    (file,) = (path for path in run.out.rglob("last.pt") if FLUX in str(path))
    state = torch.load(file, weights_only=True)
    found = {f"field.{name}": value for name, value in loaded(folder).field.state_dict().items()}
    average, last = state["average"]["parameters"], state["loss"]
    assert all(torch.equal(value, average[name].half().float()) for name, value in found.items())
    assert any(not torch.equal(value, last[name].half().float()) for name, value in found.items())


def test_a_card_names_what_was_measured(exported: tuple[Run, Path]) -> None:
    """Front matter, the command of the run, and figures of the file beside those of the run, which nearly agree."""
    run, folder = exported
    (place,) = folder.iterdir()
    text = (place / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlicense: mit\nlibrary_name: fluxkernels\ntags:\n")
    assert json.loads((run.out / "summary.json").read_text())["command"] in text
    ((file, trained_in_float32),) = re.findall(r"run alone \| ([\d.]+) \| ([\d.]+) \| – \|$", text, flags=re.MULTILINE)
    assert float(file) == pytest.approx(float(trained_in_float32), rel=0.05)
    assert "Samples of both fields are from the same noise." in text
    assert max(len(line) for line in text.splitlines() if line[:1] not in "|p") <= export.WIDTH
    for part in ("## Data", "## Training", "## Intended use", "## Limits", "## License", "| seed | 0 |"):
        assert part in text
    assert str(folder) not in text


def test_the_block_of_a_card_runs(exported: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = exported
    (place,) = folder.iterdir()
    (block,) = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.setenv("FLUXMATCHING_EXAMPLES", str(folder))
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["samples"].shape == (16, *names["example"].shape)
    assert names["samples"].isfinite().all()


def test_what_is_measured_of_drawn_discs() -> None:
    """Discs of one color are one piece on a line of colors; two discs are two pieces, and a third color is beside."""
    x = to_numbers(shapes(200, seed=3))
    assert single_share(x) > 0.98
    assert color_distance(x) < 0.01
    double = torch.full((1, 3, 16, 16), -1.0)
    double[:, 0, 3:6, 3:6] = double[:, 1, 10:13, 10:13] = 1
    assert single_share(double) == 0
    assert color_distance(double) > 0.1


def test_what_is_measured_of_trajectories() -> None:
    time = torch.arange(5.0)
    x = torch.stack([time**2, -(time**2)], 1).expand(6, 5, 2)
    assert roughness(x) == pytest.approx([2, 2, 2])
    assert all(math.isnan(value) for value in roughness(x[:, :2]))
    assert deviation(torch.cat([x, -x])) == pytest.approx([0, 4, 16], rel=0.05)


def test_an_export_is_repeatable(trajectories: Run, tmp_path: Path) -> None:
    first, second = (export_example(trajectories.out, tmp_path / name) for name in ("a", "b"))
    assert {path.name for path in first.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_a_run_of_an_absent_device_is_exported_on_the_cpu_and_stays_as_it_is(copied: Path, tmp_path: Path) -> None:
    config = json.loads((copied / "config.json").read_text()) | {"device": "cuda:99"}
    config["backend"] = {"requested": "triton", "resolved": "triton"}
    (copied / "config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    place = export_example(copied, tmp_path / "out")
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    assert "Samples of both fields may be from different noise" in (place / "README.md").read_text(encoding="utf-8")
    assert load_example("springs", tmp_path / "out").shape == (50, 4)


def test_an_export_that_fails_changes_nothing(
    trajectories: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a measurement is its own, and an earlier example stays whole, as do other files beside it."""
    place = export_example(trajectories.out, tmp_path)
    (place / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(field: Any) -> list[Any]:
        raise OSError("no space for samples")

    failing = dataclasses.replace(trained(trajectories), measure=fail)
    monkeypatch.setattr(springs, "EXPERIMENT", dataclasses.replace(springs.EXPERIMENT, example=lambda run: failing))
    with pytest.raises(OSError, match="no space for samples"):
        export_example(trajectories.out, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    export_example(trajectories.out, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_command(trajectories: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["export", str(trajectories.out), "--out", str(tmp_path / "out")]) == 0
    place = tmp_path / "out" / "springs"
    assert f"{place / 'config.json'}: {(place / 'config.json').stat().st_size} bytes" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "absent")]) == 2
    assert "absent holds no finished run; make one with `python -m experiments run NAME" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["export", str(trajectories.out), "--out", str(tmp_path / "file")]) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_unfinished_runs_are_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "summary.json").unlink()
    with pytest.raises(UsageError, match="holds no finished run"):
        export_example(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_its_checkpoint_is_refused(copied: Path, tmp_path: Path) -> None:
    """The trainer would begin anew, and its untrained field would be exported."""
    shutil.rmtree(copied / "models")
    with pytest.raises(UsageError, match="must have a checkpoint at iteration 4, got 0"):
        export_example(copied, tmp_path / "out")


def test_runs_of_other_versions_are_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["config"]["gone"] = 1
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="was made by another version of springs"):
        open_run(copied)


@pytest.mark.parametrize("changes", [{"standardize": True}, {"input_scaling": False}])
def test_fields_in_other_units_are_refused(trajectories: Run, changes: dict[str, Any]) -> None:
    run = dataclasses.replace(trajectories, config=dataclasses.replace(trajectories.config, **changes))
    with pytest.raises(UsageError, match="without standardize and with input_scaling"):
        trained(run)


def test_experiments_without_an_example_are_refused(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = dataclasses.replace(springs.EXPERIMENT, example=None)
    monkeypatch.setattr(springs, "EXPERIMENT", without)
    with pytest.raises(UsageError, match="springs has no example to export"):
        export_example(copied, tmp_path / "out")


def test_weights_that_are_too_large_are_refused(trajectories: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(trajectories)
    monkeypatch.setattr(export, "LARGEST", 1000)
    with pytest.raises(UsageError, match=r"springs: weights must have at most 1000 bytes, got \d+"):
        export.weights(found)
    monkeypatch.undo()
    next(found.field.parameters()).data.fill_(1e6)
    with pytest.raises(UsageError, match="is not finite in float16"):
        export.weights(found)
