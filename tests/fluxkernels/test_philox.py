"""Philox 4×32-10 against the vectors its authors publish (Random123, kat_vectors), and the numbers made from it."""

import numpy as np
import pytest
import torch

import fluxkernels as fk
from fluxkernels import philox

KNOWN = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = philox.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(w.item() for w in words) == expected


def test_same_words_as_numpy() -> None:
    """Element e takes word e mod 4 of block e div 4. (NumPy's Philox is 4×64, so it cannot serve as a reference.)"""
    seed = torch.tensor(0x1234_5678_9ABC_DEF0)
    words = philox.bits(seed, (3, 10), philox.START)
    for step, e in ((0, 0), (1, 7), (2, 9)):
        counter = [torch.tensor(c) for c in (e // 4, 0, step, philox.START)]
        block = philox.philox(counter, (torch.tensor(0x9ABC_DEF0), torch.tensor(0x1234_5678)))
        assert words[step].flatten()[e].item() == block[e % 4].item()


def test_large_counters_reach_the_second_word() -> None:
    low = philox.philox([torch.tensor(c) for c in (5, 0, 0, 0)], [torch.tensor(0)] * 2)
    high = philox.philox([torch.tensor(c) for c in (5, 1, 0, 0)], [torch.tensor(0)] * 2)
    assert low[0] != high[0]


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 4, 7), (1, 2, 3, 3)])
def test_shapes(shape: tuple[int, ...]) -> None:
    for make in (philox.normal, philox.uniform, philox.rademacher):
        assert make(torch.tensor(1), shape, philox.CHAIN, torch.float64).shape == shape


def test_first_numbers_do_not_depend_on_the_size() -> None:
    small = philox.normal(torch.tensor(9), (2, 5), philox.CHAIN, torch.float64)
    large = philox.normal(torch.tensor(9), (3, 50), philox.CHAIN, torch.float64)
    assert torch.equal(small, large[:2, :5])


def test_normal_moments_and_independence() -> None:
    n = 1_000_000
    x = philox.normal(torch.tensor(2), (2, n), philox.CHAIN, torch.float64)
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert x[0].pow(moment).mean().item() == pytest.approx(expected, abs=5 * (variance / n) ** 0.5)
    neighbors = (x[0, 1:] * x[0, :-1]).mean(), (x[0] * x[1]).mean()
    assert max(abs(c.item()) for c in neighbors) < 5 / n**0.5
    # Kolmogorov and Smirnov: the distribution function, not only its moments.
    cdf = torch.special.ndtr(x[0].sort().values)
    assert (cdf - torch.arange(n) / n).abs().max().item() < 2 / n**0.5


def test_float32_equals_float64_to_rounding_even_in_the_tails() -> None:
    a = philox.normal(torch.tensor(4), (1, 4_000_000), philox.CHAIN, torch.float32)
    b = philox.normal(torch.tensor(4), (1, 4_000_000), philox.CHAIN, torch.float64)
    assert (a - b).abs().max().item() < 4e-6
    assert torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b) < 3e-7


def test_streams_steps_and_seeds_differ() -> None:
    base = philox.normal(torch.tensor(1), (1, 8), philox.CHAIN, torch.float64)
    assert not torch.equal(base, philox.normal(torch.tensor(1), (1, 8), philox.START, torch.float64))
    assert not torch.equal(base, philox.normal(torch.tensor(1 + 2**32), (1, 8), philox.CHAIN, torch.float64))
    two = philox.normal(torch.tensor(1), (2, 8), philox.CHAIN, torch.float64)
    assert not torch.equal(two[0], two[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_never_reaches_its_ends(dtype: torch.dtype) -> None:
    u = philox.uniform_from_words(torch.tensor([0, 2**32 - 1, 2**31]), dtype)
    assert u.tolist() == [2.0**-24, 1 - 2.0**-24, 0.5 + 2.0**-24]


def test_uniform_is_open_and_signs_are_balanced() -> None:
    u = philox.uniform(torch.tensor(1), (1, 1_000_000), philox.HORIZON, torch.float32)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    signs = philox.rademacher(torch.tensor(1), (1, 1_000_000), philox.PROBE, torch.float32)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean().item()) < 5e-3


def test_same_seed_same_chain(backend: str) -> None:
    """A seed gives the chain of its noise, in both dtypes; unsigned and signed seeds agree."""
    x, refs = torch.randn(3, 6, 2), torch.randn(3, 9, 2)
    noise = philox.normal(philox.as_seed(2**64 - 5, x.device), (4, *x.shape), philox.CHAIN, torch.float64)
    chain = fk.langevin_chain(x, refs, 0.2, 1.5, seed=2**64 - 5)
    torch.testing.assert_close(chain, fk.langevin_chain(x, refs, 0.2, 1.5, noise=noise.float()))
    torch.testing.assert_close(chain, fk.langevin_chain(x, refs, 0.2, 1.5, seed=-5), rtol=0, atol=0)
    in_double = fk.langevin_chain(x.double(), refs.double(), 0.2, 1.5, seed=torch.tensor(-5))
    torch.testing.assert_close(chain, in_double.float())


def test_torch_generator_decides_without_a_seed(backend: str) -> None:
    x, refs = torch.randn(6, 2), torch.randn(9, 2)

    def chain() -> np.ndarray:
        return fk.langevin_chain(x, refs, 0.2, 1.5).numpy()

    torch.manual_seed(5)
    first, second = chain(), chain()
    torch.manual_seed(5)
    assert np.array_equal(first, chain())
    assert not np.array_equal(first, second)


def test_start_noise_counts_elements_over_all_groups(backend: str) -> None:
    x = torch.zeros(3, 6, 2)
    start = philox.normal(torch.tensor(8), (1, *x.shape), philox.START, torch.float32)[0]
    torch.testing.assert_close(fk.flux_pass(x, x, 0.25, 1.0, seed=8).x0, 0.5 * start)


def test_flux_pass_uses_the_chain_of_its_seed(backend: str) -> None:
    x, refs = torch.randn(6, 2), torch.randn(9, 2)
    p = fk.flux_pass(x, refs, 0.2, 1.5, seed=8)
    torch.testing.assert_close(p.xt, fk.langevin_chain(p.x0, refs, 0.2, 1.5, seed=8))
