"""The experiments by name, and what each declares about itself."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from experiments.common.run import Run

NAMES: tuple[str, ...] = (
    "controllable",
    "stationarity",
    "horizon",
    "convergence",
    "rna_velocity",
    "images",
    "fast_mixing",
    "springs",
)
PRESETS = ("smoke", "small", "paper")
GPU = "gpu"  # of experiments that one GPU brings far in some minutes


class Paused(Exception):  # noqa: N818 - nothing is wrong
    """A run has used up the time it was given; the same command goes on. Its text says how far it is."""


class UsageError(ValueError):
    """A mistake the user can mend. The command line shows its text as one line and exits with 2."""


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    Args:
        name: folder below `experiments/` and name on the command line, such as "controllable".
        title: one line for `list`.
        paper: sections and figures, such as "Sec. 4.1, B.1, Fig. 2 and 4".
        claim: what it must show, in one or two sentences.
        presets: "smoke", "small", "paper", and "gpu" where there is one; each an instance of the same frozen
            dataclass whose fields are int, float, bool, str or tuples of those.
        run: does the work and ends with `Run.summary`.

    Raises:
        ValueError: `presets` is not as described.
    """

    name: str
    title: str
    paper: str
    claim: str
    presets: Mapping[str, Any]
    run: Callable[[Run], None]

    def __post_init__(self) -> None:
        if set(self.presets) - {GPU} != set(PRESETS):
            raise ValueError(f"{self.name}: presets must be {', '.join(PRESETS)}; got {sorted(self.presets)}")
        kinds = {type(config) for config in self.presets.values()}
        kind = kinds.pop()
        if kinds or not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise ValueError(f"{self.name}: presets must be instances of one frozen dataclass")

    def configure(self, preset: str, overrides: Iterable[str] = ()) -> Any:
        """The preset's config with `key=value` overrides applied, each value read as its field's type.

        A tuple is written with commas: `sigmas=0.1,0.5`. The last of two overrides of one field counts.

        Raises:
            UsageError: an unknown preset or field, a value that is not of the field's type, an absolute path (the
                config goes to files that are published), or a value that the config itself refuses.
        """
        if preset not in self.presets:
            raise UsageError(f"{self.name} has no preset {preset!r}; there are {', '.join(self.presets)}")
        config = self.presets[preset]
        kinds = get_type_hints(type(config))
        fields = ", ".join(f"{name} ({_kind_name(kind)})" for name, kind in kinds.items())
        values: dict[str, Any] = {}
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise UsageError(f"--set {override}: write key=value; fields: {fields}")
            if key not in kinds:
                raise UsageError(f"--set {override}: {self.name} has no field {key!r}; fields: {fields}")
            try:
                values[key] = _parse(text, kinds[key])
            except ValueError as error:
                why = f"{key} takes {_kind_name(kinds[key])}, {error}"
                raise UsageError(f"--set {override}: {why}; fields: {fields}") from None
        try:
            return dataclasses.replace(config, **values)
        except ValueError as error:
            raise UsageError(f"--set {' '.join(f'{k}={_text(v)}' for k, v in values.items())}: {error}") from error

    def overrides(self, preset: str, config: Any) -> list[str]:
        """The `key=value` overrides that turn the preset into `config`: the inverse of `configure`."""
        base = self.presets[preset]
        changed = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(base, field.name)
        }
        return [f"{key}={_text(value)}" for key, value in changed.items()]


def check_sizes(config: Any, **least: int) -> None:
    """Raise ValueError unless every number of a config is finite and above 0, or at least what is named for it.

    Numbers in tuples count too.
    """
    for name, value in vars(config).items():
        entries = value if isinstance(value, tuple) else (value,)
        numbers = [entry for entry in entries if not isinstance(entry, str)]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"{name} must be finite, got {_text(value)}")
        if name in least and not all(number >= least[name] for number in numbers):
            raise ValueError(f"{name} must be at least {least[name]}, got {_text(value)}")
        if name not in least and not all(number > 0 for number in numbers):
            raise ValueError(f"{name} must be above 0, got {_text(value)}")


def load_experiment(name: str) -> Experiment:
    """Import one experiment.

    Raises:
        UsageError: there is no experiment of that name.
    """
    if name not in NAMES:
        raise UsageError(f"no experiment {name!r}; there are {', '.join(NAMES)}")
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    assert isinstance(experiment, Experiment)
    return experiment


def load_experiments() -> dict[str, Experiment]:
    """Import all experiments, in the order of the paper."""
    return {name: load_experiment(name) for name in NAMES}


def _parse(text: str, kind: Any) -> Any:
    """Read `text` as `kind`; a ValueError says what was wrong with the text."""
    if get_origin(kind) is tuple:
        parts = text.split(",")
        if parts[-1] == "":  # an empty tuple, or the comma that ends a tuple of one
            parts.pop()
        kinds = get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(parts)
        if len(kinds) != len(parts):
            raise ValueError(f"got {len(parts)} values for {len(kinds)}")
        return tuple(_parse(part.strip(), item) for part, item in zip(parts, kinds, strict=True))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"got {text!r} for true or false")
        return text.lower() == "true"
    if kind is str and os.path.isabs(text):
        raise ValueError("got an absolute path; give it relative, for the results are made to be published")
    if kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"got {text!r}") from None
    raise ValueError("which cannot be given on the command line")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_text(item) for item in value)
    return str(value)


def _kind_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
