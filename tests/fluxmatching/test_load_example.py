"""Examples: the shipped ones have the quality that their cards state, and files that are wrong are refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxmatching import (
    EDMField,
    Example,
    edm_heun,
    exponential_schedule,
    karras_schedule,
    load_example,
    predictor_corrector,
    reverse_ve,
)
from fluxmatching.examples import CARD, CONFIG, FILES, NETWORKS, WEIGHTS

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

SHIPPED = Path(__file__).parents[2] / "python_api" / "fluxmatching" / "example_models"
NAMES = sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))
CONTENT = {
    "format": 1, "network": "Perceptron", "arguments": {"dim": 2, "width": 8}, "sigma_data": 1.5, "sigma_min": 0.1,
    "sigma_max": 10.0, "shape": [2],
}  # fmt: skip


def make_field() -> EDMField:
    return EDMField(NETWORKS["Perceptron"](dim=2, width=8), 1.5)


def write(folder: Path, weights: dict[str, Tensor] | bytes, **changes: Any) -> Path:
    """Write an example "own" with entries of its config changed; the checksum suits the weights."""
    content = weights if isinstance(weights, bytes) else safetensors.save(weights)
    entries = {**CONTENT, "sha256": hashlib.sha256(content).hexdigest(), **changes}
    (folder / "own").mkdir(parents=True)
    (folder / "own" / WEIGHTS).write_bytes(content)
    (folder / "own" / CONFIG).write_text(json.dumps(entries))
    (folder / "own" / CARD).write_text("")
    return folder


MEANS = 1.8 * torch.tensor([[0.0, 1.0], [-(0.75**0.5), -0.5], [0.75**0.5, -0.5]])


def stated(name: str) -> list[tuple[float, float, float]]:
    """The numbers of a card's table, or their means: of the file, of the run, of a perfect model; nan if not known."""
    card = (SHIPPED / name / CARD).read_text(encoding="utf-8")
    table = card.split("## Measured quality")[1].split("##")[0]
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    cells = [[cell.strip(" |").split(" ± ")[0].replace("–", "nan") for cell in row] for row in cells[2:]]
    file, run, perfect = ([row[k] for row in cells] for k in (1, 2, 3))
    return list(zip(map(float, file), map(float, run), map(float, perfect), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_field_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    """Bit for bit in every dtype of the file; the field is in float32, and the caller's random numbers go on."""
    field = make_field()
    field.load_state_dict({name: value.to(dtype) for name, value in field.state_dict().items()})
    write(tmp_path, {name: value.to(dtype) for name, value in field.state_dict().items()})
    state = torch.get_rng_state()
    example = load_example("own", tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    z, sigma = torch.randn(50, 2), 10 ** (2 * torch.rand(50) - 1)
    assert torch.equal(example.field(z, sigma), field(z, sigma))
    assert {value.dtype for value in example.field.state_dict().values()} == {torch.float32}
    assert not example.field.training
    assert (example.name, example.shape, example.sigma_min, example.sigma_max) == ("own", (2,), 0.1, 10.0)
    assert example.card == tmp_path / "own" / CARD


def test_defaults_of_the_caller_change_nothing(tmp_path: Path) -> None:
    write(tmp_path, make_field().state_dict())
    usual = load_example("own", tmp_path).field.state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = load_example("own", tmp_path).field.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, found[name]) for name, value in usual.items())


def test_a_field_can_be_trained_further(tmp_path: Path) -> None:
    field = load_example("own", write(tmp_path, make_field().state_dict())).field
    field(torch.randn(5, 2), 1.0).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in field.parameters())


def test_where_examples_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument, then the variable, then the package."""
    monkeypatch.setenv("FLUXMATCHING_EXAMPLES", str(write(tmp_path / "named", make_field().state_dict())))
    write(tmp_path / "given", make_field().state_dict())
    assert load_example("own").card.parts[-3] == "named"
    assert load_example("own", str(tmp_path / "given")).card.parts[-3] == "given"
    with pytest.raises(
        ValueError, match=r"name must be one of own in .*named \(FLUXMATCHING_EXAMPLES\), got 'mixture'"
    ):
        load_example("mixture")
    monkeypatch.setenv("FLUXMATCHING_EXAMPLES", "")
    assert load_example("mixture").card == SHIPPED / "mixture" / CARD


def test_a_missing_folder_is_named_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"folder must exist, got .*absent \({}\); in a checkout of the repository, `python .*absent` makes it"
    with pytest.raises(FileNotFoundError, match=message.format("the argument folder")):
        load_example("own", tmp_path / "absent")
    monkeypatch.setenv("FLUXMATCHING_EXAMPLES", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=message.format("FLUXMATCHING_EXAMPLES")):
        load_example("own")


@pytest.mark.parametrize("name", ["none", "", ".", "..", "../own", "own/", "own/../own", "/", None, 3])
def test_other_names_are_refused_with_those_found(tmp_path: Path, name: Any) -> None:
    """Also names of paths to an example that exists, from beside it, from above it and from the root."""
    write(tmp_path / "inside", make_field().state_dict())
    write(tmp_path, make_field().state_dict())
    for wrong in (name, str(tmp_path / "own")):
        with pytest.raises(ValueError, match=r"name must be one of own in .*inside \(the argument folder\), got "):
            load_example(wrong, tmp_path / "inside")
    with pytest.raises(ValueError, match=r"own \(the argument folder\) holds no examples"):
        load_example("own", tmp_path / "inside" / "own")


def test_a_folder_that_is_no_path_is_named() -> None:
    with pytest.raises(TypeError, match="load_example: folder must be a path or None, got int"):
        load_example("own", 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "must have format 1"),
        ({"format": None}, "must have format 1"),
        ({"more": 1}, "must have the entries format, network"),
        ({"network": "os.system"}, "network must be one of 'Perceptron', 'TrajectoryTransformer', 'UNet'"),
        ({"network": ["Perceptron"]}, "network must be one of"),
        ({"arguments": None}, "do not fit Perceptron"),
        ({"arguments": {"size": 3}}, "do not fit Perceptron"),
        ({"arguments": {"dim": 2, "width": "8"}}, "do not fit Perceptron"),
        ({"arguments": {"dim": 2, "width": -8}}, "do not fit Perceptron"),
        ({"network": "TrajectoryTransformer", "arguments": {"width": 3}}, "do not fit TrajectoryTransformer"),
        ({"arguments": {"dim": 2, "width": 9}}, "does not hold the weights of config.json"),
        ({"network": "TrajectoryTransformer", "arguments": {"width": 16}}, "does not hold the weights"),
        ({"sigma_data": 0}, "sigma_data must be a positive number"),
        ({"sigma_data": "1"}, "sigma_data must be a positive number"),
        ({"sigma_min": 10.0}, "0 < sigma_min < sigma_max must hold"),
        ({"sigma_max": "10"}, CONFIG),
        ({"sigma_max": math.nan}, "0 < sigma_min < sigma_max must hold"),
        ({"shape": 2}, "must be a list of sizes"),
        ({"shape": [2.0]}, "must be a list of sizes"),
        ({"shape": [-2]}, "must be a list of sizes"),
        ({"shape": [3]}, r"does not take samples of shape \[3\]"),
        ({"shape": []}, "must be a list of sizes"),
        ({"sha256": "0" * 64}, "is damaged or of another export"),
        ({"sha256": None}, "is damaged or of another export"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_example("own", write(tmp_path, make_field().state_dict(), **changes))
    assert str(tmp_path / "own") in str(caught.value)


def without_last(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(weights.items())[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.to(torch.int32), "must have a floating dtype, got torch.int32"),
        (lambda value: value * math.nan, "must be finite, got NaN or infinity"),
    ],
)
def test_the_error_names_what_is_wrong_with_the_weights(
    tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    weights = {name: change(value) for name, value in make_field().state_dict().items()}
    with pytest.raises(ValueError, match=rf"of config\.json: \S+ {message}"):
        load_example("own", write(tmp_path, weights))


@pytest.mark.parametrize(
    "change",
    [
        without_last,
        lambda weights: {**weights, "more": torch.zeros(1)},
        lambda weights: {name: value[..., :1].contiguous() for name, value in weights.items()},
        lambda weights: {name: value.to(torch.int32) for name, value in weights.items()},
        lambda weights: {name: value.to(torch.complex64) for name, value in weights.items()},
        lambda weights: {name: value * math.inf for name, value in weights.items()},
        lambda weights: {},
        lambda weights: safetensors.save(weights)[:-4],
        lambda weights: b"",
        lambda weights: b"\xff" * 100,
    ],
    ids=["missing", "more", "shapes", "integers", "complex", "infinite", "empty", "truncated", "no bytes", "noise"],
)
def test_wrong_weights_are_refused(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    """Also with the right checksum."""
    with pytest.raises(ValueError, match=r"own.model\.safetensors does not hold the weights of config\.json"):
        load_example("own", write(tmp_path, change(make_field().state_dict())))


def test_one_changed_bit_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, make_field().state_dict())
    content = bytearray((tmp_path / "own" / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (tmp_path / "own" / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or of another export"):
        load_example("own", tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"format": 1}', "\x00"])
def test_a_damaged_config_is_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path, make_field().state_dict())
    (tmp_path / "own" / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=r"load_example: .*own.config\.json must"):
        load_example("own", tmp_path)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    write(tmp_path, make_field().state_dict())
    (tmp_path / "own" / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"own.{file} must exist; an example has model\.safetensors, config"):
        load_example("own", tmp_path)


def test_without_safetensors_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, make_field().state_dict())
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"load_example needs safetensors: pip install 'fluxkernels\[experiments\]'"):
        load_example("own", tmp_path)


def test_the_three_are_there_and_small() -> None:
    assert NAMES == ["images", "mixture", "springs"]
    assert max((SHIPPED / name / WEIGHTS).stat().st_size for name in NAMES) < 2_000_000
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 1_500_000


@pytest.mark.parametrize("name", NAMES)
def test_the_block_of_a_card_runs(name: str) -> None:
    if name == "images":
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    (block,) = re.findall(r"```python\n(.*?)```", (SHIPPED / name / CARD).read_text("utf-8"), flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    assert isinstance(found["example"], Example)
    assert found["samples"].shape == (16, *found["example"].shape)
    assert found["samples"].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_rounding_of_the_weights_changes_no_figure(name: str) -> None:
    """The file and the field of the run, from the same noise."""
    (mean, _, perfect), (file, run, _), *_ = stated(name)
    assert file == pytest.approx(run, rel=0.02)
    assert file == pytest.approx(mean, rel=0.3)
    assert perfect < mean


def test_samples_of_the_mixture_are_as_near_to_exact_ones_as_its_card_states() -> None:
    """Against the three Gaussians in closed form, by projections sorted here."""
    example, generator = load_example("mixture"), torch.Generator().manual_seed(1)
    start = example.sigma_max * torch.randn(10_000, 2, generator=generator)
    sigmas = exponential_schedule(20, example.sigma_min, example.sigma_max)
    found = predictor_corrector(example.field, start, sigmas, generator=generator)
    means = MEANS[torch.randint(3, (10_000,), generator=generator)]
    exact = means + (0.05 + example.sigma_min**2) ** 0.5 * torch.randn(10_000, 2, generator=generator)
    angles = torch.arange(8) * torch.pi / 8
    directions = torch.stack([angles.cos(), angles.sin()])
    distance = ((found @ directions).sort(0).values - (exact @ directions).sort(0).values).square().mean().mul(2).sqrt()
    (file, _, perfect), _, (spread, _, _), _ = stated("mixture")
    # Both fluctuate with the shares of the Gaussians, by about as much as exact samples differ from exact ones.
    assert distance.item() == pytest.approx(file, abs=perfect)
    nearest = torch.cdist(found, MEANS).argmin(1)
    assert (found - MEANS[nearest]).square().mean().sqrt().item() == pytest.approx(spread, rel=0.05)
    for k in range(3):
        assert (nearest == k).double().mean().item() == pytest.approx(1 / 3, abs=0.04)
        torch.testing.assert_close(found[nearest == k].mean(0), MEANS[k], rtol=0, atol=0.15)


def test_the_field_of_the_mixture_is_near_the_score_where_noise_dominates() -> None:
    """At σ = 10 the mixture is nearly one Gaussian, whose field is -z/(v + σ²)."""
    example = load_example("mixture")
    z = 10 * torch.randn(1000, 2)
    with torch.no_grad():
        found = example.field(z, 10.0)
    exact = -z / (100 + 0.05 + 1.8**2 / 2)
    assert (found - exact).norm() < 0.15 * exact.norm()


def simulated(count: int) -> Tensor:
    """Trajectories of Eq. 46 by many small steps of the explicit midpoint rule."""

    def velocity(state: Tensor) -> Tensor:
        q, v = state[:, ::2], state[:, 1::2]
        coupling = 0.7 * (q - q.flip(1))
        return torch.stack([v, -q - coupling - 0.08 * v - 0.08 * q**3], 2).flatten(1)

    state = torch.randn(count, 4, dtype=torch.float64) * torch.tensor([3, 1.5, 3, 1.5])
    states, step = [state], 0.01
    for index in range(1, 491):
        state = state + step * velocity(state + step / 2 * velocity(state))
        if index % 10 == 0:
            states.append(state)
    return torch.stack(states, 1).float()


def test_samples_of_the_springs_are_as_near_to_simulated_ones_as_its_card_states() -> None:
    """W2 to trajectories simulated here, relative to that of exact ones; and the spread."""
    ot = pytest.importorskip("ot", reason="POT is not installed")
    example = load_example("springs")
    real, others = simulated(1000), simulated(100)

    def w2(x: Tensor) -> float:
        costs = torch.cdist(x.flatten(1).double(), real.flatten(1).double()).square().numpy()
        return float(ot.emd2([], [], costs, numItermax=1_000_000)) ** 0.5

    sigmas = exponential_schedule(128, example.sigma_min, example.sigma_max)
    found = reverse_ve(example.field, example.sigma_max * torch.randn(100, *example.shape), sigmas)
    (file, _, perfect), _, *parts = stated("springs")
    # The card has five times as many: there, less of both distances is due to the number of samples.
    assert 1.05 < w2(found) / w2(others) < file / perfect
    assert w2(found) < 0.75 * w2(0 * found)
    for x, column in ((found, 0), (real, 2)):
        for series, lines in ((x, parts[:3]), (x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2], parts[3:])):
            for point, line in zip((0, series.shape[1] // 2, -1), lines, strict=True):
                assert series[:, point].square().mean().sqrt().item() == pytest.approx(line[column], rel=0.3)


def test_the_field_of_the_springs_sees_the_past_alone() -> None:
    field = load_example("springs").field
    z = torch.randn(2, 50, 4)
    changed = z.clone()
    changed[:, 30:] += 1
    with torch.no_grad():
        difference = (field(changed, 1.0) - field(z, 1.0)).abs().amax((0, 2))
    assert difference[:30].max() < 1e-5
    assert difference[30:].min() > 1e-3


def test_samples_of_the_images_are_discs_on_a_background_of_one_color() -> None:
    """Colors are uniform on [-1, 1], and a disc reaches no corner: corners have one color, where noise has four."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    example = load_example("images")
    sigmas = karras_schedule(18, example.sigma_min, example.sigma_max)
    x = edm_heun(example.field, example.sigma_max * torch.randn(64, *example.shape), sigmas)
    assert x.mean().item() == pytest.approx(0, abs=0.1)
    assert x.std().item() == pytest.approx(3**-0.5, abs=0.1)
    corners = x[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.std(2).mean() < 0.15
    inside = (x[:, :, 4:12, 4:12] - corners.mean(2)[..., None, None]).abs().amax((1, 2, 3))
    assert inside.median() > 0.5
