"""Fields f(z, σ) from networks of diffusers: a network and its scheduler, a pipeline, or their folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fluxkernels.checks import check_choice
from fluxmatching.edm import EDMField
from fluxmatching.fields import AdaptedField, per_sample

_NAME = "field_from_diffusers"
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_NOISE, _CLEAN, _VELOCITY = _PREDICTIONS = ("epsilon", "sample", "v_prediction")


class DiffusersField(AdaptedField):
    """Field of `field_from_diffusers` for a scheduler whose steps t = 0, 1, … have one noise level each.

    Args:
        network: see `field_from_diffusers`.
        log_sigmas: log σ of the steps, increasing, `[T]` with T ≥ 2.
        prediction_type: "epsilon", "sample" or "v_prediction".
    """

    accepts_sigma_per_sample = True

    def __init__(self, network: nn.Module, log_sigmas: Tensor, prediction_type: str = _NOISE) -> None:
        super().__init__(network)
        self.register_buffer("log_sigmas", log_sigmas, persistent=False)
        self.prediction_type = prediction_type

    def times(self, sigma: Tensor) -> Tensor:
        """Return the steps t of noise levels, of their shape: linear in log σ between two steps, and the nearest of
        the first and the last step beyond them.
        """
        levels = cast(Tensor, self.log_sigmas).to(sigma)
        wanted = sigma.log().reshape(-1).contiguous()
        below = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1) - 1
        time = below + (wanted - levels[below]) / (levels[below + 1] - levels[below])
        return time.clamp(0, len(levels) - 1).reshape(sigma.shape)

    def sigmas(self, times: Tensor) -> Tensor:
        """Return the noise levels of steps from 0 to T - 1, of their shape: the inverse of `times`."""
        levels = cast(Tensor, self.log_sigmas)
        below = times.long().clamp(0, len(levels) - 2)
        return torch.lerp(levels[below], levels[below + 1], (times - below).to(levels)).exp()

    def convert(self, z: Tensor, sigma: Tensor) -> Tensor:
        level = per_sample(sigma, z)
        norm = (1 + level.square()).sqrt()
        output = _tensor_in(self.prediction(z / norm, self.times(sigma).expand(len(z))))
        if self.prediction_type == _CLEAN:
            return (output - z) / level.square()
        if self.prediction_type == _VELOCITY:
            return -(z / norm + output / level) / norm
        return -output / level


class EDMNetwork(nn.Module):
    """Network of diffusers as F(x, c_noise) of `EDMField`.

    Args:
        network: see `field_from_diffusers`.
        sign: -1 for prediction_type "v_prediction", whose c_out is negative in diffusers; else 1.
    """

    def __init__(self, network: nn.Module, sign: float) -> None:
        super().__init__()
        self.network, self.sign = network, sign

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.sign * _tensor_in(self.network(x, c_noise))


def field_from_diffusers(model: Any, scheduler: Any = None) -> DiffusersField | EDMField:
    """Make the field f(z, σ) from a network of diffusers and its scheduler, given as objects or by their folders.

    *Schedulers with steps* (`alphas_cumprod`, such as `DDPMScheduler` and `DDIMScheduler`). Step t is
    x_t = √ᾱ_t x + √(1 - ᾱ_t) n; that is z = x_t/√ᾱ_t at the noise level σ² = (1 - ᾱ_t)/ᾱ_t. Between two steps t is
    interpolated linearly in log σ; below the first and above the last step the network gets the time of that step. The
    network predicts the noise n ("epsilon"), the clean sample x ("sample") or √ᾱ_t n - √(1 - ᾱ_t) x ("v_prediction").
    `field.times(sigma)` and `field.sigmas(times)` convert. Clipping of predictions (`clip_sample`) is part of the
    scheduler's sampling, not of the field.

    *EDM schedulers* (`EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler`). The result is an `EDMField` with the
    scheduler's `sigma_data`; no noise level is rounded.

    A network that was trained in this form is sampled by the pipelines of diffusers. Nothing is downloaded.

    >>> field = field_from_diffusers("runs/my-pipeline")  # of pipeline.save_pretrained  # doctest: +SKIP
    >>> field = field_from_diffusers("runs/my-unet", DDPMScheduler())  # of unet.save_pretrained  # doctest: +SKIP

    Args:
        model: network such as `UNet2DModel`: network(x_t, t) returns the prediction, or an object with it as `sample`;
            or the folder of a saved `UNet2DModel`. Without a scheduler: a pipeline of a network and a scheduler, such
            as `DDPMPipeline`, or the folder of a saved one, whose network is a `UNet2DModel`.
        scheduler: of the training of the network, or the folder of a saved one.

    Returns:
        f(z, σ), σ > 0 of shape `[]` or `[n]`, with the parameters of the network. A network from a folder is in
        evaluation mode, others in the mode that they have.

    Raises:
        ImportError: a folder was given and diffusers is not installed.
        FileNotFoundError: a folder has not the files that diffusers saves.
        TypeError: the network is no module, there is no scheduler, or it is of an unknown kind.
        ValueError: an unknown prediction_type, a pipeline with other parts, or a network with labels or with more
            outputs than inputs.
    """
    if scheduler is None:
        model, scheduler = _parts(model)
    network = _load_network(Path(model)) if isinstance(model, (str, os.PathLike)) else model
    if isinstance(scheduler, (str, os.PathLike)):
        scheduler = _load_scheduler(Path(scheduler))
    _check_network(network)
    config = getattr(scheduler, "config", None)
    kind = getattr(config, "prediction_type", _NOISE)
    if type(scheduler).__name__ in _EDM:
        check_choice(_NAME, "prediction_type of the scheduler", kind, (_NOISE, _VELOCITY))
        return EDMField(EDMNetwork(network, -1.0 if kind == _VELOCITY else 1.0), float(config.sigma_data))  # type: ignore[union-attr]
    products = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(products, Tensor):
        raise TypeError(
            f"{_NAME}: scheduler must have alphas_cumprod, such as DDPMScheduler, or be one of {', '.join(_EDM)}; got "
            f"{type(scheduler).__name__}"
        )
    check_choice(_NAME, "prediction_type of the scheduler", kind, _PREDICTIONS)
    if (times := getattr(config, "timestep_type", "discrete")) != "discrete":
        raise ValueError(f"{_NAME}: timestep_type of the scheduler must be 'discrete', got {times!r}")
    return DiffusersField(network, _log_sigmas(products), kind)


def _log_sigmas(products: Tensor) -> Tensor:
    """Return log σ of all steps with a finite σ; schedules with zero signal at the end have one without."""
    products = products.double()
    products = products[products > 0]
    if len(products) < 2 or not products[0] < 1 or not (products.diff() < 0).all():
        raise ValueError(f"{_NAME}: alphas_cumprod of the scheduler must fall from below 1 in at least two steps")
    return (((1 - products) / products).log() / 2).float()


def _tensor_in(found: Any) -> Tensor:
    """Return the tensor that a network returned as such or as `sample`."""
    found = getattr(found, "sample", found) if not isinstance(found, Tensor) else found
    if not isinstance(found, Tensor):
        raise TypeError(f"{_NAME}: network must return a tensor, or have one as sample, got {type(found).__name__}")
    return found


def _check_network(network: Any) -> None:
    """Raise TypeError or ValueError unless a network is a module without labels and with as many outputs as inputs."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"{_NAME}: network must be a torch.nn.Module, got {type(network).__name__}")
    config = getattr(network, "config", None)
    inputs, outputs = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    if inputs != outputs:
        raise ValueError(
            f"{_NAME}: network must have as many output as input channels, got {outputs} and {inputs}; one that also "
            f"predicts variances has more"
        )
    if any(getattr(config, name, None) is not None for name in ("class_embed_type", "num_class_embeds")):
        raise ValueError(
            f"{_NAME}: network must take no class labels, got {type(network).__name__} with labels; give a module "
            f"whose forward(x, t) calls it with them"
        )


def _parts(model: Any) -> tuple[Any, Any]:
    """Return (network, scheduler), or their folders, of a pipeline or its folder."""
    if isinstance(model, (str, os.PathLike)):
        folder = Path(model)
        if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
            raise TypeError(f"{_NAME}: scheduler must be given with the folder of a network, {folder}")
        index = _read(folder, "model_index.json", "a pipeline")
        names = {name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
        kind, found = index.get("_class_name"), {name: folder / name for name in names}
    elif isinstance(components := getattr(model, "components", None), dict):
        kind, found = type(model).__name__, {name: part for name, part in components.items() if part is not None}
    else:
        raise TypeError(
            f"{_NAME}: model must be a pipeline or the folder of one if no scheduler is given, got "
            f"{type(model).__name__}"
        )
    if set(found) != {"unet", "scheduler"}:
        raise ValueError(
            f"{_NAME}: pipeline must consist of unet and scheduler, such as DDPMPipeline; {kind} has "
            f"{', '.join(sorted(found)) or 'no parts'}"
        )
    return found["unet"], found["scheduler"]


def _load_network(folder: Path) -> nn.Module:
    kind = _read(folder, "config.json", "a network").get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"{_NAME}: network in {folder} must be a UNet2DModel, got {kind}; load it, and give it itself")
    network: nn.Module = _diffusers().UNet2DModel.from_pretrained(folder, local_files_only=True)
    return network


def _load_scheduler(folder: Path) -> Any:
    kind = str(_read(folder, "scheduler_config.json", "a scheduler").get("_class_name"))
    found = getattr(_diffusers(), kind, None) if kind.endswith("Scheduler") else None
    if found is None:
        raise ValueError(f"{_NAME}: scheduler in {folder} must be one of diffusers, got {kind}")
    return found.from_pretrained(folder, local_files_only=True)


def _read(folder: Path, name: str, what: str) -> dict[str, Any]:
    """Return the content of a JSON file of diffusers."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{_NAME}: folder of {what} must have {name}, as save_pretrained writes it; got {folder}"
        )
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            f"fluxmatching.{_NAME} needs diffusers for folders: pip install 'fluxkernels[images]'"
        ) from error
    return diffusers
