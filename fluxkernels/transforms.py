"""Whether PyTorch is transforming the code that runs: `torch.func`, or forward-mode differentiation."""

import torch
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Whether a `torch.func` transform or a level of forward-mode differentiation is running."""
    # PyTorch has no public way to ask; `make test` runs each transform and sees if a release moves these.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
