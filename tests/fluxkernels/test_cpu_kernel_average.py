"""Kernel averages in C++: edges of layouts, windows, weights that float32 cannot hold, threads, instruction sets.

test_kernel_average.py tests the results of all backends. Here each result stands beside that of the float64 reference
on the same numbers.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxkernels import cpu, reference
from tests.support.cases import CASES, Case

if cpu.missing() is not None:
    pytest.skip(f"the cpu backend cannot run: {cpu.missing()}", allow_module_level=True)
kernels: Any = cpu._kernels
F32, F64 = torch.float32, torch.float64
RESULTS = ("shift", "average", "log_sum")
COTANGENTS = ("g_z", "g_refs", "g_sigma2", "g_values", "g_log_weights")
SPANS = (None, 0.0, 10.0, 100.0, 1000.0, "half absent", "two present")


@dataclass(frozen=True)
class Problem:
    """Arguments of `kernel_average`, in their order."""

    z: Tensor
    refs: Tensor
    sigma2: Tensor
    values: Tensor | None = None
    log_weights: Tensor | None = None
    exclude_self: bool = False
    kernel: str = "gaussian"

    def arguments(self, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        found = (getattr(self, name) for name in self.__dataclass_fields__)
        return tuple(t.to(dtype) if dtype and isinstance(t, Tensor) else t for t in found)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(F32)


def log_weights(span: float | str | None, B: int, M: int) -> Tensor | None:
    if span is None:
        return None
    if isinstance(span, float):
        return span * torch.rand((B, M), generator=torch.Generator().manual_seed(M))
    step = 2 if span == "half absent" else max(1, M // 2)
    return torch.where(torch.arange(M) % step == 0, normal(B, M, seed=5), -torch.inf)


def of_case(case: Case, index: int) -> Problem:
    """The problem of a case with options that depend on its index."""
    arrays = case.arrays()
    z, refs = (torch.from_numpy(arrays[name]).unsqueeze(0) for name in ("z", "refs"))
    exclude, kernel = index % 3 == 1 and case.M > 1, "laplace" if index % 2 else "gaussian"
    if exclude:
        few = max(2, min(case.N, case.M))
        z, refs = (t[:, torch.arange(few) % t.shape[1]] for t in (z, refs))
    N, M = z.shape[1], refs.shape[1]
    variance = case.sigma2 * (case.D if kernel == "laplace" else 1)
    per_reference = index % 5 == 2 and M > 1
    sigma2 = variance * (0.8 + 0.4 * torch.rand((1, 1, M) if per_reference else (1, N)))
    width = (None, 1, 2, 3, 4, 7, 30)[index % 7]
    values = None if width is None else normal(1, M, width, seed=index)
    return Problem(z, refs, sigma2, values, log_weights(SPANS[index % len(SPANS)], 1, M), exclude, kernel)


def error(got: Tensor, truth: Tensor, scale: float = 0.0) -> float:
    """Largest error relative to the largest number, if float32 has that; infinite if only one is finite."""
    finite = truth.isfinite()
    if not torch.equal(finite, got.isfinite()) or truth.numel() == 0:
        return 0.0 if truth.numel() == got.numel() == 0 else math.inf
    got, truth = got.double()[finite], truth[finite]
    if truth.numel() == 0:
        return 0.0
    return float((got - truth).abs().max()) / max(float(truth.abs().max()), scale, 1e-30)


def cotangents(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [normal(*t.shape, seed=11 + i).to(t.dtype) for i, t in enumerate(results)]


def assert_right(problem: Problem, bound: float, dtype: torch.dtype | None = None, *, backward: bool = True) -> None:
    arguments, exact = problem.arguments(dtype), problem.arguments(F64)
    got, truth = cpu.kernel_average(*arguments), reference.kernel_average(*exact)
    for name, a, b in zip(RESULTS, got, truth, strict=True):
        assert error(a, b, 1.0 if name == "log_sum" else 0.0) < bound, name
    if not backward:
        return
    given = cotangents(got)
    derivatives = cpu.kernel_average_backward(*given, *arguments)
    true_derivatives = reference.kernel_average_backward(*(g.double() for g in given), *exact)
    for name, a, b in zip(COTANGENTS, derivatives, true_derivatives, strict=True):
        # A cotangent of a logit is a difference of numbers as large as the averages.
        scale = float(truth[1].nan_to_num().norm(torch.inf)) if name == "g_log_weights" and truth[1].numel() else 0.0
        assert error(a, b, scale) < bound, name


@pytest.mark.parametrize("offset", [0, 3, 10])
@pytest.mark.parametrize(("index", "case"), [(i, c) for i, c in enumerate(CASES) if c.D < 1000 and c.M < 10_000])
def test_adversarial_cases_in_float32(index: int, case: Case, offset: int) -> None:
    assert_right(of_case(case, index + offset), 1.2e-5)


@pytest.mark.parametrize("index", range(0, len(CASES), 3))
def test_adversarial_cases_in_float64(index: int) -> None:
    case = CASES[index]
    # The reference forms products of points in more than 16 dimensions, which a narrow kernel shows.
    bound = 1e-9 if case.D > 16 else 1e-11
    if case.D < 1000 and case.M < 10_000:
        assert_right(of_case(case, index), bound, F64)


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
@pytest.mark.parametrize("D", [1, 3, 4, 24, 25])
def test_edges_of_tiles(D: int, kernel: str, target: str) -> None:
    """Reference points at both sides of the sizes of tiles, and values on both sides of what one loop takes."""
    for M, width in product((1, 17, 255, 256, 257, 1025), (1, 3, 4)):
        z, refs = normal(1, 5, D, seed=M), normal(1, M, D, seed=M + 1)
        problem = Problem(z, refs, torch.full((1, 5), 0.3 * D), normal(1, M, width), log_weights(10.0, 1, M))
        assert_right(replace(problem, kernel=kernel), 2e-6 if M > 1 else 1e-5, backward=M < 1000)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize(("kernel", "sigma2"), [("gaussian", 1e-4), ("laplace", 1e-6)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_windows_hold_what_matters(dtype: torch.dtype, kernel: str, sigma2: float, exclude_self: bool) -> None:
    """Far reference points of wide groups are left out, unless weights or bandwidths of their own make them heavy."""
    M = 700
    points = normal(1, M, 2).sort(1).values if kernel == "laplace" else normal(1, M, 2)
    none = Problem(points, points, torch.full((1, M), sigma2), exclude_self=exclude_self, kernel=kernel)
    heavy = torch.zeros(1, M)
    heavy[0, 3] = 2000.0
    wide = torch.full((1, 1, M), sigma2)
    wide[0, 0, 5] = 4.0
    empty = torch.where(torch.arange(M) % 50 == 0, 0.0, -torch.inf).unsqueeze(0)
    values = normal(1, M, 3, seed=9)
    for problem in (
        replace(none, values=values, log_weights=1e-3 * heavy),
        replace(none, values=values, log_weights=heavy),
        replace(none, values=values, log_weights=empty),
        replace(none, log_weights=empty),
        replace(none, values=values, sigma2=wide),
    ):
        assert_right(problem, 1e-5 if dtype == F32 else 1e-9, dtype)


@pytest.mark.parametrize("D", [2, 40])
def test_instruction_sets_agree(D: int, target: str) -> None:
    index = {2: 9, 40: 11}[D]
    problem = replace(of_case(Case("plain", D=D, M=300, N=300, sigma2=0.2 * D), index), log_weights=normal(1, 300))
    got = cpu.kernel_average(*problem.arguments(F64))
    kernels.use("baseline")  # the fixture restores the previous set
    for a, b in zip(got, cpu.kernel_average(*problem.arguments(F64)), strict=True):
        assert error(a, b) < 1e-13


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("B", "N", "D"), [(1, 300, 3), (5, 70, 2), (1, 150, 40), (5, 70, 40)])
def test_threads(B: int, N: int, D: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Equal bit for bit with the same number of threads, up to rounding with others."""
    x, sigma2 = normal(B, N, D), torch.full((B, 1, N), 0.3 * D)
    problem = Problem(x, x, sigma2, normal(B, N, 4, seed=1), normal(B, N, seed=2), True, "laplace")
    arguments = problem.arguments(dtype)
    given = cotangents(cpu.kernel_average(*arguments))

    def run(count: int) -> list[Tensor]:
        threads(count)
        found = *cpu.kernel_average(*arguments), *cpu.kernel_average_backward(*given, *arguments)
        return [t for t in found if t.numel() > 0]

    alone = run(1)
    for count in (1, 2, 3):
        first, again = run(count), run(count)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        for a, b in zip(first, alone, strict=True):
            assert error(a, b.double()) < (2e-6 if dtype == F32 else 1e-13)


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [3, 40])
def test_layouts_and_dtypes(D: int, dtype: torch.dtype) -> None:
    """Strided, transposed and expanded tensors of each dtype give the bits of contiguous ones."""
    B, N, M, V = 3, 9, 11, 4
    wide = torch.promote_types(dtype, F32)
    z, refs, values = (
        normal(B, count, 2 * width, seed=width)[..., ::2].to(dtype) for count, width in ((N, D), (M, D), (M, V))
    )
    logs = normal(M, B, seed=3).to(wide).T
    for problem in (
        Problem(z, refs, torch.tensor([[0.3 * D]], dtype=wide).expand(B, N), values, logs),
        Problem(z, refs[:1].expand(B, M, D), normal(M).abs().to(wide).expand(B, 1, M) + D, values, logs),
        Problem(z, refs[:1].expand(B, M, D), torch.full((B, N), 0.3 * D, dtype=wide), None, logs[:1].expand(B, M)),
        Problem(z.transpose(0, 1).contiguous().transpose(0, 1), refs, torch.full((B, N), 0.3 * D, dtype=wide), values),
    ):
        dense = Problem(*(t.contiguous() if isinstance(t, Tensor) else t for t in problem.arguments()))
        got, expected = cpu.kernel_average(*problem.arguments()), cpu.kernel_average(*dense.arguments())
        given = cotangents(got)
        got = *got, *cpu.kernel_average_backward(*given, *problem.arguments())
        expected = *expected, *cpu.kernel_average_backward(*given, *dense.arguments())
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        assert [t.dtype for t in got[:3]] == [dtype, dtype, wide]
        assert_right(problem, {torch.bfloat16: 2e-2, torch.float16: 2e-3, F32: 1e-5, F64: 1e-12}[dtype])


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("D", [2, 30])
def test_absent_reference_points(D: int, dtype: torch.dtype) -> None:
    """A group without reference points has NaN and -inf, and changes nothing in the other one."""
    B, N = 2, 300
    logs = torch.zeros(B, N)
    logs[1] = -torch.inf
    logs[1, 7] = 0.0  # with its own point left out, query 7 of the second group has none
    x = normal(B, N, D)
    for values in (None, normal(B, N, 3)):
        problem = Problem(x, x, torch.full((B, N), 0.3 * D), values, logs, True)
        _, average, log_sum = cpu.kernel_average(*problem.arguments(dtype))
        alone = torch.zeros(B, N, dtype=torch.bool)
        alone[1, 7] = True
        assert torch.equal(average.isnan().any(-1), alone)
        assert torch.equal(log_sum == -torch.inf, alone)
        assert_right(problem, 1e-5 if dtype == F32 else 1e-11, dtype)
    nothing = replace(problem, log_weights=torch.full((B, N), -torch.inf))
    assert_right(nothing, 1e-5, dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("D", [2, 40])
def test_plain_averages_are_density_estimates(D: int, dtype: torch.dtype) -> None:
    problem = Problem(normal(2, 50, D), normal(2, 70, D, seed=1), torch.full((2, 50), 0.2 * D))
    z, refs, sigma2, *_ = arguments = problem.arguments(dtype)
    shift, average, log_sum = cpu.kernel_average(*arguments)
    expected = cpu.kde(z, refs, sigma2)
    assert torch.equal(shift, expected[0])
    assert torch.equal(average, expected[1])
    constant = math.log(70) + D / 2 * (2 * math.pi * sigma2).log()
    torch.testing.assert_close(log_sum, expected[2] + constant, rtol=1e-6, atol=1e-5)
    assert_right(problem, 2e-6 if dtype == F32 else 1e-12, dtype)


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
@pytest.mark.parametrize("M", [33, 1500])
def test_many_dimensions_compute_in_float32(M: int, kernel: str) -> None:
    """Nearly all queries do; if coordinates lose digits that float32 has, all are computed again in float64."""
    D = 64
    z, refs, values = normal(1, 40, D), normal(1, M, D, seed=1), normal(1, M, 5)
    sigma2 = torch.full((1, 40), 0.2 * D if kernel == "gaussian" else 1.0)
    problem = Problem(z, refs, sigma2, values, log_weights(10.0, 1, M), kernel=kernel)
    kernels.float_counts()
    assert_right(problem, 2e-6, backward=False)
    seen, rejected = kernels.float_counts()
    assert seen == 40
    assert rejected <= 2
    with coarse():
        assert_right(problem, 2e-6, backward=False)
    seen, rejected = kernels.float_counts()
    assert rejected == seen == 40


@contextmanager
def coarse() -> Iterator[None]:
    kernels.coarse(True)
    try:
        yield
    finally:
        kernels.coarse(False)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_distances_lost_in_products(exclude_self: bool) -> None:
    """The root of a small squared distance: queries at, or near, reference points far from the origin."""
    D, M = 48, 90
    few = normal(3, D)
    for near in (0.0, 1e-3, 0.1):
        x = (3 * few[torch.arange(M) % 3] + near * normal(M, D, seed=1)).unsqueeze(0)
        for sigma in (1e-3, 0.1, 10.0):
            problem = Problem(
                x, x, torch.full((1, M), sigma**2), normal(1, M, 3), normal(1, M), exclude_self, "laplace"
            )
            assert_right(problem, 1e-5)


def test_values_beyond_the_range_of_sums() -> None:
    for D in (3, 40):
        problem = Problem(normal(1, 4, D), normal(1, 9, D), torch.full((1, 4), 1.0 * D), 1e30 * normal(1, 9, 2))
        assert_right(problem, 1e-6, backward=False)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("D", [3, 40])
def test_the_log_sum_alone(D: int, dtype: torch.dtype) -> None:
    """Values without columns: nothing is averaged."""
    refs = normal(2, 70, D, seed=1)
    for logs, kernel in product((None, normal(2, 70)), ("gaussian", "laplace")):
        problem = Problem(normal(2, 50, D), refs, torch.full((2, 50), 0.3 * D), refs[..., :0], logs, kernel=kernel)
        assert cpu.kernel_average(*problem.arguments(dtype))[1].shape == (2, 50, 0)
        assert_right(problem, 2e-6 if dtype == F32 else 1e-12, dtype)
