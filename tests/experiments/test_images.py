"""Tests of the image experiment: loaders on files made here, distances with closed forms, and interrupted runs."""

from __future__ import annotations

import dataclasses
import io
import pickle
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments.common.clock import Clock
from experiments.common.data import data_folders
from experiments.common.objectives import DSM, FAST, FLUX, averaged_field, make_loss
from experiments.common.registry import Paused, UsageError
from experiments.common.run import Run
from experiments.images import EXPERIMENT, datasets, fidelity, stages
from experiments.images.experiment import main
from experiments.images.figures import tile
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.training import make_trainer, network
from fluxmatching import EDMField, LearnedHorizon, LogNormalNoise, Trainer


def pickled(count: int, seed: int) -> tuple[bytes, np.ndarray]:
    """A batch as CIFAR-10's authors write it: rows of 3072 bytes, channel by channel."""
    data = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    content = {b"data": data, b"labels": [0] * count, b"batch_label": b"x", b"filenames": [b"a.png"] * count}
    return pickle.dumps(content, protocol=2), data.reshape(count, 3, 32, 32)


def batches() -> dict[str, tuple[bytes, np.ndarray]]:
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    return {name: pickled(k + 1, k) for k, name in enumerate(names)}


@pytest.mark.parametrize("archive", [False, True])
def test_cifar10_as_published(tmp_path: Path, archive: bool) -> None:
    made = batches()
    if archive:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as file:
            for name, (content, _) in made.items():
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    else:
        (tmp_path / "cifar-10-batches-py").mkdir()
        for name, (content, _) in made.items():
            (tmp_path / "cifar-10-batches-py" / name).write_bytes(content)
    found = datasets.load("cifar10", [tmp_path])
    train = np.concatenate([pixels for name, (_, pixels) in made.items() if name != "test_batch"])
    assert np.array_equal(found.train.numpy(), train)
    assert np.array_equal(found.test.numpy(), made["test_batch"][1])
    assert "authors" in found.source


def test_pickles_that_would_run_a_program_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("pwned",)

    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(UsageError, match=r"UnpicklingError: a batch of CIFAR-10 holds no builtins.print"):
        datasets.load("cifar10", [tmp_path])


def write_classes(folder: Path, per_part: int = 3) -> None:
    """Image files in the layout of classes, and a file that macOS leaves in folders."""
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for k in range(per_part):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{k:04d}.png")
            (folder / part / label / ".DS_Store").write_bytes(b"x")


def test_class_folders_and_the_same_in_an_archive(tmp_path: Path) -> None:
    write_classes(tmp_path / "plain" / "cifar10")
    plain = datasets.load("cifar10", [tmp_path / "plain"])
    assert plain.train.shape == plain.test.shape == (6, 3, 32, 32)
    with Image.open(tmp_path / "plain/cifar10/train/dog/0001.png") as image:
        assert np.array_equal(plain.train[4].numpy(), np.asarray(image).transpose(2, 0, 1))
    place = tmp_path / "packed" / "cifar10"
    place.mkdir(parents=True)
    with tarfile.open(place / "cifar10_jpeg_60000.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "plain" / "cifar10", "cifar10_jpeg")
    packed = datasets.load("cifar10", [tmp_path / "packed"])
    assert torch.equal(packed.train, plain.train)
    assert torch.equal(packed.test, plain.test)
    assert "lossy" in packed.source


def test_celeba_is_cropped_scaled_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CELEBA_TRAINING", 2)
    monkeypatch.setattr(datasets, "CELEBA", 3)
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    for k in range(3):
        pixels = np.zeros((218, 178, 3), np.uint8)
        pixels[39:179, 19:159] = 50 * (k + 1)  # the central 140 × 140, and black around it
        Image.fromarray(pixels).save(folder / f"{k + 1:06d}.jpg", quality=100)
    for _ in range(2):
        found = datasets.load("celeba64", [tmp_path])
        assert found.train.shape == (2, 3, 64, 64)
        assert found.test.shape == (1, 3, 64, 64)
        assert found.train[1].float().mean().item() == pytest.approx(100, abs=2)
        for file in folder.glob("*.jpg"):  # the second time from the kept bytes
            file.unlink()


def test_half_of_celeba_is_not_kept(tmp_path: Path) -> None:
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    Image.fromarray(np.zeros((218, 178, 3), np.uint8)).save(folder / "000001.jpg")
    with pytest.raises(UsageError, match="CelebA has 202599 images, img_align_celeba 1"):
        datasets.load("celeba64", [tmp_path])
    assert not (tmp_path / "celeba64.npy").exists()


def test_absent_unknown_and_damaged_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no files of cifar10: put cifar-10-batches-py or .* FLUXMATCHING_DATA"):
        datasets.load("cifar10", [tmp_path])
    with pytest.raises(UsageError, match="no data set 'mnist'; there are cifar10, cifar10_subset, celeba64, shapes"):
        datasets.load("mnist")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half a download")
    with pytest.raises(UsageError, match=r"cifar-10-python.tar.gz cannot be read"):
        datasets.load("cifar10", [tmp_path])
    for name in ("cifar10_lossless_subset.npz", "cifar10_jpeg_60000.tar.xz"):
        place = tmp_path / name / "cifar10"
        place.mkdir(parents=True)
        (place / name).write_bytes(b"half a download")
        with pytest.raises(UsageError, match=f"{name} cannot be read"):
            datasets.load("cifar10", [tmp_path / name])


def test_real_images_where_they_are_at_hand() -> None:
    if not any((folder / "cifar10" / "cifar10_lossless_subset.npz").exists() for folder in data_folders()):
        pytest.skip("no images of CIFAR-10 in the data folders")
    found = datasets.load("cifar10_subset")
    assert found.train.shape == (5438, 3, 32, 32)
    assert datasets.to_numbers(found.train).std().item() == pytest.approx(0.5, abs=0.02)


def test_flips_are_of_half_the_images_and_bytes_survive() -> None:
    pixels = datasets.shapes(400, seed=0)
    assert torch.equal(datasets.to_bytes(datasets.to_numbers(pixels)), pixels)
    torch.manual_seed(0)
    every = torch.arange(400)
    plain = datasets.Flipped(pixels, False, torch.device("cpu"))[every]
    flipped = datasets.Flipped(pixels, True, torch.device("cpu"))[every]
    assert torch.equal(plain, datasets.to_numbers(pixels))
    same = (flipped == plain).flatten(1).all(1)
    assert 0.4 < same.float().mean() < 0.6
    assert torch.equal(flipped[~same], plain[~same].flip(-1))
    assert datasets.to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_frechet_distance_of_gaussians() -> None:
    """|Δμ|² + Σ (√λ_x - √λ_y)² where covariances share their axes, which here are made exact."""
    x = torch.randn(5000, 3, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    a, b = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), torch.tensor([2.0, 0.5, 0.3], dtype=torch.float64)
    found = frechet_distance((x * a) @ turn, (x * b + 2.0) @ turn)
    assert found == pytest.approx(12 + (a - b).square().sum().item(), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least 2 samples, got 1 and 5000"):
        frechet_distance(x[:1], x)


def test_random_convolutions_distinguish_changes() -> None:
    """The distance grows with noise, sees color and orientation, and is small between halves of one set."""
    pictures = datasets.to_numbers(datasets.shapes(2000, seed=0))
    real, other = random_convolutions(pictures[:1000]), pictures[1000:]
    assert real.shape == (1000, 384)
    distance = lambda x: frechet_distance(random_convolutions(x), real)  # noqa: E731
    noisy = [distance(other + level * torch.randn_like(other)) for level in (0.0, 0.3, 1.0)]
    assert noisy == sorted(noisy)
    assert noisy[0] < 0.1 * noisy[2]
    assert distance(other.mean(1, keepdim=True).expand_as(other)) > 5 * noisy[0]
    assert torch.equal(real, random_convolutions(pictures[:1000], batch=300))


def test_tiles() -> None:
    grid = tile(torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 2, 2), 2)
    assert grid.shape == (6, 6, 3)
    assert grid[0, 0, 0] == 0
    assert grid[0, 3, 0] == 1
    assert grid[3, 0, 0] == 2
    assert grid[2, 0, 0] == grid[3, 3, 0] == 255


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


def numbers(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.rows() if row["kind"] != "step"]


def test_smoke_run_and_its_summary(finished: Run) -> None:
    assert [(row["objective"], row["iteration"]) for row in finished.rows("progress")] == [
        (FLUX, 2), (DSM, 2), (FLUX, 4), (DSM, 4)
    ]  # fmt: skip
    assert {path.stem for path in finished.figures} == {"samples", "training", "distance"}
    text = (finished.out / "summary.md").read_text()
    assert "training step, flux" in text
    assert "Data: drawn discs" in text
    (floor,) = finished.rows("floor")
    assert floor["distance"] < 0.5 * floor["noise"]
    assert len(finished.rows("likelihood")) == 4  # 12 test images in minibatches of 8, two models


@pytest.mark.usefixtures("unpainted")
def test_of_a_finished_run_nothing_is_trained_again(finished: Run) -> None:
    rows = finished.rows()
    main(finished)
    assert finished.rows() == rows


def test_the_best_model_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second evaluation is made the worse one: the model of the first is sampled in the end."""
    judged = iter([1.0, 1.0, 2.0, 2.0])
    run = make_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "frechet_distance", lambda x, y: next(judged))
        patch.setattr(stages, "log_floor", lambda *a: None)
        data = datasets.load("shapes")
        run.log(kind="floor", samples=64, distance=1.0, noise=2.0)
        stages.train(run, (FLUX, DSM), data, Clock.start(0))
    best = stages.best_field(run, FLUX, data)
    first = make_trainer(make_run(tmp_path / "first"), FLUX, data, iterations=2)
    first.run()
    for p, q in zip(best.parameters(), averaged_field(first).parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.usefixtures("unpainted")
def test_time_that_is_up_and_further_commands(tmp_path: Path, finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flux steps take three times as long here, so one objective is always ahead; the end is that of one command."""
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    iterate = Trainer._train_iteration

    def slow(self: Trainer) -> dict[str, Tensor]:
        if self.folder is not None:  # not those that are timed
            clock["now"] += 3.0 if self.folder.name == FLUX else 1.0
        return iterate(self)

    monkeypatch.setattr(Trainer, "_train_iteration", slow)
    run = make_run(tmp_path, minutes=6 / 60)
    said = []
    while not (tmp_path / "summary.md").exists():
        try:
            main(run)
        except Paused as pause:
            said.append(str(pause))
    assert any("flux at iteration 1, DSM at iteration 2, of 4" in text for text in said)
    assert numbers(run) == numbers(finished)


def test_time_that_is_up_while_judging(tmp_path: Path) -> None:
    """Every command makes at least an iteration, but no samples once the time is up: those need a longer one."""
    run = make_run(tmp_path, minutes=1e-9)
    with pytest.raises(Paused, match="flux at iteration 1, DSM at iteration 1, of 4"):
        main(run)
    with pytest.raises(Paused, match="the time is up before samples of flux at iteration 2"):
        main(run)


def test_objectives_share_weights_and_options(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    data = datasets.load("shapes")
    trainers = {o: make_trainer(run, o, data, iterations=1) for o in (FLUX, DSM)}
    first = trainers[FLUX].loss.state_dict()
    for name, value in trainers[DSM].loss.named_parameters():
        assert torch.equal(value, first[name])
    assert trainers[FLUX].options == trainers[DSM].options


class Scaled(torch.nn.Module):
    """F(x, c_noise) = w x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("objective", [FLUX, FAST, DSM])
def test_every_objective_trains_what_it_uses(objective: str) -> None:
    torch.manual_seed(0)
    field = EDMField(Scaled(), 0.5)
    loss = make_loss(objective, field, LogNormalNoise(), LearnedHorizon(), backend="torch")
    value, logged = loss(torch.randn(8, 2), seed=1)
    value.backward()
    assert {name for name, p in loss.named_parameters() if p.grad is None} == set()
    more = {FLUX: {"horizon"}, FAST: {"horizon", "mixing"}, DSM: set()}[objective]
    assert {name.split(".")[0] for name, _ in loss.named_parameters()} == {"field", "normalizer"} | more
    assert logged["sigma"].shape == ()
    assert torch.equal(logged["loss"], value)


def test_paper_preset_has_the_papers_network(tmp_path: Path) -> None:
    paper = EXPERIMENT.config("paper")
    run = Run(EXPERIMENT, "paper", paper, None, torch.device("cpu"), 0, tmp_path, progress=False)
    assert sum(p.numel() for p in network(run, 32).parameters()) == pytest.approx(35.7e6, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"multipliers": (0, 1)}, "multipliers must be above 0"),
        ({"multipliers": ()}, "multipliers must not be empty"),
        ({"attention_level": 2}, "attention_level must be below 2, got 2"),
        ({"evaluations": 5}, "evaluations must be at most iterations, got 5 and 4"),
        ({"samples": 10}, "samples must be at least 64, got 10"),
        ({"sigma_min": 100.0}, "0 < sigma_min < sigma_max must hold, got 100.0 and 80.0"),
        ({"precision": "fp16"}, "precision must be one of 32-true, bf16-mixed, 16-mixed, 64-true, got 'fp16'"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(EXPERIMENT.config("smoke"), **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch": 5000}, "batch must be at most the 1024"),
        ({"multipliers": (1, 1, 1, 1, 1, 1)}, "size must be a multiple"),
    ],
)
def test_settings_that_do_not_suit_the_data(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        main(make_run(tmp_path, **changes))


def test_without_diffusers_or_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UsageError, match=r"need torch-fidelity, which cannot be imported .* or set fid=false"):
        main(make_run(tmp_path / "fid", fid=True))
    assert not (tmp_path / "fid" / "models").exists()  # said before any training
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match="UNet needs diffusers"):
        main(make_run(tmp_path / "diffusers"))


def test_fid_through_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments and results with a stand-in, as the network's weights are a download of 90 MB."""
    seen: dict[str, Any] = {}

    def calculate_metrics(**arguments: Any) -> dict[str, float]:
        seen.update(arguments)
        return {"frechet_inception_distance": 3.0, "inception_score_mean": 2.0}

    def extractor(name: str, features: list[str], feature_extractor_weights_path: str | None) -> None:
        if feature_extractor_weights_path is None:
            raise OSError("no network")

    module, part = (type(sys)(name) for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"))
    module.calculate_metrics = calculate_metrics  # type: ignore[attr-defined]
    part.FeatureExtractorInceptionV3 = extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, part.__name__, part)
    pixels = datasets.shapes(5, seed=0)
    cpu = torch.device("cpu")
    assert fidelity.fid_and_inception_score(pixels, pixels, "weights.pth", cpu) == (3.0, 2.0)
    assert torch.equal(seen["input1"][3], pixels[3])
    assert len(seen["input2"]) == 5
    assert seen["cuda"] is False
    with pytest.raises(UsageError, match=r"cannot be had .OSError: no network.; give their file by inception_weights"):
        fidelity.check("")
    with pytest.raises(UsageError, match=r"no file missing.pth"):
        fidelity.check("missing.pth")


def test_images_that_represent_sorted_data_are_of_all_classes(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    chosen = stages.choice(run, 1000, 100)
    assert len(chosen.unique()) == 100
    assert chosen.min() < 100
    assert chosen.max() >= 900
    assert torch.equal(chosen, stages.choice(run, 1000, 100))


def test_samples_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="x must be finite; the field or the sampler diverged"):
        datasets.to_bytes(torch.tensor([torch.nan]))
