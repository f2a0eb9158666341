"""Vector fields: their types, and fields made from denoisers, noise predictions and flow velocities."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fluxkernels.checks import check_dense, check_finite
from fluxmatching.field_modules import networks_of

Field = Callable[[Tensor], Tensor]  # f(z), z `[n, *event]`, each sample by itself
NoisyField = Callable[[Tensor, Tensor], Tensor]  # f(z, σ), σ of shape `[]`, or `[n]` where the field accepts that


def call_field(field: Callable[..., Tensor], z: Tensor, *condition: Tensor | float) -> Tensor:
    """Return field(z, *condition) in the dtype of z.

    Raises:
        TypeError: the result is no dense tensor of floating-point numbers, the field computes in another dtype, or it
            takes other arguments.
        ValueError: the result has another shape than z.
    """
    try:
        f = with_arguments(field, z, *condition)
    except RuntimeError as error:
        if (dtype := _other_dtype(field, z, error)) is None:
            raise
        raise TypeError(
            f"field has parameters in {dtype}, its input is {z.dtype}; convert one of them, such as by "
            f"x.to({dtype}) or field.to({z.dtype})"
        ) from error
    check_returned("field", f)
    check_dense("field", "its result", f)
    if f.shape != z.shape:
        raise ValueError(f"field must return the shape of its input, {list(z.shape)}, got {list(f.shape)}")
    if not f.is_floating_point():
        raise TypeError(f"field must return floating-point numbers, got {f.dtype}")
    return f.to(z.dtype)


def with_arguments(field: Callable[..., Any], *arguments: Tensor | float, called: str | None = None) -> Any:
    """Return field(*arguments).

    Args:
        called: text for the error, in place of that for fields.

    Raises:
        TypeError: the field takes more or fewer arguments.
    """
    try:
        return field(*arguments)
    except TypeError as error:
        if _accepts(field, arguments):
            raise
        wanted = {
            1: "one argument, x; losses and samplers of many noise levels, or of flows, take fields of two",
            2: "two arguments, x and σ, or x and t in a flow; flux_matching_loss and unadjusted_langevin take f(x)",
        }.get(len(arguments), "three arguments, x, t and labels")
        raise TypeError(f"{called or f'field is called with {wanted}'} ({error})") from error


def _accepts(field: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
    """Return False if the signature of a field excludes these arguments."""
    try:
        signature = inspect.signature(field.forward if isinstance(field, nn.Module) else field)
    except (TypeError, ValueError):  # a function without one
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def check_returned(name: str, value: object) -> None:
    """Raise TypeError unless a field or network, named in the error, has returned a tensor."""
    if not isinstance(value, Tensor):
        part = "; its .sample is one" if isinstance(getattr(value, "sample", None), Tensor) else ""
        raise TypeError(f"{name} must return a torch.Tensor, got {type(value).__name__}{part}")


def finite_field(function: str, field: Callable[..., Tensor], z: Tensor, *condition: Tensor | float) -> Tensor:
    """Return `call_field(field, z, *condition)` for a loss that is named in errors.

    Raises:
        ValueError: the field is not finite. On a GPU nothing is read, and the training looks at its loss.
    """
    f = call_field(field, z, *condition)
    check_finite(function, field=f)
    return f


def _other_dtype(field: Callable[..., Tensor], z: Tensor, error: RuntimeError) -> torch.dtype | None:
    """Return the dtype of the field's parameters if an error is about it being another than that of z."""
    if not any(words in str(error) for words in ("dtype", "scalar type", "same type")):
        return None
    found = {p.dtype for network in networks_of(field) for p in network.parameters() if p.is_floating_point()}
    return next(iter(found)) if len(found) == 1 and z.dtype not in found else None


class AdaptedField(nn.Module):
    """Base of the fields f(z, σ) made from another prediction: a module, so that parameters of a network are its own.

    Args:
        prediction: a module or function of (z, σ).
    """

    def __init__(self, prediction: NoisyField) -> None:
        super().__init__()
        if not callable(prediction):
            raise TypeError(f"{type(self).__name__}: prediction must be callable, got {type(prediction).__name__}")
        self.prediction = prediction

    def forward(self, z: Tensor, sigma: Tensor | float) -> Tensor:
        level = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
        if level.ndim > 1 or (level.ndim == 1 and level.shape != z.shape[:1]):
            raise ValueError(
                f"{type(self).__name__}: sigma must be one number or one per sample, got shape {list(level.shape)}"
            )
        return self.convert(z, level)

    def convert(self, z: Tensor, sigma: Tensor) -> Tensor:
        """Compute f(z, σ) from the prediction."""
        raise NotImplementedError

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        """Call the prediction."""
        name = f"{type(self).__name__}: prediction"
        called = f"{name} is called with two arguments, x and σ or t"
        predicted: Tensor = with_arguments(self.prediction, z, sigma, called=called)
        check_returned(name, predicted)
        return predicted


class DenoiserField(AdaptedField):
    """Field of `field_from_denoiser`."""

    def convert(self, z: Tensor, sigma: Tensor) -> Tensor:
        return (self.predict(z, sigma) - z) / per_sample(sigma, z).square()


class NoisePredictionField(AdaptedField):
    """Field of `field_from_noise_prediction`."""

    def convert(self, z: Tensor, sigma: Tensor) -> Tensor:
        return -self.predict(z, sigma) / per_sample(sigma, z)


class VelocityField(AdaptedField):
    """Field of `field_from_velocity`."""

    def convert(self, z: Tensor, sigma: Tensor) -> Tensor:
        level = per_sample(sigma, z)
        return (self.predict(z / (1 + level), 1 / (1 + sigma)) - z) / (level * (1 + level))


def field_from_denoiser(denoiser: NoisyField) -> DenoiserField:
    """Make the field f(z, σ) = (D(z, σ) - z)/σ² from a denoiser D, an estimate of the clean sample.

    At small σ the difference D - z loses digits; a network that predicts noise, or `EDMField`, does not.

    Args:
        denoiser: D(z, σ), z = x + σ n `[n, *event]` and σ > 0, `[]` or `[n]`; returns the shape of z.

    Returns:
        f(z, σ), the score where D is the posterior mean (Tweedie's formula).
    """
    return DenoiserField(denoiser)


def field_from_noise_prediction(predict_noise: NoisyField) -> NoisePredictionField:
    """Make the field f(z, σ) = -ε(z, σ)/σ from an estimate ε of the noise n in z = x + σ n.

    Args:
        predict_noise: ε(z, σ), z `[n, *event]` and σ > 0, `[]` or `[n]`; returns the shape of z.
    """
    return NoisePredictionField(predict_noise)


def field_from_velocity(velocity: NoisyField) -> VelocityField:
    """Make a field f(z, σ) from the velocity of a linear flow x_t = t x + (1-t) n from noise (t = 0) to data (t = 1).

    With t = 1/(1+σ), x_t = t z for z = x + σ n, and the score of x_t follows from the marginal velocity. Hence

        f(z, σ) = (v(z/(1+σ), 1/(1+σ)) - z) / (σ (1+σ)).

    Args:
        velocity: v(x_t, t), x_t `[n, *event]` and t of the shape of σ, `[]` or `[n]`; returns the shape of x_t.

    Returns:
        f(z, σ), the score where v is the marginal velocity of the path.
    """
    return VelocityField(velocity)


def per_sample(values: Tensor, z: Tensor) -> Tensor:
    """Reshape one number `[]` or one per sample `[n]` to broadcast against z `[n, *event]`."""
    return values.reshape(-1, *(1 for _ in z.shape[1:]))
