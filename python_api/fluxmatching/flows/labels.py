"""Class labels of flows: integers in [0, num_classes), and `num_classes` itself for no label."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxkernels.checks import can_check_values, check_dense, shape_of


def check_labels(function: str, labels: object, num_classes: int, x: Tensor | None = None) -> Tensor:
    """Return class labels as an int64 tensor.

    Args:
        function: name for error messages.
        labels: with x an int64 tensor, one label per sample, `[N]`; without it also an integer or a tensor `[]`.
        num_classes: number of classes.
        x: samples, `[N, *event]`, or None where they are not known yet.

    Raises:
        TypeError, ValueError: labels of another type, shape, device or value.
    """
    takes = "an int64 tensor" if x is not None else "an integer or an int64 tensor"
    bad = f"{function}: labels must lie in [0, {num_classes}), got"
    if x is None and isinstance(labels, int) and not isinstance(labels, bool):
        if not 0 <= labels < num_classes:
            raise ValueError(f"{bad} {labels}")
        return torch.tensor(labels, device="cpu")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{function}: labels must be {takes}, got {got}")
    check_dense(function, "labels", labels)
    if x is None and (labels.ndim > 1 or labels.numel() == 0):
        raise ValueError(f"{function}: labels must have shape [] or [N], got {shape_of(labels)}")
    if x is not None and labels.shape != x.shape[:1]:
        raise ValueError(f"{function}: labels must have one entry per sample, shape [{len(x)}], got {shape_of(labels)}")
    if x is not None and labels.device != x.device:
        raise ValueError(f"{function}: labels must be on {x.device}, got {labels.device}")
    if can_check_values(labels) and not ((labels >= 0) & (labels < num_classes)).all():
        raise ValueError(f"{bad} {labels[(labels < 0) | (labels >= num_classes)].flatten()[0].item()}")
    return labels
