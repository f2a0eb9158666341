"""How much the tests of the Triton kernels run: in `make triton` and on a GPU everything, in `make test` a part."""

import os

import pytest
import torch

COMPLETE = os.environ.get("FLUXKERNELS_TESTS") == "complete" or torch.cuda.is_available()
complete_only = pytest.mark.skipif(not COMPLETE, reason="`make triton` runs it")
