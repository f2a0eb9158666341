"""A trained field of a finished run as an example for `fluxmatching.load_example`: weights, config and model card."""

from __future__ import annotations

import hashlib
import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common.objectives import averaged_field
from experiments.common.registry import UsageError, load_experiment
from experiments.common.results import spread
from experiments.common.run import Run, is_finished, read_config
from experiments.common.summary import SOURCE, table
from fluxmatching import EDMField, Trainer, load_example
from fluxmatching.examples import CARD, CONFIG, FORMAT, NETWORKS, WEIGHTS

LARGEST = 2_000_000  # bytes of an example's weights
NOISES = 6  # draws of samples, whose figures fluctuate
WIDTH = 120  # of a card's lines
COLUMNS = ("quantity", "this file", "in float32, by the run", "perfect model")
ENTRIES = ("seed", "device", "duration", "versions", "date", "commit")  # of a run, in a card
FRONT_MATTER = """---
license: mit
library_name: fluxkernels
tags:
- flux-matching
- generative-model
---"""


@dataclass(frozen=True)
class Measured:
    """One line of a card's table, as text.

    Args:
        quantity: what was measured.
        exported: its value for the field as `load_example` returns it.
        trained: the value that the run measured, in float32.
        perfect: the value of a perfect model, if known.
    """

    quantity: str
    exported: str
    trained: str
    perfect: str = "–"


@dataclass(frozen=True)
class TrainedField:
    """A trained field of a run, and what its model card states.

    Args:
        name: of the example.
        field: moving average of the training.
        arguments: arguments of the constructor of `field.network`.
        shape: shape of one sample.
        sigma_min, sigma_max: noise levels of training and sampling.
        sampler: function of `fluxmatching` with arguments (field, start, sigmas) that the card shows.
        schedule: function of `fluxmatching` that makes its noise levels from (num_steps, sigma_min, sigma_max).
        num_steps: number of steps of the sampler.
        data, training: sentences of the card.
        measure: measures the field that was read back.
        limits: sentences of the card.
    """

    name: str
    field: EDMField
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    sigma_min: float
    sigma_max: float
    sampler: str
    schedule: str
    num_steps: int
    data: str
    training: str
    measure: Callable[[nn.Module], list[Measured]]
    limits: tuple[str, ...]


def export_example(folder: Path, out: Path) -> Path:
    """Write the example of a finished run, and measure it as it is read back.

    Args:
        folder: the run's folder.
        out: folder of examples, in which the example's own folder is made or replaced.

    Returns:
        The example's folder.

    Raises:
        UsageError: there is no finished run in `folder`, its experiment has no example, the field is too large, or
            `out` cannot be written. What was in the example's folder stays as it was.
    """
    run = open_run(folder)
    if run.experiment.example is None:
        raise UsageError(f"{run.experiment.name} has no example to export")
    trained: TrainedField = run.experiment.example(run)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    content = weights(trained)
    config = json.dumps(described(trained, content), indent=2) + "\n"
    place = out / trained.name
    with _writing(place):
        out.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".export-", dir=out)
    with temporary:
        new = Path(temporary.name) / trained.name
        with _writing(place):
            new.mkdir()
            (new / WEIGHTS).write_bytes(content)
            _write(new / CONFIG, config)
            _write(new / CARD, "")  # needs the figures of the field that is loaded next
        measured = trained.measure(load_example(trained.name, temporary.name, run.device).field)
        same = run.device == recorded_device(folder)
        with _writing(place):
            _write(new / CARD, card(trained, measured, summary, len(content), same_device=same))
            place.mkdir(exist_ok=True)
            for name in (WEIGHTS, CONFIG, CARD):
                (new / name).replace(place / name)
    return place


def over_noises(quantity: str, found: Sequence[float], trained: float, perfect: str, digits: int) -> list[Measured]:
    """Return the lines of a figure of samples that fluctuates from draw to draw.

    Args:
        quantity: what was measured.
        found: value for each of several noises, that of the run first.
        trained: the value that the run measured.
        perfect: the value of a perfect model.
        digits: number of decimals.
    """
    return [
        Measured(f"{quantity}, mean ± deviation of {len(found)} noises", spread(found, f".{digits}f"), "–", perfect),
        Measured("the same, for the noise of the run alone", f"{found[0]:.{digits}f}", f"{trained:.{digits}f}"),
    ]


def trained_field(trainer: Trainer, iterations: int) -> EDMField:
    """Return the moving average of a trainer that resumed at its end.

    Raises:
        UsageError: it did not, since its checkpoint is gone.
    """
    if trainer.iteration != iterations:
        raise UsageError(f"{trainer.folder} must have a checkpoint at iteration {iterations}, got {trainer.iteration}")
    field = averaged_field(trainer)
    assert isinstance(field, EDMField)
    return field


def open_run(folder: Path) -> Run:
    """Return the finished run in a folder, on its device, or on the CPU where that is absent.

    Raises:
        UsageError: there is none, or its settings are not those of this version.
    """
    found = read_config(folder)
    if found is None or not is_finished(folder):
        raise UsageError(
            f"{folder} holds no finished run; make one with `python -m experiments run NAME --out {folder}`"
        )
    experiment = load_experiment(found["experiment"])
    entries = {name: tuple(value) if isinstance(value, list) else value for name, value in found["config"].items()}
    try:
        config = type(experiment.config(found["preset"]))(**entries)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder} was made by another version of {experiment.name}: {error}") from error
    device = recorded_device(folder)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        device = torch.device("cpu")
    # Without the backend of the run, which may be absent here too: no op is called.
    return Run(experiment, found["preset"], config, None, device, found["seed"], folder, progress=False, read_only=True)


def recorded_device(folder: Path) -> torch.device:
    """Return the device that a finished run was made on."""
    found = read_config(folder)
    assert found is not None
    return torch.device(found["device"])


def weights(trained: TrainedField) -> bytes:
    """Return the file of the weights, in float16, which halves it.

    Raises:
        UsageError: a weight has no finite value in float16, safetensors is missing, or the file is too large.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UsageError("export needs safetensors: pip install 'fluxkernels[experiments]'") from error
    numbers: dict[str, Tensor] = {
        name: value.detach().cpu().half().contiguous() for name, value in trained.field.state_dict().items()
    }
    if bad := [name for name, value in numbers.items() if not value.isfinite().all()]:
        raise UsageError(f"{trained.name}: {bad[0]} is not finite in float16")
    content: bytes = save(numbers)
    if len(content) > LARGEST:
        raise UsageError(f"{trained.name}: weights must have at most {LARGEST} bytes, got {len(content)}")
    return content


def described(trained: TrainedField, content: bytes) -> dict[str, Any]:
    """Return the content of config.json for a file of weights.

    Raises:
        UsageError: the network is none that `load_example` knows.
    """
    network = type(trained.field.network).__name__
    if network not in NETWORKS:
        raise UsageError(f"{trained.name}: network must be one of {', '.join(NETWORKS)}, got {network}")
    return {
        "format": FORMAT,
        "network": network,
        "arguments": trained.arguments,
        "sigma_data": trained.field.sigma_data,
        "sigma_min": trained.sigma_min,
        "sigma_max": trained.sigma_max,
        "shape": list(trained.shape),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def card(
    trained: TrainedField, measured: list[Measured], summary: dict[str, Any], size: int, *, same_device: bool
) -> str:
    """Return the text of a model card, with the front matter of model hubs.

    Args:
        trained: the field.
        measured: lines of the table.
        summary: content of the run's summary.json.
        size: bytes of the weights.
        same_device: whether the field was measured on the run's device, and so with the same noise.
    """
    noise = "are from the same noise" if same_device else "may be from different noise: the run had another device"
    count = sum(value.numel() for value in trained.field.state_dict().values())
    entries = {name: summary["entries"][name] for name in ENTRIES if name in summary["entries"]}
    rows = [(m.quantity, m.exported, m.trained, m.perfect) for m in measured]
    command = f"{summary['command']}\npython -m experiments export FOLDER_OF_THE_RUN"
    sections = {
        f"# {trained.name}: an example of `fluxmatching`": [
            f"A field f(x, σ) trained by Flux Matching, {count} parameters in {size / 1000:.0f} kB.",
            f"{SOURCE}, {summary['paper']}.",
            f"```python\n{usage(trained)}\n```",
        ],
        "## Data": [_wrap(trained.data)],
        "## Training": [
            _wrap(trained.training),
            f"```\n{command}\n```",
            "\n".join(table(("entry", "value"), list(entries.items()))),
            "The run also trained the fields that it compares with this one. Its duration includes them.",
        ],
        "## Measured quality": [
            "\n".join(table(COLUMNS, rows)),
            _wrap(f"Samples of both fields {noise}. The weights of this file are rounded to float16."),
        ],
        "## Intended use": [
            "Examples, tests of samplers and losses, and a start for further training, without a training of your own."
        ],
        "## Limits": ["\n".join(_wrap(f"- {limit}", "  ") for limit in trained.limits)],
        "## License": ["MIT, as the package."],
    }
    parts = [FRONT_MATTER, *(text for heading, texts in sections.items() for text in (heading, *texts))]
    return "\n\n".join(parts) + "\n"


def usage(trained: TrainedField) -> str:
    """Return the lines of Python that sample the example."""
    names = ", ".join(sorted({trained.sampler, trained.schedule, "load_example"}))
    return f"""import torch
from fluxmatching import {names}

example = load_example("{trained.name}")
sigmas = {trained.schedule}({trained.num_steps}, example.sigma_min, example.sigma_max)
start = example.sigma_max * torch.randn(16, *example.shape)
with torch.no_grad():
    samples = {trained.sampler}(example.field, start, sigmas)"""


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write to {place}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
