"""Laws that hold for all numbers, on many shapes and scales: hypothesis searches for a counterexample.

The examples are the same in every run; raise max_examples and drop derandomize for a longer search.
"""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fluxkernels as fk

sizes = st.integers(1, 9)
log_sigma2 = st.floats(-5, 4)
taus = st.sampled_from([0.0, 1e-6, 0.3, 4.0])
# The fixture is meant to serve all examples of a test: they run on one backend.
SAME = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
scales = st.sampled_from([1e-3, 1.0, 1e3])


def points(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, **SAME)
@given(st.tuples(sizes, sizes, sizes, st.integers(1, 20)), log_sigma2, taus, scales, scales)
def test_finite_and_translation_invariant(
    backend: str, shape: tuple[int, int, int, int], exponent: float, tau: float, x_scale: float, refs_scale: float
) -> None:
    (G, N, M, D), sigma2 = shape, 10.0**exponent
    x, refs = points(1, G, N, D, scale=x_scale).double(), points(2, G, M, D, scale=refs_scale).double()
    p = fk.flux_pass(x, refs, sigma2, tau, seed=3)
    moved = fk.flux_pass(x + 2.0**20, refs + 2.0**20, sigma2, tau, seed=3)
    average = p.transition_average(x)
    for t in (p.x0, p.score0, p.xt, p.score_t, average, fk.kde_log_density(x, refs, sigma2)):
        assert t.isfinite().all()
    torch.testing.assert_close(moved.x0 - 2.0**20, p.x0, rtol=1e-6, atol=1e-6)
    # An average lies between its values, and the mean inside the range of the reference points.
    weights = fk.transition_weights(p.x0, p.xt, refs, sigma2, tau)
    torch.testing.assert_close(weights.sum(-2), torch.ones(G, N, dtype=torch.float64))
    torch.testing.assert_close(weights @ x, average, rtol=1e-9, atol=1e-9 * x_scale)
    mean = fk.kde_mean(x, refs, sigma2)
    slack = 1e-12 * refs_scale  # the weights sum to one up to rounding
    assert (mean >= refs.amin(-2, keepdim=True) - slack).all()
    assert (mean <= refs.amax(-2, keepdim=True) + slack).all()


@settings(max_examples=30, **SAME)
@given(st.integers(2, 9), st.integers(1, 5), st.floats(0.01, 10))
def test_permutations_and_duplicates(backend: str, M: int, D: int, sigma2: float) -> None:
    x, refs = points(4, 3, D).double(), points(5, M, D).double()
    s = fk.kde_score(x, refs, sigma2)
    torch.testing.assert_close(fk.kde_score(x, refs.flip(0), sigma2), s)
    torch.testing.assert_close(fk.kde_score(x, torch.cat([refs, refs]), sigma2), s)
    # Scaling space by c and σ² by c² scales the score by 1/c.
    torch.testing.assert_close(fk.kde_score(3 * x, 3 * refs, 9 * sigma2), s / 3)


def test_log_density_integrates_to_one(backend: str) -> None:
    refs = points(6, 12, 2).double()
    axis = torch.linspace(-7, 7, 281, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    density = fk.kde_log_density(grid, refs, 0.3).exp()
    torch.testing.assert_close(density.sum() * (axis[1] - axis[0]) ** 2, torch.tensor(1.0, dtype=torch.float64))


def test_chain_keeps_its_density(backend: str) -> None:
    """Chains started from p̂ stay in p̂ to the order of the step: mean and variance of a long chain of small steps."""
    refs = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    n, sigma2 = 40_000, 0.5
    p = fk.flux_pass(refs.repeat(n // 2, 1), refs, sigma2, 2.0, num_steps=100, seed=1)
    variance = 1 + sigma2
    assert abs(p.xt.mean().item()) < 4 * (variance / n) ** 0.5
    fourth = 1 + 6 * sigma2 + 3 * sigma2**2
    assert abs(p.xt.square().mean().item() - variance) < 4 * ((fourth - variance**2) / n) ** 0.5 + 0.01
