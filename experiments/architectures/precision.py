"""Methods for second derivatives: their errors in float32 and under bfloat16 autocast, and their times."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.architectures.derivatives import field_length, signs, size
from experiments.architectures.problem import ExactScore
from experiments.architectures.quality import noisy
from experiments.architectures.training import OBJECTIVES, make_field, make_trainer
from experiments.common.run import Run
from fluxmatching.fields import Field
from fluxmatching.losses.second_derivatives import endpoint_gradient

NETWORK_METHODS = ("double_backward", "forward_over_reverse", "finite_difference")
FLOAT32, BF16 = PRECISIONS = ("float32", "bf16")


@contextmanager
def computing(run: Run, method: str, precision: str) -> Iterator[None]:
    """Set autocast, and attention that has the derivatives of the method: fused attention has first ones alone."""
    kernels = [SDPBackend.MATH] if method != "finite_difference" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels), torch.autocast(run.device.type, torch.bfloat16, enabled=precision == BF16):
        yield


def at_level(field: nn.Module, sigma: float, dtype: torch.dtype) -> Field:
    """Return f(z) at a noise level, computed by a copy of the field in that dtype."""
    copied = copy.deepcopy(field).to(dtype)

    def bound(z: Tensor) -> Tensor:
        found: Tensor = copied(z, torch.tensor(sigma).to(z))
        return found

    return bound


def method_errors(run: Run, field: nn.Module, sigma: float) -> dict[str, float | None]:
    """Measure the relative error of ∇(εᵀ J_f ε) + J_fᵀ s by every method in every precision.

    The truth is double backward in float64 with the same probe ε.

    Args:
        run: settings and random numbers.
        field: f(z, σ).
        sigma: σ.

    Returns:
        Errors by `column(method, precision)`, None where PyTorch lacks a derivative. "probe" is the relative difference
        that another probe makes, over √2: the noise that the loss has anyway.
    """
    _, z = noisy(run, run.config.batch, sigma, "precision", str(sigma))
    generator = run.generator("precision probes", str(sigma))
    probe, other = signs(z, generator), signs(z, generator)
    score, exactly = ExactScore(sigma)(z), at_level(field, sigma, torch.float64)
    with computing(run, "double_backward", FLOAT32):
        truth, _ = endpoint_gradient(exactly, z, score, probe, method="double_backward")
        second, _ = endpoint_gradient(exactly, z, score, other, method="double_backward")
    found: dict[str, float | None] = {"probe": (size(second - truth) / size(truth)).item() / 2**0.5}
    network = at_level(field, sigma, torch.float32)
    for method in NETWORK_METHODS:
        for precision in PRECISIONS:
            gradient = attempt(run, network, (z, score, probe), sigma, method, precision)
            error = None if gradient is None else (size(gradient.double() - truth) / size(truth)).item()
            found[column(method, precision)] = error
    return found


def attempt(
    run: Run, network: Field, points: Iterable[Tensor], sigma: float, method: str, precision: str
) -> Tensor | None:
    """Compute the gradient at (z, score, probe) by one method; None where forward mode fails.

    Forward mode has no rule for a GroupNorm of a tensor whose channels come last in memory, and none for convolutions
    under autocast: both are in the UNet.
    """
    try:
        with computing(run, method, precision):
            z, score, probe = (tensor.float() for tensor in points)
            return endpoint_gradient(network, z, score, probe, method=method, scale=field_length(sigma))[0]
    except RuntimeError:
        if method != "forward_over_reverse":
            raise
        return None


def column(method: str, precision: str) -> str:
    """Name the column of a method in a precision."""
    return f"{method} {precision}"


def times(run: Run, architecture: str) -> dict[str, float | None]:
    """Measure milliseconds per minibatch in float32, medians after a call to warm up; CPU time, except on a GPU.

    Returns:
        Times of the endpoints' gradients by method, and of training steps by objective.
    """
    _, z = noisy(run, run.config.batch, 1.0, "times")
    probe = signs(z, run.generator("times probes")).float()
    score, z = ExactScore(1.0)(z).float(), z.float()
    network = at_level(make_field(run, architecture, 0), 1.0, torch.float32)
    found: dict[str, float | None] = {}
    for method in NETWORK_METHODS:
        call = partial(attempt, run, network, (z, score, probe), 1.0, method, FLOAT32)
        found[method] = None if call() is None else _median(run, call)
    for objective in OBJECTIVES:
        found[objective] = _median(run, make_trainer(run, architecture, objective, 0, keep=False).step)
    return found


def _median(run: Run, call: Callable[[], Any]) -> float:
    now = time.process_time if run.device.type == "cpu" else time.perf_counter  # other processes may take turns
    seconds = []
    for _ in range(run.config.timed + 1):
        begun = now()
        call().sum().item()  # waits for the device
        seconds.append(now() - begun)
    return 1e3 * statistics.median(seconds[1:])
