"""Classifier-free guidance of a flow whose network takes class labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn

from fluxkernels.checks import can_check_values, check_dense, check_num_steps, check_tensor, shape_of
from fluxmatching.fields import call_field
from fluxmatching.flows.paths import check_times


class GuidedField(nn.Module):
    """Field v(x, t) of classifier-free guidance: v_∅ + w (v_y - v_∅).

    v_y = v(x, t, y) is the velocity given a label, v_∅ that without one, for which the label is `num_classes` (Ho and
    Salimans 2022; for flows Zheng et al. 2023). One call of the network computes both, on twice the samples; w = 0 and
    w = 1 need one of them only. For w > 1 samples are more typical of their class, and no longer those of the
    distribution given the label.

    It is a module, so that parameters of a network are its own.

    Args:
        field: v(x, t, labels), x `[n, *event]`, t `[n]`, labels `[n]` int64; returns the shape of x.
        labels: y in 0 … num_classes - 1: one integer for all samples, or one per sample, `[N]` int64.
        scale: w, a finite number.
        num_classes: number of classes, and the label that means "no label".

    Raises:
        ValueError: a label out of range, or an argument of wrong shape or value. Labels on an accelerator are not
            checked.
        TypeError: an argument of wrong type or dtype.
    """

    labels: Tensor

    def __init__(
        self, field: Callable[[Tensor, Tensor, Tensor], Tensor], labels: int | Tensor, scale: float, num_classes: int
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not callable(field):
            raise TypeError(f"{name}: field must be callable, got {type(field).__name__}")
        self.num_classes = check_num_steps(name, num_classes, "num_classes")
        self.field, self.scale = field, _check_scale(name, scale)
        self.register_buffer("labels", _check_labels(name, labels, num_classes), persistent=False)

    def forward(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Return the guided velocity.

        Args:
            x: `[N, *event]`.
            t: times in [0, 1]: one number, or one per sample, `[N]`.

        Returns:
            `[N, *event]`.
        """
        name = type(self).__name__
        check_tensor(name, "x", x)
        t = check_times(name, t, x).to(x.dtype).expand(len(x))
        if self.labels.ndim and self.labels.shape != x.shape[:1]:
            raise ValueError(
                f"{name}: labels must be one number or one per sample of x, shape {[x.shape[0]]}, got "
                f"{shape_of(self.labels)}"
            )
        labels = self.labels.to(x.device).expand(x.shape[0])
        unlabeled = torch.full_like(labels, self.num_classes)
        if self.scale in (0.0, 1.0):
            return call_field(self.field, x, t, labels if self.scale else unlabeled)
        both = call_field(self.field, torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, unlabeled]))
        with_label, without_label = both.chunk(2)
        return without_label + self.scale * (with_label - without_label)


def _check_scale(function: str, scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"{function}: scale must be a finite number, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"{function}: scale must be a finite number, got {scale}")
    return float(scale)


def _check_labels(function: str, labels: object, num_classes: int) -> Tensor:
    """Return labels in 0 … num_classes - 1, `[]` or `[N]` int64."""
    if isinstance(labels, int) and not isinstance(labels, bool):
        if not 0 <= labels < num_classes:
            raise ValueError(f"{function}: labels must lie in 0 … {num_classes - 1}, got {labels}")
        labels = torch.tensor(labels, device="cpu")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{function}: labels must be an integer or an int64 tensor, got {got}")
    check_dense(function, "labels", labels)
    if labels.ndim > 1 or labels.numel() == 0:
        raise ValueError(f"{function}: labels must have shape [] or [N], got {shape_of(labels)}")
    if can_check_values(labels) and not ((labels >= 0) & (labels < num_classes)).all():
        bad = labels[(labels < 0) | (labels >= num_classes)].reshape(-1)[0].item()
        raise ValueError(f"{function}: labels must lie in 0 … {num_classes - 1}, got {bad}")
    return labels
