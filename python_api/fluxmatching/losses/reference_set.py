"""Reference points of the density estimate, more of them than a minibatch has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fluxkernels.checks import check_tensor
from fluxmatching.distributed import all_gather_samples, rank_and_size


class ReferenceSet(nn.Module):
    """Fixed reference points, or the newest samples of the training, those of all processes.

    More reference points lower bias and variance of the loss and cost time; see bench/README.md.

    Args:
        refs: reference points `[M, *event]`; or the number M ≥ 1 of newest samples to keep, on their own device; or
            None for the minibatch itself.

    Raises:
        ValueError, TypeError: refs is none of these.
    """

    points: Tensor | None

    def __init__(self, refs: Tensor | int | None) -> None:
        super().__init__()
        if isinstance(refs, Tensor):
            refs = check_tensor("ReferenceSet", "refs", refs).detach()
        elif refs is not None and (isinstance(refs, bool) or not isinstance(refs, int) or refs < 1):
            raise ValueError(
                f"ReferenceSet: refs must be a tensor, a positive number of samples, or None, got {refs!r}"
            )
        self.size = refs if isinstance(refs, int) else None
        # Not in checkpoints: the data set may be large, and whoever resumes passes it again.
        self.register_buffer("points", refs if isinstance(refs, Tensor) else None, persistent=False)
        # A plain attribute: engines broadcast buffers in every step, and this one is equal in all processes already.
        self.newest: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | None:
        """Return the reference points for the minibatch x, which become a part of the newest samples."""
        if self.size is None:
            return self.points
        _, processes = rank_and_size()
        joint = all_gather_samples("ReferenceSet", x.detach()) if processes > 1 else x.detach()
        newest = joint if self.newest is None else torch.cat([joint, self.newest.to(joint)])
        self.newest = newest[: self.size].clone()
        # At least the minibatch: a smaller set would leave out samples at which the estimate is taken.
        return newest[: max(self.size, len(joint))]

    def get_extra_state(self) -> dict[str, Any]:
        """Return the newest samples, so that a resumed run continues with them."""
        return {"newest": self.newest}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.newest = state["newest"]
