"""The experiments by name, and what each declares about itself."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRESETS = ("smoke", "small", "paper")
GPU = "gpu"  # of experiments that one GPU brings far in some minutes


class Paused(Exception):  # noqa: N818 - nothing is wrong
    """A run has used up the time it was given; the same command continues it. The text reports how far it is."""


class UsageError(ValueError):
    """A mistake that the user can correct. The command line prints the text as one line and exits with 2."""


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    Args:
        name: folder below `experiments/` and name on the command line, such as "controllable".
        title: one line for `list`.
        paper: sections and figures, such as "Sec. 4.1, B.1, Fig. 2 and 4"; `list` is sorted by it.
        claim: what it must show, in one or two sentences.
        presets: "smoke", "small", "paper", and "gpu" if there is one; each an instance of the same frozen
            dataclass whose fields are int, float, bool, str or tuples of those.
        main: does the work of one `Run` and ends with `Run.summary`.
        example: returns the `export.TrainedField` of a finished `Run` that `export` writes; None if there is none.

    Raises:
        ValueError: `presets` is not as described.
    """

    name: str
    title: str
    paper: str
    claim: str
    presets: Mapping[str, Any]
    main: Callable[[Any], None]
    example: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if set(self.presets) - {GPU} != set(PRESETS):
            raise ValueError(f"{self.name}: presets must be {', '.join(PRESETS)}; got {sorted(self.presets)}")
        kinds = {type(config) for config in self.presets.values()}
        kind = kinds.pop()
        if kinds or not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise ValueError(f"{self.name}: presets must be instances of one frozen dataclass")

    def config(self, preset: str) -> Any:
        """Return the config of a preset.

        Raises:
            UsageError: there is no preset of that name.
        """
        if preset not in self.presets:
            raise UsageError(f"{self.name} has no preset {preset!r}; there are {', '.join(self.presets)}")
        return self.presets[preset]

    def overrides(self, preset: str, config: Any) -> list[str]:
        """Return the words on the command line that turn the preset into `config`."""
        base = self.presets[preset]
        words: list[str] = []
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value != getattr(base, field.name):
                words += _as_words(field.name, value)
        return words


def check_sizes(config: Any, **least: int) -> None:
    """Raise ValueError unless every number of a config is finite, and above 0 or at least its limit in `least`.

    Numbers in tuples count too, bools do not.
    """
    for name, value in vars(config).items():
        entries = value if isinstance(value, tuple) else (value,)
        got = ",".join(map(str, entries))
        numbers = [entry for entry in entries if not isinstance(entry, (str, bool))]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"{name} must be finite, got {got}")
        if name in least and not all(number >= least[name] for number in numbers):
            raise ValueError(f"{name} must be at least {least[name]}, got {got}")
        if name not in least and not all(number > 0 for number in numbers):
            raise ValueError(f"{name} must be above 0, got {got}")


def experiment_names() -> tuple[str, ...]:
    """Return the names of the folders of experiments, in alphabetical order."""
    folders = pkgutil.iter_modules([str(Path(__file__).parents[1])])
    return tuple(sorted(folder.name for folder in folders if folder.ispkg and folder.name != "common"))


def load_experiment(name: str) -> Experiment:
    """Import one experiment.

    Raises:
        UsageError: there is no experiment of that name.
    """
    names = experiment_names()
    if name not in names:
        raise UsageError(f"no experiment {name!r}; there are {', '.join(names)}")
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    assert isinstance(experiment, Experiment)
    return experiment


def load_experiments() -> list[Experiment]:
    """Import all experiments, sorted by their place in the paper."""
    return sorted(map(load_experiment, experiment_names()), key=lambda experiment: experiment.paper)


def _as_words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--config.{name}" if value else f"--config.no_{name}"]
    if isinstance(value, tuple):
        return [f"--config.{name}", *map(str, value)]
    if isinstance(value, str) and value.startswith("-"):  # a word of its own would be read as an option
        return [f"--config.{name}={value}"]
    return [f"--config.{name}", str(value)]
