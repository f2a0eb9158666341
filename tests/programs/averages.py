"""Compare the Triton kernels of `kernel_average` with the reference implementation in float64.

    TRITON_INTERPRET=1 python -m tests.programs.averages few|all [PART PARTS]     every PARTS-th case, from PART on

`few` gives kinds of adversarial cases one way to weight their reference points, in turn; `all` gives all of them all.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fluxkernels import reference, triton_kernels
from fluxkernels.triton_kernels import launch
from fluxkernels.triton_kernels.fixed_point.host import limits as fixed_point
from fluxkernels.triton_kernels.gram import host as gram
from tests.programs.interpreted import DEVICE, Check, compare, double, followed, kinds, limit, report
from tests.support.cases import Case

FORWARD = "shift", "average", "log-sum"
BACKWARD = "g_z", "g_refs", "g_sigma2", "g_values", "g_log_weights"


@dataclass(frozen=True)
class Way:
    """How reference points are weighted, and what is averaged.

    Attributes:
        columns: of the values; 0 for the reference points themselves.
        span: range of the log weights in nats, or None for no weights.
        absent: "half" of the reference points, all but "one", "all" of them, or "none".
        per_ref: whether each reference point has its own bandwidth.
    """

    columns: int = 0
    span: float | None = None
    absent: str = "none"
    per_ref: bool = False
    exclude_self: bool = False
    kernel: str = "gaussian"

    def tensors(self, case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
        """Arguments of `kernel_average` for the case; with `exclude_self` the queries are as many as the others."""
        arrays = case.arrays()
        N, M = (min(case.N, case.M),) * 2 if self.exclude_self else (case.N, case.M)
        z, refs = (followed(torch.from_numpy(a)[None].to(DEVICE, dtype)) for a in (arrays["z"][:N], arrays["refs"][:M]))
        generator = torch.Generator().manual_seed(3)
        wide = torch.promote_types(dtype, torch.float32)

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).to(DEVICE, wide)

        sigma2 = np.float32(case.sigma2).item() * (
            0.5 + random(1, 1, M) if self.per_ref else torch.ones_like(z[..., 0])
        )
        values = (random(1, M, self.columns) - 0.5).to(dtype) if self.columns else None
        logs = None if self.span is None else self.span * random(1, M)
        if logs is not None and self.absent != "none":
            kept = {"half": slice(None, None, 2), "one": slice(M // 2, M // 2 + 1), "all": slice(0)}[self.absent]
            present = torch.zeros_like(logs)
            present[:, kept] = 1
            logs = logs.masked_fill(present == 0, -torch.inf)
        return z, refs, sigma2.to(wide), values, logs, self.exclude_self, self.kernel


WAYS = (
    Way(columns=3, span=10.0),
    Way(span=1000.0),
    Way(span=0.0, absent="half", exclude_self=True),
    Way(columns=2, per_ref=True, kernel="laplace"),
    Way(kernel="laplace", exclude_self=True),
    Way(span=100.0, absent="half", per_ref=True),
    Way(columns=19, span=3.0, absent="one", kernel="laplace"),
    Way(span=1.0, absent="all"),
)


def errors(case: Case, dtype: torch.dtype, way: Way) -> dict[str, float]:
    """Errors of results and cotangents, infinite where others are not finite."""
    arguments = way.tensors(case, dtype)
    got, truth = triton_kernels.kernel_average(*arguments), reference.kernel_average(*double(arguments))
    generator = torch.Generator().manual_seed(4)
    cotangents = tuple(torch.randn(t.shape, generator=generator).to(DEVICE, dtype) for t in truth)
    got += triton_kernels.kernel_average_backward(*cotangents, *arguments)
    truth += reference.kernel_average_backward(*double((*cotangents, *arguments)))
    found = {}
    for name, g, t in zip(FORWARD + BACKWARD, got, truth, strict=True):
        same = g.shape == t.shape and torch.equal(g.isnan(), t.isnan()) and torch.equal(g.isinf(), t.isinf())
        finite = [u.double()[t.isfinite()] for u in (g, t)] if same else []
        found[name] = compare([name], (finite[0],), (finite[1],))[name] if same else torch.inf
    return found


def ways_of(case: Case, ways: tuple[Way, ...]) -> Iterator[tuple[str, Way]]:
    """Yield those that the case can have, named."""
    for way in ways:
        few = (way.exclude_self and min(case.N, case.M) < 3) or (way.per_ref and case.M == 1)
        if not few:
            yield f"{case.name}, {way}", way


def checks(complete: bool) -> Iterator[Check]:
    """Yield (name, dtype, largest error, function that returns the errors by result)."""
    turns = cycle(WAYS)
    for dtype, sizes in ((torch.float32, (17, 19, 3)), (torch.float32, (5, 9, 20)), (torch.float64, (5, 9, 20))):
        # In many dimensions `few` takes a third of the kinds.
        for case in kinds(*sizes)[:: 1 if complete or sizes[2] == 3 else 3]:
            if dtype == torch.float64 and case.clusters and case.outlier:
                continue  # see tests/programs/interpreted.py
            for name, way in ways_of(case, WAYS if complete else (next(turns),)):
                yield name, dtype, largest_error(case, dtype, way), partial(errors, case, dtype, way)
    yield from edges()
    yield from splits()
    yield "half precision", torch.bfloat16, 1e-2, of_half
    yield "strides", torch.float32, 1e-5, partial(of_strides, torch.float32)
    yield "strides", torch.float64, 1e-11, partial(of_strides, torch.float64)
    yield "draws", torch.float32, 1e-3, of_draws


def largest_error(case: Case, dtype: torch.dtype, way: Way) -> float:
    if dtype == torch.float64:
        # Weights make points equally heavy whose distances, from products about a far origin, have few digits.
        return 1e-7 if case.outlier and way.span else limit(case, dtype)
    # Where an outlier leaves out itself, a distance in float32 has few digits beside σ, and the weights are those of
    # many points, unlike with squares of distances.
    if way.kernel == "laplace" and way.exclude_self and case.outlier and case.D <= triton_kernels.MOST_STREAMED:
        return 2e-3
    return max(limit(case, dtype), 1e-5)


def edges() -> Iterator[Check]:
    """Yield the same for every layout of `streaming`, with two whole tiles of each lane and five more points."""
    for (columns, lanes), way in zip(launch.LAYOUTS, (WAYS[3], WAYS[0], WAYS[2], WAYS[5]), strict=True):
        size = 16 * lanes + 5
        case = Case(f"layout {columns, lanes}", N=33 if columns == 32 else 17, M=size, D=3)

        def run(case: Case = case, way: Way = way, layout: tuple[int, int] = (columns, lanes)) -> dict[str, float]:
            with mock.patch.object(launch, "layouts", return_value=[layout]):
                return errors(case, torch.float32, way)

        yield f"{case.name}, {way}", torch.float32, 1e-5, run


def splits() -> Iterator[Check]:
    """Yield the same for blocks of queries, of which the last has fewer, and for rows with many tiles."""
    ways = Way(columns=3, span=5.0, exclude_self=True), Way(kernel="laplace", per_ref=True, exclude_self=True)
    case = Case("blocks of queries", N=9, M=9, D=40, sigma2=10.0)
    for dtype, package in ((torch.float32, fixed_point), (torch.float64, gram)):
        for way in ways:

            def run(dtype: torch.dtype = dtype, package: Any = package, way: Way = way) -> dict[str, float]:
                with mock.patch.object(package, "MOST_PAIRS", 4 * 9):
                    return errors(case, dtype, way)

            yield f"{case.name}, {way}", dtype, 1e-5 if dtype == torch.float32 else 1e-9, run
    long = replace(case, name="2 x 513, D = 20", N=2, M=513, D=20, sigma2=6.0)
    for way in (replace(way, exclude_self=False) for way in ways):
        yield f"{long.name}, {way}", torch.float32, 1e-5, partial(errors, long, torch.float32, way)


def of_half() -> dict[str, float]:
    """Errors in bfloat16 and float16, in few and many dimensions."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        for D in (3, 20):
            case = Case(f"half, D = {D}", N=9, M=11, D=D, sigma2=0.5 * D)
            found |= {f"{name}, {dtype}, {D}": error for name, error in errors(case, dtype, WAYS[0]).items()}
    return found


def of_draws() -> dict[str, float]:
    """Shares of `sample_reference` that are not those of the reference implementation."""
    found = {}
    for D, way in ((3, WAYS[0]), (20, WAYS[3]), (3, WAYS[2])):
        case = Case(f"draws, D = {D}", N=40, M=37, D=D, sigma2=0.5 * D)
        z, refs, sigma2, _, logs, exclude_self, kernel = way.tensors(case, torch.float32)
        arguments = z, refs, sigma2, logs, exclude_self, kernel, torch.tensor(2**62 + 3, device=DEVICE)
        got, truth = triton_kernels.sample_reference(*arguments), reference.sample_reference(*double(arguments))
        found[f"{case.name}, {way}"] = (got != truth).double().mean().item()
    return found


def of_strides(dtype: torch.dtype) -> dict[str, float]:
    """Errors for arguments with other strides than contiguous ones, also where they repeat in memory."""
    found = {}
    generator = torch.Generator().manual_seed(5)
    for D in (3, 20):

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).to(DEVICE, dtype)

        z, refs, values = (
            random(7, D, 2).permute(2, 0, 1),
            random(1, D, 22).mT[:, ::2].expand(2, 11, D),
            random(2, 11, 8),
        )
        variance, logs = (D * (1 + random(2, 1, 22)))[..., ::2], random(11, 2).T.log()
        arguments = z, refs, variance, values[..., ::3], logs, False, "laplace"
        g_shift, g_average, g_log_sum = (
            z.new_empty(2, 7, 0),
            random(3, 2, 7).permute(1, 2, 0),
            random(2, 1).expand(2, 7),
        )
        got = triton_kernels.kernel_average(*arguments)
        got += triton_kernels.kernel_average_backward(g_shift, g_average, g_log_sum, *arguments)
        truth = reference.kernel_average(*double(arguments))
        truth += reference.kernel_average_backward(*double((g_shift, g_average, g_log_sum, *arguments)))
        names = [f"{name}, D = {D}" for name in FORWARD + BACKWARD]
        found |= compare(names, got, truth)
    return found


if __name__ == "__main__":
    report(checks)
