"""Classifier-free guidance of a flow whose network takes class labels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fluxkernels.checks import check_num_steps, check_number, check_tensor, shape_of
from fluxmatching.fields import NoisyField, call_field
from fluxmatching.flows.labels import check_labels
from fluxmatching.flows.paths import check_times


class GuidedField(nn.Module):
    """Field v(x, t) of classifier-free guidance: v_∅ + w (v_y - v_∅).

    v_y = v(x, t, y) is the velocity given a label, v_∅ that without one, for which the label is `num_classes` (Ho and
    Salimans 2022; for flows Zheng et al. 2023). One call of the network computes both, on twice the samples; w = 0 and
    w = 1 need one of them only. For w > 1 samples are more typical of their class, and no longer those of the
    distribution given the label.

    It is a module, so that parameters of a network are its own. With one label per sample it is a field of those N
    samples; `rows` returns that of some of them, which `integrate_flow` and `rectified_pairs` use for their chunks.

    Args:
        field: v(x, t, labels), x `[n, *event]`, t `[n]`, labels `[n]` int64; returns the shape of x.
        labels: y in [0, num_classes): one integer for all samples, or one per sample, `[N]` int64.
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
        self.field, self.scale = field, check_number(name, "scale", scale)
        self.register_buffer("labels", check_labels(name, labels, num_classes), persistent=False)

    def check_samples(self, samples: int) -> None:
        """Raise ValueError unless there is one label for all samples, or one per sample."""
        if self.labels.ndim and len(self.labels) != samples:
            raise ValueError(
                f"{type(self).__name__}: labels must be one number or one per sample of x, shape {[samples]}, got "
                f"{shape_of(self.labels)}"
            )

    def rows(self, rows: slice) -> GuidedField:
        """Return the field for some of the samples, with the same network."""
        some = copy.copy(self)
        some._buffers = {**self._buffers, "labels": self.labels[rows] if self.labels.ndim else self.labels}
        return some

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
        self.check_samples(len(x))
        labels = self.labels.to(x.device).expand(x.shape[0])
        unlabeled = torch.full_like(labels, self.num_classes)
        if self.scale in (0.0, 1.0):
            return call_field(self.field, x, t, labels if self.scale else unlabeled)
        both = call_field(self.field, torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, unlabeled]))
        with_label, without_label = both.chunk(2)
        return without_label + self.scale * (with_label - without_label)


def split_field(field: NoisyField, samples: int, size: int) -> list[NoisyField]:
    """Return the field of each chunk of at most `size` samples: the same one, unless it has one label per sample."""
    starts = range(0, samples, size)
    if not isinstance(field, GuidedField) or size >= samples:
        return [field] * len(starts)
    field.check_samples(samples)
    return [field.rows(slice(first, first + size)) for first in starts]
