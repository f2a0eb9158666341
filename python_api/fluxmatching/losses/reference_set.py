"""Reference points of the density estimate, more of them than a minibatch has."""

from __future__ import annotations

import copy
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fluxkernels.checks import can_check_values, check_tensor
from fluxmatching.distributed import all_gather_samples, rank_and_size


class ReferenceSet(nn.Module):
    """Fixed reference points, or the newest samples of the training, those of all processes.

    More reference points lower bias and variance of the loss and cost time; see bench/README.md.

    In eval() the newest samples are used and stay as they are. A minibatch on the CPU with values that are not finite
    is not kept.

    Args:
        refs: reference points `[M, *event]`; or the number M ≥ 1 of newest samples to keep, on their own device; or
            None for the minibatch itself.

    Raises:
        ValueError, TypeError: refs is none of these.
    """

    def __init__(self, refs: Tensor | int | None) -> None:
        super().__init__()
        if isinstance(refs, Tensor):
            refs = check_tensor("ReferenceSet", "refs", refs).detach()
        elif refs is not None and (isinstance(refs, bool) or not isinstance(refs, Integral) or refs < 1):
            raise ValueError(
                f"ReferenceSet: refs must be a tensor, a positive number of samples, or None, got {refs!r}"
            )
        self.size = int(refs) if isinstance(refs, Integral) else None
        # Plain attributes: engines broadcast buffers in every step, and these are equal in all processes already.
        # The points are not in checkpoints: the data set may be large, and whoever resumes passes it again.
        self.points = refs if isinstance(refs, Tensor) else None
        self.newest: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | None:
        """Return the reference points for the minibatch x, which become a part of the newest samples."""
        if self.size is None:
            if self.points is not None and self.points.device != x.device:  # an engine moved the module without it
                self.points = self.points.to(x.device)
            return self.points
        _, processes = rank_and_size()
        joint = all_gather_samples("ReferenceSet", x.detach()) if processes > 1 else x.detach()
        if self.newest is not None and self.newest.shape[1:] != joint.shape[1:]:
            raise ValueError(
                f"ReferenceSet: x must have the event of the samples before it, {list(self.newest.shape[1:])}, got "
                f"shape {list(x.shape)}"
            )
        newest = joint if self.newest is None else torch.cat([joint, self.newest.to(joint)])
        if self.training and not (can_check_values(joint) and not joint.isfinite().all()):
            self.newest = newest[: self.size].clone()
        # At least the minibatch: a smaller set would leave out samples at which the estimate is taken.
        return newest[: max(self.size, len(joint))]

    def _apply(self, fn: Any, recurse: bool = True) -> ReferenceSet:
        """Move and convert the fixed points with the module, as a buffer."""
        super()._apply(fn, recurse)
        self.points = None if self.points is None else fn(self.points)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceSet:
        """Share the points with the copy, such as a moving average; nothing changes them in place."""
        return copy.copy(self)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the newest samples, so that a resumed run continues with them."""
        return {"newest": self.newest}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.newest = state["newest"]
