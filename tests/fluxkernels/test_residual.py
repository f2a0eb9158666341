"""The factor of `residual_gradient` against extended precision, autograd and its own parts."""

import numpy as np
import pytest
import torch
from torch import Tensor

import fluxkernels as fk
from fluxkernels.ops.residual import residual_gradient_op
from tests.support import oracles

F64 = torch.float64


def points(N: int, M: int, D: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    z, field, refs = (torch.randn(n, D, dtype=F64).to(dtype) for n in (N, N, M))
    return z, field, refs


@pytest.mark.parametrize("D", [1, 3, 16, 20, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_against_extended_precision(dtype: torch.dtype, D: int, implementation: str) -> None:
    z, field, refs = points(9, 33, D, dtype)
    bound = 1e-12 if dtype == F64 else 2e-6
    for factor in (0.0, -1.5, 0.25, 40.0):
        got = fk.residual_gradient(z, field, refs, 0.4 * D, factor=factor)
        truth = oracles.residual_gradient(*(t.numpy() for t in (z, field, refs)), 0.4 * D, factor)
        assert oracles.relative_error(got.numpy(), truth) < bound


def test_one_factor_per_query_and_group(backend: str) -> None:
    z, field, refs = (torch.randn(2, n, 3, dtype=F64) for n in (4, 4, 5))
    per_query, per_group = torch.randn(2, 4, dtype=F64), torch.randn(2, dtype=F64)
    got = fk.residual_gradient(z, field, refs, 0.7, factor=per_query)
    of_group = fk.residual_gradient(z, field, refs, 0.7, factor=per_group)
    for b in range(2):
        alone = fk.residual_gradient(z[b], field[b], refs[b], 0.7, factor=per_group[b].item())
        torch.testing.assert_close(of_group[b], alone)
        for n in range(4):
            one = fk.residual_gradient(z[b, n : n + 1], field[b, n : n + 1], refs[b], 0.7, factor=per_query[b, n])
            torch.testing.assert_close(got[b, n : n + 1], one)


@pytest.mark.parametrize("D", [2, 20])
def test_without_the_density_it_is_the_jacobian_of_the_score(D: int, backend: str) -> None:
    z, field, refs = points(5, 11, D)
    jacobian = torch.func.jacrev(lambda x: fk.kde_score(x[None], refs, 0.8 * D, backend="torch")[0])
    truth = torch.stack([jacobian(x) @ f for x, f in zip(z, field, strict=True)])
    torch.testing.assert_close(fk.residual_gradient(z, field, refs, 0.8 * D, factor=0.0), truth)


def test_a_factor_of_one_changes_no_bit(backend: str) -> None:
    z, field, refs = points(6, 9, 3)
    plain = fk.residual_gradient(z, field, refs, 0.5)
    assert torch.equal(fk.residual_gradient(z, field, refs, 0.5, factor=1), plain)
    torch.testing.assert_close(fk.residual_gradient(z, field, refs, 0.5, factor=torch.ones(6, dtype=F64)), plain)


def test_derivatives_in_the_factor(backend: str) -> None:
    z, field, refs = points(3, 5, 2)
    factor = torch.randn(3, dtype=F64)
    inputs = [t.requires_grad_() for t in (z, field, refs, factor)]
    assert torch.autograd.gradcheck(lambda z, f, r, c: fk.residual_gradient(z, f, r, 0.6, factor=c), inputs)


def test_registration_with_and_without_a_factor(backend: str) -> None:
    z, field, refs = (t.unsqueeze(0) for t in points(3, 5, 2))
    sigma2 = torch.full((1, 3), 0.5, dtype=F64)
    for factor in (None, torch.randn(1, 3, dtype=F64)):
        torch.library.opcheck(residual_gradient_op.registered, (z, field, refs, sigma2, factor, backend))


@pytest.mark.parametrize(
    ("factor", "error", "text"),
    [
        ("1", TypeError, "factor must be a number or a floating tensor, got str"),
        (True, TypeError, "factor must be a number or a floating tensor, got bool"),
        (np.nan, ValueError, "factor must be finite, got nan"),
        (torch.tensor([1.0, np.inf, 0.0]), ValueError, "factor must be finite"),
        (torch.ones(3, dtype=torch.int64), TypeError, "factor must have a floating dtype"),
        (torch.ones(4), ValueError, r"factor of shape \[4\] does not fit \[3\]"),
    ],
)
def test_bad_factors(factor: object, error: type[Exception], text: str) -> None:
    z, field, refs = points(3, 5, 2, torch.float32)
    with pytest.raises(error, match=text):
        fk.residual_gradient(z, field, refs, 0.5, factor=factor)  # type: ignore[arg-type]
