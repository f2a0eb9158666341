"""Minibatches of a training run: which samples an iteration takes, in every process."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fluxmatching.flows.labels import check_labels


class Samples(Protocol):
    """Data other than a tensor: a number of samples, and access to samples by indices `[n]` on the CPU.

    With labels they return (x, labels), one label per sample, as `torch.utils.data.TensorDataset(x, labels)` does.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor | tuple[Tensor, Tensor]: ...


class Minibatches:
    """Minibatches without repetition within an epoch, each split over the processes.

    Args:
        data: `[samples, *event]`, or `Samples`.
        batch_size: samples per minibatch and process.
        rank, processes: this process, and their number.
        seed: determines the order, a new one per epoch.
        device: where minibatches go.
        num_classes: if given, labels must lie in [0, num_classes); on a GPU they are not read.

    Attributes:
        labeled: whether the samples have labels.

    Raises:
        TypeError: data is neither a dense tensor nor `Samples`.
        ValueError: fewer samples than a minibatch, or no values.
    """

    def __init__(
        self,
        data: Tensor | Samples,
        batch_size: int,
        rank: int,
        processes: int,
        seed: int,
        device: torch.device,
        num_classes: int | None = None,
    ) -> None:
        self.labeled = _check_data(data)
        if len(data) < batch_size * processes:
            raise ValueError(
                f"Trainer: batch_size must be at most the {len(data)} samples"
                f"{f' over {processes} processes' if processes > 1 else ''}, got {batch_size}"
            )
        self.data, self.rank, self.processes, self.seed, self.device = data, rank, processes, seed, device
        self.num_classes = num_classes
        self.size = batch_size * processes
        self.per_epoch = len(data) // self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Return samples and labels of this process's part of a minibatch, the first of which has index 0."""
        epoch, first = index // self.per_epoch, index % self.per_epoch * self.size
        on_device = isinstance(self.data, Tensor) and self.data.device == self.device
        order = _order(
            len(self.data), (self.seed * 1_000_003 + epoch) % 2**63, self.device if on_device else torch.device("cpu")
        )
        indices = order[first : first + self.size].tensor_split(self.processes)[self.rank]
        x, labels = _check_samples(self.data[indices], self.data, len(indices))
        if labels is not None and self.num_classes is not None:  # before they go to a GPU, where nothing is read
            check_labels("Trainer", labels, self.num_classes, x)
        return self._on_device(x), None if labels is None else self._on_device(labels)

    def _on_device(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.device.type == "cuda":
            x = x.pin_memory()  # copied without a wait
        return x.to(self.device, non_blocking=True)


def _check_data(data: object) -> bool:
    """Return whether the data have labels."""
    if isinstance(data, Tensor):
        if data.is_nested:
            raise TypeError("Trainer: data must be a dense tensor, got a nested tensor")
        if data.layout != torch.strided or data.is_quantized:
            raise TypeError(f"Trainer: data must be a dense tensor, got layout {data.layout} and dtype {data.dtype}")
        if data.is_meta:
            raise ValueError("Trainer: data must have values, got a tensor on meta")
        if not data.ndim:
            raise ValueError("Trainer: data must have shape [samples, *event], got []")
        return False
    takes = "a tensor [samples, *event], or an object with __len__ and with __getitem__ for a tensor of indices"
    if isinstance(data, (list, tuple)) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(f"Trainer: data must be {takes}; got {type(data).__name__}")
    if not len(data):
        return False
    some = torch.arange(min(2, len(data)), device="cpu")
    try:
        with torch.random.fork_rng(devices=[]):  # samples may be changed at random
            found = data[some]
    except Exception as error:
        raise TypeError(
            f"Trainer: data must be {takes}; {type(data).__name__} does not take a tensor of indices "
            f"({type(error).__name__}: {error}). torch.stack([sample for sample in data]) makes a tensor"
        ) from error
    return _check_samples(found, data, len(some))[1] is not None


def _check_samples(found: Any, data: object, count: int) -> tuple[Tensor, Tensor | None]:
    """Return samples and labels, one of each per index."""
    parts = found if isinstance(found, (tuple, list)) and len(found) == 2 else (found,)
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(
                f"Trainer: data must be a tensor, or return one or (samples, labels) for a tensor of indices; got "
                f"{_described(part)} from {type(data).__name__}"
            )
        if not part.ndim or len(part) != count:
            raise ValueError(
                f"Trainer: data must return one sample per index, {type(data).__name__} returns shape "
                f"{list(part.shape)} for {count} indices"
            )
    return parts[0], parts[1] if len(parts) == 2 else None


def _described(found: object) -> str:
    name = type(found).__name__
    return f"{name} of {len(found)}" if isinstance(found, (tuple, list)) else name


@lru_cache(maxsize=1)
def _order(samples: int, seed: int, device: torch.device) -> Tensor:
    """Return the permutation of the samples, computed once per epoch."""
    order = torch.randperm(samples, generator=torch.Generator(device="cpu").manual_seed(seed), device="cpu")
    if device.type == "cuda":
        order = order.pin_memory()
    return order.to(device, non_blocking=True)
