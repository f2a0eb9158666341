"""Detection of PyTorch's transforms: `torch.func`, and forward-mode differentiation."""

import torch
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Return True inside of a `torch.func` transform or of forward-mode differentiation."""
    # PyTorch has no public function for this. The tests run each transform, and fail if a release moves these names.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
