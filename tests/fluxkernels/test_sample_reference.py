"""Reference points drawn by weight: frequencies, seeds, exclusions."""

import pytest
import torch

import fluxkernels as fk
from fluxkernels import reference

F64 = torch.float64


@pytest.mark.parametrize("D", [2, 20])
@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_frequencies_are_the_weights(kernel: str, D: int, backend: str) -> None:
    """Many copies of a query, and a value per reference point: the average is the probability."""
    refs, logs, draws = torch.randn(7, D, dtype=F64), torch.randn(7, dtype=F64), 20_000
    x = 0.3 * torch.randn(1, D, dtype=F64)
    p, _ = fk.kernel_average(x, refs, 0.7 * D, torch.eye(7, dtype=F64), log_weights=logs, kernel=kernel)
    index = fk.sample_reference(x.expand(draws, D), refs, 0.7 * D, log_weights=logs, kernel=kernel, seed=5)
    assert index.dtype == torch.int64
    count = index.bincount(minlength=7)
    statistic = ((count - draws * p[0]).square() / (draws * p[0])).sum()
    assert statistic < 22.5  # 99.9 % of a chi-squared variable with six degrees of freedom


@pytest.mark.parametrize("D", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_same_indices_on_every_backend(dtype: torch.dtype, D: int, backend: str) -> None:
    x, refs = torch.randn(3, 41, D, dtype=dtype), torch.randn(3, 301, D, dtype=dtype)
    for seed in (0, 2**63 + 11, -5):
        got = fk.sample_reference(x, refs, 0.5 * D, seed=seed)
        expected = fk.sample_reference(x, refs, 0.5 * D, seed=seed, backend="torch")
        assert (got == expected).float().mean() > (0.999 if dtype == F64 else 0.98)


def test_seeds(backend: str) -> None:
    x, refs = torch.randn(50, 2), torch.randn(60, 2)
    first = fk.sample_reference(x, refs, 1.0, seed=1)
    assert torch.equal(first, fk.sample_reference(x, refs, 1.0, seed=1))
    assert torch.equal(first, fk.sample_reference(x, refs, 1.0, seed=torch.tensor(1)))
    assert not torch.equal(first, fk.sample_reference(x, refs, 1.0, seed=2))
    torch.manual_seed(0)
    drawn = fk.sample_reference(x, refs, 1.0)
    torch.manual_seed(0)
    assert torch.equal(drawn, fk.sample_reference(x, refs, 1.0))


@pytest.mark.parametrize("D", [2, 20])
def test_exclusions(D: int, backend: str) -> None:
    x = torch.randn(40, D)
    logs = torch.where(torch.arange(40) % 2 == 0, 0.0, -torch.inf)
    index = fk.sample_reference(x, x, 0.01, log_weights=logs, exclude_self=True, seed=3)
    assert (index % 2 == 0).all()
    assert (index != torch.arange(40)).all()


def test_a_bootstrap_is_uniform(backend: str) -> None:
    x, refs = torch.zeros(6000, 2), torch.randn(10, 2)
    count = fk.sample_reference(x, refs, 1e12, seed=0).bincount(minlength=10)
    assert ((count - 600.0).square() / 600).sum() < 27.9  # 99.9 %, nine degrees of freedom


def test_the_reference_draws_by_the_formula() -> None:
    """Elements count `[B, N, M]`, and a draw is the largest of the logits and Gumbel numbers."""
    z, refs, sigma2, seed = torch.randn(2, 3, 2, dtype=F64), torch.randn(2, 5, 2, dtype=F64), 0.5, torch.tensor(9)
    words = fk.philox.bits(seed, (1, 2, 3, 5), fk.philox.REFERENCE).flatten()[:30].view(2, 3, 5)
    gumbel = -(-((words.double() + 0.5) * 2.0**-32).log()).log()
    logits = -(z.unsqueeze(2) - refs.unsqueeze(1)).square().sum(-1) / (2 * sigma2)
    got = reference.sample_reference(z, refs, torch.full((2, 3), sigma2, dtype=F64), None, False, "gaussian", seed)
    assert torch.equal(got, (logits + gumbel).argmax(-1))


def test_bad_input() -> None:
    x = torch.randn(3, 2)
    with pytest.raises(TypeError, match="sample_reference: seed must be an integer"):
        fk.sample_reference(x, x, 0.5, seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sample_reference: sigma2 must be a positive finite number"):
        fk.sample_reference(x, x, 0.0)
    with pytest.raises(ValueError, match="sample_reference: exclude_self must be False unless"):
        fk.sample_reference(x, x[:2], 0.5, exclude_self=True)
