"""The options of `python -m experiments run`, with typed overrides of the preset's fields."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

from experiments.common.registry import UsageError, load_experiment

PROGRAM = "python -m experiments"
C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class Options(Generic[C]):
    """Run one experiment. The same command again resumes an interrupted run.

    Args:
        name: which experiment; `list` shows them, and `run NAME --help` the fields of its presets
        preset: seconds, minutes on two cores, minutes on a GPU (some experiments), or the paper's settings
        backend: how the ops are computed; auto takes the fastest that works here
        device: where tensors go; auto takes cuda if there is one
        seed: all random numbers follow from it
        out: folder for all results; by default runs/NAME-PRESET
        restart: delete the run in that folder first
        quiet: no progress bars
        config: fields of the preset, each of which can be changed
    """

    name: Annotated[Positional[str], arg(metavar="NAME")]
    preset: Literal["smoke", "small", "gpu", "paper"] = "small"
    backend: Annotated[str, arg(metavar="{auto,torch,cpu,triton}")] = "auto"
    device: Annotated[str, arg(metavar="{auto,cpu,cuda,cuda:N}")] = "auto"
    seed: int = 0
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    restart: FlagCreatePairsOff[bool] = False
    quiet: FlagCreatePairsOff[bool] = False
    config: C


@dataclass(frozen=True, kw_only=True)
class WithoutConfig(Options[None]):
    __doc__ = Options.__doc__  # of the help: before the experiment is known there is no config to show

    # With a default: tyro builds the parser of every command, also to report an unknown one.
    config: Suppress[None] = None


_UNKNOWN: Any = WithoutConfig(name=tyro.MISSING)


def read_options(words: Sequence[str]) -> Options[Any]:
    """Read the words after `run`.

    Raises:
        UsageError: an option that does not exist, a value of the wrong type or refused by the config itself, an
            unknown experiment or preset, or an absolute path in the config, which goes to files that are published.
        SystemExit: after the help, if it was requested.
    """
    help_flags = [word for word in words if word in ("-h", "--help")]
    others = [word for word in words if word not in help_flags]
    if help_flags and not others:
        tyro.cli(WithoutConfig, default=_UNKNOWN, prog=f"{PROGRAM} run", args=help_flags)
    with _one_line_errors():
        # First the experiment and its preset, which give the type and the defaults of the rest.
        chosen, _ = tyro.cli(
            WithoutConfig,
            default=_UNKNOWN,
            prog=f"{PROGRAM} run",
            args=others,
            return_unknown_args=True,
        )
    config = load_experiment(chosen.name).config(chosen.preset)
    kind: Any = Options
    with contextlib.nullcontext() if help_flags else _one_line_errors():
        options: Options[Any] = tyro.cli(
            kind[type(config)],
            default=Options(name=tyro.MISSING, preset=chosen.preset, config=config),
            prog=f"{PROGRAM} run",
            args=list(words),
            use_underscores=True,
        )
    for name, value in vars(options.config).items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and os.path.isabs(text):
                why = "give it relative, since the results are made to be published"
                raise UsageError(f"--config.{name} got an absolute path; {why}")
    return options


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn an error message of tyro, which has several paragraphs, into a UsageError of one line."""
    printed = io.StringIO()
    try:
        # Without a terminal as stdout there are no colors and no boxes around the message.
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    except SystemExit:
        raise UsageError(f"{_one_line(printed.getvalue())}; `{PROGRAM} run NAME --help` lists all options") from None


def _one_line(message: str) -> str:
    """Join the paragraphs of a message, without the title and the last, which points to the help."""
    lines = [line.strip() for line in message.splitlines()]
    parts = groupby(lines, key=lambda line: bool(line) and not line.strip("-"))
    paragraphs = [" ".join(part) for is_rule, part in parts if not is_rule]
    return "; ".join(paragraphs[1:-1]) or message
