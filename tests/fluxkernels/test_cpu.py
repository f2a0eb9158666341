"""Tests of the compiled kernels alone: instruction sets, threads, layouts in memory, conversions, unusual numbers.

test_accuracy.py and test_derivatives.py test the results of all backends.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fluxkernels as fk
from fluxkernels import cpu, philox
from tests.support import fuzzing
from tests.support.ops import KERNELS, noises

if cpu.missing() is not None:
    pytest.skip(f"the cpu backend cannot run: {cpu.missing()}", allow_module_level=True)
kernels: Any = cpu._kernels
SHAPES = {  # (B, N, M, D): both layouts, several tiles of refs, one group for all threads and several per thread
    "columns": (1, 300, 1100, 3),
    "columns, groups": (5, 70, 200, 2),
    "columns, windows": (1, 200, 700, 1),
    "rows": (1, 150, 300, 40),
    "rows, groups": (4, 70, 90, 26),
}


def arguments(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64, seed: int = 1) -> dict[str, tuple]:
    """Arguments of every kernel, by its name and the source of its noise."""
    B, N, M, D = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    # Narrow for D = 1, so that reference points are sorted into cells.
    sigma2 = (0.5 + torch.rand(B, generator=generator, dtype=wide)) * (1e-3 if D == 1 else 0.2 * D)
    inputs = {
        **{name: normal(B, N, D) for name in ("x", "field", "shift", "g_shift", "g_mean")},
        "refs": normal(B, M, D),
        "xt": normal(B, N - 3, D),
        "values": normal(B, N - 3, 6),
        "g_log_density": normal(B, N),
        "per_group": sigma2,
        "per_query": sigma2.unsqueeze(-1).expand(B, N),
        "tau": torch.full((B,), 0.7, dtype=wide),
        "num_steps": 4,
        "seed": torch.tensor(-3),
        **noises(normal(5, B, N, D)),
    }
    return {name: args for kernel in KERNELS for name, args in kernel.variants(inputs).items()}


NAMES = list(arguments((1, 5, 3, 1)))


def call(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    results = getattr(cpu, name.split(" ")[0])(*args)
    return [results] if isinstance(results, Tensor) else [t for t in results if t.numel() > 0]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_threads(name: str, shape: tuple[int, int, int, int], threads: Callable[[int], None]) -> None:
    """Runs with the same number of threads are equal bit for bit; others are equal up to rounding."""
    args = arguments(shape)[name]
    threads(1)
    alone = call(name, args)
    for count in (1, 2, 3):
        threads(count)
        first = call(name, args)
        for _ in range(3):
            assert_same_bits(call(name, args), first)
        for got, expected in zip(first, alone, strict=True):
            difference = torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)
            assert difference.item() < 1e-14


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_instruction_sets_agree(name: str, shape: tuple[int, int, int, int], target: str) -> None:
    args = arguments(shape)[name]
    got = call(name, args)
    kernels.use("baseline")  # the fixture restores the previous set
    for a, b in zip(got, call(name, args), strict=True):
        assert (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item() < 1e-13


def layouts(t: Tensor) -> Iterator[Tensor]:
    """Yield the same numbers in other layouts: last dimension first, every other number, not aligned to cache lines."""
    yield t.movedim(-1, 0).contiguous().movedim(0, -1)
    apart = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
    apart[..., ::2] = t
    yield apart[..., ::2]
    yield torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape)
    yield t[:1].expand(t.shape)  # one group, or one step of noise, for all: other numbers, and strides of 0
    if t.ndim > 2:
        yield t[..., :1, :].expand(t.shape)
    yield t[..., :1].expand(t.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [3, 26])
@pytest.mark.parametrize("name", NAMES)
def test_strides(name: str, D: int, dtype: torch.dtype) -> None:
    """Each argument that is not contiguous gives the same bits as its contiguous copy."""
    args = arguments((2, 9, 10, D), dtype)[name]
    for i, argument in enumerate(args):
        if not isinstance(argument, Tensor) or not argument.is_floating_point():
            continue
        for laid in layouts(argument):
            changed, plain = list(args), list(args)
            changed[i], plain[i] = laid, laid.contiguous()
            assert_same_bits(call(name, tuple(changed)), call(name, tuple(plain)))


@pytest.mark.parametrize("D", [1, 3, 26])
@pytest.mark.parametrize("N", [1, 67])
def test_noise_of_any_elements(N: int, D: int, target: str) -> None:
    """With one reference point at 0 and long steps, a chain ends at its last noise, for every position in a block."""
    z, one = torch.zeros(3, N, D, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for seed in (0, 2**63 - 5, -5):
        got = cpu.langevin_chain(z, z[:, :1], one, 1e3 * one, 2, None, torch.tensor(seed))
        expected = philox.normal(torch.tensor(seed), (2, 3, N, D), philox.CHAIN, torch.float64)[1]
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=2e-14)
        start = cpu.flux_pass(z, z[:, :1], 4 * one, one, 1, None, torch.tensor(seed))[0]
        expected = philox.normal(torch.tensor(seed), (1, 3, N, D), philox.START, torch.float64)[0]
        torch.testing.assert_close(start, 2 * expected, rtol=1e-13, atol=4e-14)


@pytest.mark.parametrize(("steps", "elements"), [(1, 1), (3, 7), (2, 16_387), (1, 1_000_003)])
def test_normal_numbers(steps: int, elements: int, target: str) -> None:
    """The numbers agree in the tails, near the zeros of radius, sine and cosine, and on several threads."""
    expected = philox.normal(torch.tensor(5), (steps, elements), philox.CHAIN, torch.float64)
    for count in (1, 3):
        got = torch.full((steps * elements + 2,), math.nan, dtype=torch.float64)
        kernels.normals(5, philox.CHAIN, steps, 0, elements, count, got[1:].data_ptr())
        assert got[0].isnan()
        assert got[-1].isnan()
        # The error of the angle is a rounding of 2π, so a small sine or cosine has fewer correct digits.
        torch.testing.assert_close(got[1:-1].view(steps, elements), expected, rtol=4e-15, atol=2e-14)


def test_elements_beyond_the_counter_s_first_word(target: str) -> None:
    """Element 2³⁴ is in block 2³², whose counter has a second word."""
    seed, first, count = torch.tensor(5), 2**34 - 3, 7
    got = torch.empty(count, dtype=torch.float64)
    kernels.normals(5, philox.CHAIN, 1, first, count, 1, got.data_ptr())
    blocks = torch.tensor([2**32 - 1, 2**32, 2**32 + 1])
    zero = torch.zeros_like(blocks)
    words = philox.philox((blocks & 0xFFFFFFFF, blocks >> 32, zero, zero + philox.CHAIN), (seed, zero))
    expected = philox.normal_from_words(torch.stack(words, -1), torch.float64).flatten()[1 : 1 + count]
    torch.testing.assert_close(got, expected, rtol=4e-15, atol=2e-14)


def stored(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Store float64 `numbers` in `dtype` with a kernel: the displacement from -x to one reference point at 0."""
    z, count = -numbers.double().view(1, -1, 1), len(numbers)
    shift, mean = torch.empty(1, count, 1, dtype=dtype), torch.empty_like(z)
    ref, sigma2, log_density = z.new_zeros(1, 1, 1), z.new_ones(1, 1).expand(1, count), z.new_empty(1, count)
    kernels.kde((1, count, 1, 1), 1, z, ref, sigma2, shift, mean, log_density)
    return shift.flatten()


def loaded(numbers: Tensor) -> Tensor:
    """Load `numbers` of any dtype with a kernel."""
    z, count = numbers.view(1, -1, 1), len(numbers)
    shift, mean, log_density = (torch.empty(1, count, 1, dtype=torch.float64) for _ in range(3))
    ref, sigma2 = z.new_zeros(1, 1, 1), torch.ones(1, 1).expand(1, count)
    kernels.kde((1, count, 1, 1), 1, z, ref, sigma2, shift, mean, log_density[..., 0])
    return -shift.flatten()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conversions(dtype: torch.dtype, target: str) -> None:
    """All numbers of a half precision and numbers between them: ties, subnormal numbers, overflow to infinity."""
    half = torch.float16 if dtype == torch.float16 else torch.bfloat16
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(half)
    every = every[every.isfinite()]
    torch.testing.assert_close(loaded(every.to(dtype)), every.double(), rtol=0, atol=0)
    if dtype == torch.float32:
        every = torch.from_numpy(np.geomspace(1e-46, 3.4e38, 50_001)).float()
        torch.testing.assert_close(loaded(every), every.double(), rtol=0, atol=0)
    ordered = every.double().unique()
    step = ordered[-1] - ordered[-2]
    # The last one lies between the largest number and the next one, which the dtype does not have.
    middle = torch.cat([(ordered[1:] + ordered[:-1]) / 2, ordered[-1:] + step / 2])
    up = torch.tensor(math.inf, dtype=torch.float64)
    around = [middle, torch.nextafter(middle, up), torch.nextafter(middle, -up)]
    around += [middle.float().nextafter(toward.float()).double() for toward in (up, -up)]
    numbers = torch.cat([ordered, *around, middle * 1.001, torch.tensor([1e100, -1e100, 1e-100], dtype=torch.float64)])
    numbers = numbers[numbers.isfinite()]
    expected = numbers.to(dtype)
    assert expected.isinf().any()
    assert torch.equal(stored(numbers, dtype), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("D", [2, 30])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_are_not_finite_harm_their_own_group_alone(name: str, D: int, bad: float, target: str) -> None:
    """A compiled graph passes values unchecked. There is no crash and no endless loop, and other groups stay the same.

    The affected group uses windows, so that a cell is looked up for numbers that are not finite.
    """
    B, N, M = 3, 12, 100
    args = [a * 1 if isinstance(a, Tensor) else a for a in arguments((B, N, M, D))[name]]
    floating = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point() and a.numel() > 0]
    for i in floating:  # narrow
        if args[i].ndim <= 2 and (args[i] > 0).all() and (args[i] != 0.7).all():
            args[i] = torch.full_like(args[i], 1e-6)
    good = call(name, tuple(args))
    for i in floating:
        changed = list(args)
        changed[i] = args[i].contiguous().clone()
        where = [0] * changed[i].ndim
        where[changed[i].ndim == 4] = 1  # group 1; the first dimension of noise is its steps
        changed[i][tuple(where)] = bad
        for got, expected in zip(call(name, tuple(changed)), good, strict=True):
            assert torch.equal(got[[0, 2]], expected[[0, 2]])


def test_fuzz() -> None:
    report = fuzzing.run(seed=0, cases=iter(range(250)))
    assert report.failures == []
    assert report.compared > 0.7 * report.entries  # otherwise the test proves little


def test_fuzz_sees_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are tight enough to detect an error in the eighth digit of one query."""
    kde = cpu.kde

    def wrong(*args: Tensor) -> tuple[Tensor, ...]:
        shift, mean, log_density = kde(*args)
        shift[0, -1] *= 1 + 1e-8
        return shift, mean, log_density

    monkeypatch.setattr(cpu, "kde", wrong)
    report = fuzzing.run(seed=0, cases=iter(range(10)))
    assert any(f.startswith("shift") for f in report.failures)


def test_thousands_of_tiny_groups(target: str) -> None:
    """Groups of one query and one reference point: the mean is the reference point."""
    z, refs = torch.randn(5000, 1, 1), torch.randn(5000, 1, 1)
    assert torch.equal(fk.kde_mean(z, refs, 0.5, backend="cpu"), refs)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="runs no target 'mmx'"):
        kernels.use("mmx")


@pytest.mark.parametrize("dimensions", [1, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_tensors_of_any_dimensions_are_checked(dimensions: int, dtype: torch.dtype) -> None:
    """Only the kernels read strides; `make sanitize` sees one written beyond the three that they have room for."""
    t = torch.ones([1] * (dimensions - 1) + [5], dtype=dtype)
    assert kernels.is_finite(t, t.numel())
    for bad in (math.nan, math.inf, -math.inf):
        t[..., 3] = bad
        assert not kernels.is_finite(t, t.numel())


def test_kernels_refuse_tensors_of_four_dimensions() -> None:
    z = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match="three dimensions"):
        kernels.kde((1, 2, 2, 3), 1, z, z, torch.ones(1, 2), None, None, torch.zeros(1, 2))
