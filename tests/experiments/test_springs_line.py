"""Tests of the line of linear fields: closed forms without a density estimate, and the values that the README gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from experiments.springs import line, linear
from experiments.springs.simulator import trajectories

BLOCK = 4


@pytest.fixture(scope="module")
def covariance() -> Tensor:
    """Covariance of trajectories at every fifth point, 40 numbers each."""
    found = trajectories(2000, torch.Generator().manual_seed(0))[:, ::5]
    return found.flatten(1).double().T.cov()


def ends_of(covariance: Tensor, sigma: float) -> line.Ends:
    total = linear.noised(covariance, sigma)
    return linear.flux_matrix(total, BLOCK), linear.dsm_matrix(total, BLOCK)


def measured(covariance: Tensor, sigma: float, batches: int, refs: int = 0) -> tuple[float, float, float]:
    """Both α and the standard error of the second, of a few minibatches of 256 centers."""
    root, ends = torch.linalg.cholesky(covariance), ends_of(covariance, sigma)
    single = (ends[0].float(), ends[1].float())
    found = []
    for seed in range(batches):
        generator = torch.Generator().manual_seed(seed)
        centers = torch.randn(256 + refs, len(root), generator=generator, dtype=root.dtype) @ root.T
        centers = centers.float()
        found.append(line.losses_at_ends(single, centers[:256], centers, sigma, seed))
    every = torch.stack(found)
    return (*line.minima(every.mean(0)), line.jackknife(every))


def test_the_field_equals_its_matrix_and_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    ends = tuple(torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    z, score = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    field = line.LineField((ends[0], ends[1]), torch.tensor(0.3, dtype=torch.float64))
    matrix = 0.7 * ends[0] + 0.3 * ends[1]
    torch.testing.assert_close(field(z), torch.stack([-matrix @ one for one in z]))
    points = z.clone().requires_grad_(True)
    (pulled,) = torch.autograd.grad(field(points), points, score)  # its divergence is constant
    gradient, value = field.endpoint_gradient(z, score, None)
    torch.testing.assert_close(gradient, pulled)
    torch.testing.assert_close(value, field(z))


def test_minima_of_a_known_parabola() -> None:
    """Value 3 (α - 0.2)² + 5 with gradient 6 (α - 0.2) / 2: the same α; a gradient shifted to 0.4: its zero there."""
    value, slope = (lambda a: 3 * (a - 0.2) ** 2 + 5), (lambda a: 3 * (a - 0.2))
    found = torch.tensor([[value(a), slope(a)] for a in (0.0, 1.0)], dtype=torch.float64)
    assert line.minima(found) == pytest.approx((0.2, 0.2))
    found[:, 1] -= 0.6
    assert line.minima(found)[1] == pytest.approx(0.4)


def test_minimum_of_one_gaussian() -> None:
    """All centers at 0: E ℓ = 2 (1 - e⁻⁸) |sym A - I/σ²|²; antisymmetric parts are free."""
    generator = torch.Generator().manual_seed(1)
    skew, sym = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    identity, sigma = torch.eye(8, dtype=torch.float64), 1.5
    start = 0.3 * (sym + sym.T) + skew - skew.T
    direction = -1.4 * (sym + sym.T) + (sym - sym.T) + 0.1 * identity
    ends = identity / sigma**2 + start, identity / sigma**2 + start + direction
    symmetric = [(matrix + matrix.T) / 2 for matrix in (start, direction)]
    exact = -(symmetric[0] * symmetric[1]).sum() / symmetric[1].square().sum()
    assert line.alone(ends, torch.zeros_like(identity) + 1e-30 * identity, sigma) == pytest.approx(exact.item())
    centers = torch.zeros(2048, 8, dtype=torch.float64)
    found = torch.stack([line.losses_at_ends(ends, centers, centers[:1], sigma, seed) for seed in range(4)])
    assert line.minima(found.mean(0)) == pytest.approx((exact.item(), exact.item()), abs=0.02)


def test_centers_that_do_not_overlap_are_matched_alone(covariance: Tensor) -> None:
    """At σ = 0.3 the weights are one-hot: the measured α is that of the closed form, without a density estimate."""
    closed = line.alone(ends_of(covariance, 0.3), covariance, 0.3)
    assert closed == pytest.approx(0.979, abs=0.005)
    least, stop, error = measured(covariance, 0.3, batches=8)
    assert error < 0.03
    assert (least, stop) == pytest.approx((closed, closed), abs=4 * error)


@pytest.mark.parametrize(
    ("sigma", "refs", "expected", "tolerance"),
    [(0.3, 0, 0.99, 0.04), (1.0, 0, 0.95, 0.06), (3.0, 0, 0.60, 0.10), (3.0, 2000, 0.42, 0.12), (10.0, 0, 0.02, 0.08)],
)
def test_a_minibatch_leaves_little_of_the_freedom(
    covariance: Tensor, sigma: float, refs: int, expected: float, tolerance: float
) -> None:
    """0 keeps p_σ, 1 is masked score matching. A loss that knew p_σ itself would give 0 at every σ."""
    assert measured(covariance, sigma, batches=4 if refs else 10, refs=refs)[1] == pytest.approx(
        expected, abs=tolerance
    )
