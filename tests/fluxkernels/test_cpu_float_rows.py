"""Tests of the compiled kernels for float32 input in many dimensions, which compute in float32 and check themselves.

Each result stands beside that of the float64 reference on the same float32 numbers.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluxkernels import cpu, reference
from tests.support.targets import use_target

if cpu.missing() is not None:
    pytest.skip(f"the cpu backend cannot run: {cpu.missing()}", allow_module_level=True)
kernels: Any = cpu._kernels
BOUND = 1e-6
TAU = 1.0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clusters(M: int, D: int, size: float) -> Tensor:
    """Points about four centers, whose distance is about 10 √D."""
    return 10 * normal(4, D)[torch.arange(M) % 4] + size * normal(M, D, seed=1)


def noised(refs: Tensor, N: int, variance: float) -> Tensor:
    return refs[torch.arange(N) % len(refs)] + math.sqrt(variance) * normal(N, refs.shape[1], seed=2)


def outlier(M: int, D: int) -> Tensor:
    refs = normal(M, D)
    refs[0] += 1e4
    return refs


# Reference points, number of queries (0: the reference points are the queries), and variance.
PROBLEMS: dict[str, tuple[Tensor, int, float]] = {
    **{f"plain, D = {D}": (normal(M, D), N, 0.2 * D) for D, M, N in ((25, 130, 65), (64, 128, 128), (600, 90, 50))},
    **{f"queries are reference points, D = {D}": (normal(M, D), 0, 0.1 * D) for D, M in ((64, 128), (600, 90))},
    "several tiles of reference points": (normal(1500, 64), 20, 6.4),
    "D = 3072": (normal(33, 3072), 17, 300.0),
    "offset 10000": (1e4 + normal(90, 100), 50, 10.0),
    "narrow": (normal(90, 40), 50, 0.4),
    "very narrow": (normal(90, 40), 50, 1e-6),
    "wide": (normal(90, 40), 50, 4e4),
    "between": (normal(90, 40), 50, 1.2),
    "duplicates": (normal(90, 40)[torch.arange(90) // 5 * 5], 50, 8.0),
    "one far outlier": (outlier(90, 40), 50, 8.0),
    "one reference point": (normal(1, 40), 5, 2.0),
    "one query": (normal(60, 40), 1, 8.0),
    "all equal": (torch.ones(60, 40), 9, 8.0),
    **{f"clusters of size {s}": (clusters(90, 40, s), 50, 20 * s * s) for s in (1.0, 0.1, 1e-3)},
    "huge": (1e17 * normal(30, 40), 9, 1e35),
    "tiny": (1e-15 * normal(30, 40), 9, 1e-28),
}


def inputs(refs: Tensor, queries: int, variance: float, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Arguments of every kernel, for one group."""
    z = (noised(refs, queries, variance) if queries else refs).to(dtype)
    refs = refs.to(dtype)
    N, D = z.shape
    sigma2 = torch.full((1, N), variance)
    group, tau = sigma2[:, 0].contiguous(), torch.full((1,), TAU)
    size = math.sqrt(variance)
    cotangents = [normal(1, N, D, seed=s).to(dtype) for s in (3, 4)]
    shift, _, _ = reference.kde(z[None].double(), refs[None].double(), sigma2.double())
    ends = z.double() - math.expm1(-TAU) * shift[0] + size * normal(N, D, seed=6)
    transition = z[None], shift.to(dtype), ends[None].to(dtype)
    return {
        "kde": (z[None], refs[None], sigma2),
        "kde_backward": (*cotangents, size * normal(1, N, seed=5).to(dtype), z[None], refs[None], sigma2),
        "residual_gradient": (z[None], normal(1, N, D, seed=3).to(dtype) / size, refs[None], sigma2),
        "langevin_chain": (z[None], refs[None], group, tau, 4, normal(4, 1, N, D, seed=7).to(dtype), None),
        "flux_pass": (z[None], refs[None], group, tau, 4, normal(5, 1, N, D, seed=7).to(dtype), None),
        "transition_weights": (*transition, group, tau),
        "transition_average": (*transition, normal(1, N, 7, seed=8).to(dtype), group, tau),
    }


KERNELS = list(inputs(normal(3, 30), 2, 1.0))


def call(name: str, args: tuple, module: Any = cpu) -> list[Tensor]:
    results = getattr(module, name)(*args)
    return [results] if isinstance(results, Tensor) else list(results)


def truth(name: str, args: tuple) -> list[Tensor]:
    exact = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    return call(name, exact, reference)


def truth_beside(name: str, args: tuple, got: list[Tensor]) -> list[Tensor]:
    """The truth; displacements of a pass are judged at the float32 points that they belong to."""
    expected = truth(name, args)
    if name == "flux_pass":
        variance = args[2][:, None].expand(got[0].shape[:2])
        expected[1], expected[3] = (truth("kde", (points, args[1], variance))[0] for points in (got[0], got[2]))
    return expected


def relative_errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Errors relative to the result, or to float32's smallest normal number where all of the result is below."""
    return [
        ((a.double() - b).norm() / b.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
        for a, b in zip(got, expected, strict=True)
    ]


def rejected(name: str, args: tuple) -> tuple[int, int]:
    """(queries computed in float32, those that were repeated in float64)."""
    kernels.float_counts()
    call(name, args)
    counts: tuple[int, int] = kernels.float_counts()
    return counts


def limits(name: str, problem: str, count: int) -> list[float]:
    bounds = [BOUND] * count
    if name == "kde" and problem == "wide":
        bounds[1] = 1e-5  # a mean of points that cancel
    if name == "kde_backward":
        # The cotangent of a narrow estimate's variance is a tail of the weights, or cancels.
        bounds = [3e-6, 3e-6, 3e-5]
    return bounds


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", KERNELS)
def test_errors(name: str, problem: str) -> None:
    args = inputs(*PROBLEMS[problem])[name]
    got = call(name, args)
    expected = truth_beside(name, args, got)
    if problem == "tiny":
        expected = [e.float().double() for e in expected]  # some are too large for float32
    for error, bound in zip(relative_errors(got, expected), limits(name, problem, len(got)), strict=True):
        assert error < bound or math.isnan(error)


@pytest.mark.parametrize("problem", ["plain, D = 25", "between", "clusters of size 0.1", "very narrow"])
@pytest.mark.parametrize("name", KERNELS)
def test_every_instruction_set(name: str, problem: str, target: str) -> None:
    args = inputs(*PROBLEMS[problem])[name]
    got = call(name, args)
    errors = relative_errors(got, truth_beside(name, args, got))
    for error, bound in zip(errors, limits(name, problem, len(got)), strict=True):
        assert error < 3 * bound


@pytest.mark.parametrize("name", KERNELS)
def test_plain_problems_stay_in_float32(name: str) -> None:
    for problem in ("plain, D = 64", "queries are reference points, D = 64", "plain, D = 600"):
        seen, again = rejected(name, inputs(*PROBLEMS[problem])[name])
        assert seen >= 50
        assert again <= (0.05 * seen if name != "kde_backward" else seen)


def test_float64_input_takes_no_part() -> None:
    for name, args in inputs(*PROBLEMS["plain, D = 64"], dtype=torch.float64).items():
        assert rejected(name, args) == (0, 0), name


def test_half_precision_is_rounded_once() -> None:
    refs, queries, variance = PROBLEMS["plain, D = 64"]
    for dtype in (torch.bfloat16, torch.float16):
        args = inputs(refs, queries, variance, dtype)["kde"]
        assert rejected("kde", args)[0] > 0
        for got, expected in zip(call("kde", args), truth("kde", args), strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@contextmanager
def coarse() -> Iterator[None]:
    kernels.coarse(True)
    try:
        yield
    finally:
        kernels.coarse(False)


@pytest.mark.parametrize("problem", ["plain, D = 64", "narrow", "clusters of size 0.1"])
@pytest.mark.parametrize("name", KERNELS)
def test_coordinates_rounded_to_bfloat16_are_noticed(name: str, problem: str, target: str) -> None:
    """Every query falls back to float64, so results stay right."""
    args = inputs(*PROBLEMS[problem])[name]
    with coarse():
        seen, again = rejected(name, args)
        got = call(name, args)
    assert again == seen
    if name in ("langevin_chain", "flux_pass"):
        return  # the state of a chain is among what was rounded
    for error, bound in zip(relative_errors(got, truth(name, args)), limits(name, problem, len(got)), strict=True):
        assert error < bound


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", KERNELS)
def test_threads_give_the_same_bits_in_every_run(name: str, threads: Callable[[int], None]) -> None:
    refs, _, variance = PROBLEMS["between"]
    args = inputs(refs, 300, variance)[name]
    for count in (1, 2, 3):
        threads(count)
        first = call(name, args)
        for _ in range(3):
            for got, expected in zip(call(name, args), first, strict=True):
                assert torch.equal(got, expected)


def measured_errors(refs: Tensor, z: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """(estimated, measured) errors of the logits of each query relative to the largest one; -1 for rejected queries.

    The logits are read from transition weights of starts that stay where they are.
    """
    N = len(z)
    estimates = torch.full((N,), math.nan, dtype=torch.float64)
    one = torch.ones(1)
    kernels.float_estimates(estimates.data_ptr())
    try:
        weights = cpu.transition_weights(refs[None], 0 * refs[None], z[None], variance * one, 50 * one)[0].mT.double()
    finally:
        kernels.float_estimates(0)
    a = (z.double().unsqueeze(1) - refs.double()).square().sum(-1) / (2 * float(torch.tensor(variance)))
    nearest = weights.argmax(1, keepdim=True)
    exact = a.gather(1, nearest) - a
    # The exponent is rounded to float32, and so is the weight.
    rounding = 2e-7 * (1 + exact.abs())
    difference = (weights.clamp_min(1e-300).log() - weights.gather(1, nearest).log() - exact).abs() - rounding
    difference = torch.where(weights > 1e-13, difference, 0.0).amax(1)
    return estimates, difference


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    D=st.sampled_from([25, 33, 64, 200, 530, 1100]),
    M=st.integers(9, 300),
    offset=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
    variance=st.floats(-2.5, 2.0),
    size=st.sampled_from([0.0, 1.0, 0.1, 0.01]),
    at=st.sampled_from(["noised", "reference points", "far"]),
    seed=st.integers(0, 99),
)
def test_logits_of_accepted_queries_are_as_good_as_estimated(
    D: int, M: int, offset: float, spread: float, variance: float, size: float, at: str, seed: int
) -> None:
    torch.set_num_threads(1)
    refs = normal(M, D, seed=seed)
    if size:
        refs = 5 * normal(4, D, seed=seed)[torch.arange(M) % 4] + size * refs
    sigma2 = D * 10**variance * (size or 1) ** 2
    z = noised(refs, 48, 0.0 if at == "reference points" else sigma2) + (3 if at == "far" else 0)
    estimates, measured = measured_errors(offset + spread * refs, offset + spread * z, spread**2 * sigma2)
    assert not estimates.isnan().any()
    accepted = estimates >= 0
    assert (measured[accepted] <= estimates[accepted]).all()


def test_the_property_holds_for_accepted_queries_too() -> None:
    """The property test proves little if it rejects everything, or if nothing is estimated."""
    refs, queries, variance = PROBLEMS["plain, D = 64"]
    estimates, measured = measured_errors(refs, noised(refs, queries, variance), variance)
    assert (estimates > 0).all()
    assert (measured > 0.02 * estimates).any()


def test_instruction_sets_have_their_own_counts() -> None:
    for name in kernels.targets():
        with use_target(name):
            assert rejected("kde", inputs(*PROBLEMS["plain, D = 25"])["kde"])[0] == 65
