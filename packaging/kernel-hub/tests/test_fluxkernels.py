"""The ops against float64, on the CPU or on a GPU."""

import pytest
import torch

import fluxkernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dimensions", [2, 200])
def test_score(dimensions: int) -> None:
    x, refs = torch.randn(65, dimensions), torch.randn(83, dimensions)
    truth = fluxkernels.kde_score(x.double(), refs.double(), 0.25 * dimensions, backend="torch")
    found = fluxkernels.kde_score(x.to(DEVICE), refs.to(DEVICE), 0.25 * dimensions)
    assert (found.cpu().double() - truth).norm() < 1e-5 * truth.norm()
