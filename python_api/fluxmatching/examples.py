"""Small trained fields, read from folders of weights as safetensors, a config as JSON, and a model card.

The weights belong to a network of this package, which the config names. A file holds numbers and no program, unlike a
pickled module or an exported graph; and a field from a file has a class, so that it can be trained further.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxkernels.checks import check_choice, check_positive, check_sigma_range
from fluxmatching.edm import EDMField
from fluxmatching.fields import call_field
from fluxmatching.networks import Perceptron, TrajectoryTransformer
from fluxmatching.unet import UNet

VARIABLE = "FLUXMATCHING_EXAMPLES"
FILES = WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FORMAT = 1  # of the files; another layout of them gets another number
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    kind.__name__: kind for kind in (Perceptron, TrajectoryTransformer, UNet)
}
_NAME = "load_example"
_SHIPPED = Path(__file__).parent / "example_models"
_ENTRIES = ("format", "network", "arguments", "sigma_data", "sigma_min", "sigma_max", "shape", "sha256")


@dataclass(frozen=True)
class Example:
    """A trained field and what sampling needs.

    Attributes:
        name: name of its folder.
        field: f(z, σ), the moving average of a training, in evaluation mode and float32.
        shape: shape of one sample.
        sigma_min, sigma_max: noise levels between which the field was trained and is sampled.
        card: file that describes data, training, measured quality and limits.
    """

    name: str
    field: EDMField
    shape: tuple[int, ...]
    sigma_min: float
    sigma_max: float
    card: Path


def load_example(
    name: str, folder: str | os.PathLike[str] | None = None, device: torch.device | str | None = None
) -> Example:
    """Load a small trained field.

    "mixture" (points of three Gaussians in the plane), "springs" (trajectories of two masses) and "images" (drawn
    discs, 16 × 16) come with the package. In a checkout of the repository, `python -m experiments export RUN --out
    FOLDER` makes others. Nothing is downloaded, and no code in a file is run.

    >>> example = load_example("mixture")  # doctest: +SKIP
    >>> sigmas = karras_schedule(18, example.sigma_min, example.sigma_max)  # doctest: +SKIP
    >>> start = example.sigma_max * torch.randn(1000, *example.shape)  # doctest: +SKIP
    >>> samples = edm_heun(example.field, start, sigmas)  # doctest: +SKIP

    Args:
        name: folder of the example, with `model.safetensors`, `config.json` and `README.md`.
        folder: where that folder is; None for the one that the environment variable FLUXMATCHING_EXAMPLES names, or
            else the examples of the package.
        device: where the field goes; None for the CPU.

    Raises:
        ImportError: safetensors is not installed, or diffusers, which "images" needs.
        FileNotFoundError: the folder, or a file of the example, does not exist.
        TypeError: `folder` is no path.
        ValueError: there is no example of that name, or its files are damaged or do not belong together.
    """
    place, origin = _place(folder)
    if not place.is_dir():
        raise FileNotFoundError(
            f"{_NAME}: folder must exist, got {place} ({origin}); in a checkout of the repository, "
            f"`python -m experiments export RUN --out {place}` makes it from a finished run"
        )
    found = sorted({path.parent.name for file in (WEIGHTS, CONFIG) for path in place.glob(f"*/{file}")})
    if not found:
        raise ValueError(f"{_NAME}: {place} ({origin}) holds no examples")
    if name not in found:  # also any name that would lead out of the folder
        raise ValueError(f"{_NAME}: name must be one of {', '.join(found)} in {place} ({origin}), got {name!r}")
    for file in FILES:
        if not (place / name / file).is_file():
            raise FileNotFoundError(f"{_NAME}: {place / name / file} must exist; an example has {', '.join(FILES)}")
    config = _read_config(place / name / CONFIG)
    field = EDMField(_make_network(config, place / name / CONFIG), config["sigma_data"])
    _load_weights(field, place / name / WEIGHTS, config["sha256"])
    field = field.float().eval()
    shape = tuple(config["shape"])
    _check_shape(field, shape, place / name / CONFIG)
    return Example(
        name,
        field.to("cpu" if device is None else device),
        shape,
        config["sigma_min"],
        config["sigma_max"],
        place / name / CARD,
    )


def _place(folder: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """Return the folder of the examples, and where its name is from."""
    if folder is not None:
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"{_NAME}: folder must be a path or None, got {type(folder).__name__}")
        return Path(folder), "the argument folder"
    if named := os.environ.get(VARIABLE):
        return Path(named), VARIABLE
    return _SHIPPED, "the examples of the package"


def _read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config after a check of every entry."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{_NAME}: {path} must be JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{_NAME}: {path} must have format {FORMAT}; it is of another program or version")
    if set(config) != set(_ENTRIES):
        raise ValueError(f"{_NAME}: {path} must have the entries {', '.join(_ENTRIES)}, got {', '.join(config)}")
    shape = config["shape"]
    if not (isinstance(shape, list) and shape) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{_NAME}: shape in {path} must be a list of sizes, got {shape!r}")
    try:
        check_choice(_NAME, "network", config["network"], tuple(NETWORKS))
        check_positive(_NAME, "sigma_data", config["sigma_data"])
        check_sigma_range(_NAME, config["sigma_min"], config["sigma_max"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error}; in {path}") from error
    return config


def _make_network(config: dict[str, Any], path: Path) -> nn.Module:
    """Build the network of a config, without a trace in the random numbers of the caller."""
    try:
        arguments = {
            name: tuple(value) if isinstance(value, list) else value for name, value in config["arguments"].items()
        }
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return NETWORKS[config["network"]](**arguments)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{_NAME}: arguments in {path} do not fit {config['network']}: {error}") from error


def _load_weights(field: nn.Module, path: Path, sha256: object) -> None:
    """Load the parameters of a field from a file whose checksum the config has."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise ImportError(f"fluxmatching.{_NAME} needs safetensors: pip install 'fluxkernels[experiments]'") from error
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{_NAME}: {path} is damaged or of another export: its SHA-256 is not that in {CONFIG}")
    try:
        weights: dict[str, Tensor] = load(content)
        for name, value in weights.items():
            if not value.is_floating_point():
                raise RuntimeError(f"{name} must have a floating dtype, got {value.dtype}")
            if not value.isfinite().all():
                raise RuntimeError(f"{name} must be finite, got NaN or infinity")
        field.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{_NAME}: {path} does not hold the weights of {CONFIG}: {error}") from error


def _check_shape(field: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Raise ValueError unless the field takes samples of that shape."""
    z = torch.zeros(1, *shape, dtype=torch.float32, device="cpu")
    try:
        with torch.no_grad():
            call_field(field, z, 1.0)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{_NAME}: network in {path} does not take samples of shape {list(shape)}: {error}") from error
