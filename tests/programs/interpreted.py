"""Compare the Triton kernels with the reference implementation in float64; print one JSON line per case and dtype.

    TRITON_INTERPRET=1 python -m tests.programs.interpreted few|all [PART PARTS]     every PARTS-th case, from PART on

`few` takes minutes: every kernel with sizes that cross the edges of its tiles, every op with its derivatives, every
layout and dtype, every way to split a problem, and in each package of kernels every kind of case in
tests/support/cases.py with few points. `all` adds these cases in their own sizes, without those that take the
interpreter too long; a GPU runs them too.
"""

import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import KernelInterface

import fluxkernels as fk
from fluxkernels import philox, reference, triton_kernels
from fluxkernels.triton_kernels import launch
from fluxkernels.triton_kernels.fixed_point.host import limits as fixed_point
from fluxkernels.triton_kernels.gram import host as gram
from tests.support.cases import CASES, Case
from tests.support.ops import KERNELS, OPS, tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Reference points above which the interpreter takes too long, and cases that it runs in float64 too; a GPU runs all.
MOST_REFS = 100
IN_FLOAT64 = {
    "plain", "offset 1000, spread 1", "sigma2 = 4e-6", "sigma2 = 6400", "duplicates, D = 17, sigma2 = 4e-6", "D = 3",
    "M = 1", "N = 1", "D = 17", "tau = 0", "tau = 1e-6, D = 200", "tau = 4", "windows, one far outlier, tau = 4",
}  # fmt: skip
# Cases in many dimensions whose chains and passes run from a seed, too, and the one that others stand for.
SEEDED = {"D = 17", "pixels, D = 48"}
TILES_OF_CPU = {case.name for case in CASES if case.D in (24, 25)} - {"D = 24, M = 7"}
# Cases that take the interpreter a minute each; a GPU runs them.
SLOW = {"D = 3072", "sigma2 = 4e-6, D = 3072", "tau = 0, duplicates, D = 17"}
ALL = tuple(kernel.name for kernel in KERNELS)
# Cases across the edges of tiles, and what runs on them. `streaming` has tiles of up to 16 reference points in each of
# up to 8 lanes, and of 32 queries or more; the others have tiles of up to 64 numbers, chains with up to 128 reference
# points at once, rows of pairs with up to 512, and rows of coordinates with up to 1024.
EDGES: tuple[tuple[Case, Collection[str]], ...] = (
    (Case("33 x 69, D = 7", N=33, M=69, D=7, sigma2=2.0), ALL),
    (Case("33 x 65, D = 65", N=33, M=65, D=65, sigma2=20.0), ALL),
    (Case("3 x 129, D = 20", N=3, M=129, D=20, sigma2=6.0), ("flux_pass", "langevin_chain")),
    (Case("2 x 513, D = 20", N=2, M=513, D=20, sigma2=6.0), ("kde",)),
    (Case("3 x 9, D = 1025", N=3, M=9, D=1025, sigma2=300.0), ("flux_pass", "kde", "kde_backward")),
    # Rows that are repaired.
    (
        Case("2 x 65, clusters, D = 65", N=2, M=65, D=65, clusters=1e-3, spread=10.0, sigma2=1e-6),
        ("flux_pass", "kde", "kde_backward", "transition_average"),
    ),
)
# What runs on every kind of case: all but chains, which are passes without a start, and the residual.
ON_KINDS = ("flux_pass", "kde", "kde_backward", "transition_weights", "transition_average")


def kind(case: Case) -> tuple[object, ...]:
    """What makes a case adversarial, apart from its number of points and dimensions."""
    extreme = "small" if case.sigma2 < 1e-3 else "large" if case.sigma2 > 1000 else None
    numbers = replace(case, name="", N=0, M=0, D=0, sigma2=0.0, duplicates=min(2, case.duplicates), drawn_as=None)
    return numbers, extreme, case.N == 1, case.M == 1


def kinds(N: int, M: int, D: int) -> list[Case]:
    """The first case of every kind, with at most N queries and M reference points, in D dimensions."""
    first: dict[object, Case] = {}
    for case in CASES:
        first.setdefault(kind(case), case)
    return [
        replace(c, name=f"few points, D = {D}: {c.name}", N=min(c.N, N), M=min(c.M, M), D=D, drawn_as=c.name)
        for c in first.values()
    ]


def limit(case: Case, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        # In many dimensions distances come from inner products, and lose digits if |x|² is much larger than σ².
        return 1e-9 if case.D > triton_kernels.MOST_STREAMED else 1e-11
    if case.D > triton_kernels.MOST_STREAMED:
        return 1e-6
    # Far from the origin, or for extreme σ, the rounding of float32 coordinates themselves dominates the error.
    hard = case.offset or case.far or case.outlier or case.sigma2 < 1e-3 or case.sigma2 > 1000
    return 1e-4 if hard else 1e-5


def compare(names: Iterable[str], got: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative error by name."""
    errors = {}
    for name, g, t in zip(names, got, truth, strict=True):
        error = torch.linalg.vector_norm(g.double() - t) / torch.linalg.vector_norm(t).clamp_min(1e-30)
        errors[name] = error.item()
    return errors


def double(args: Iterable[Any]) -> list[Any]:
    """The arguments with floating tensors in float64."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def followed(t: Tensor) -> Tensor:
    """The points, with the first ones again behind them in memory: what reads too far has wrong sums."""
    return torch.cat([t, t[:, :16]], 1)[:, : t.shape[1]]


def errors(case: Case, dtype: torch.dtype, names: Collection[str] = ALL, seeded: bool = True) -> dict[str, float]:
    """Errors of the kernels of these names; `seeded`: with noise from a seed, too."""
    arrays = case.arrays()
    z, refs, field, noise = (torch.from_numpy(arrays[k]).to(DEVICE, dtype) for k in ("z", "refs", "field", "noise"))
    z, refs, field, noise = followed(z[None]), followed(refs[None]), followed(field[None]), noise[:, None]
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(z.shape, generator=generator).to(DEVICE, dtype)
    sigma2 = torch.full(z.shape[:2], float(np.float32(case.sigma2)), dtype=dtype, device=DEVICE)
    inputs: dict[str, Any] = {
        **{"x": z, "refs": refs, "field": field, "values": field, "per_query": sigma2},
        **{"per_group": sigma2[:, 0].contiguous(), "tau": torch.full((1,), case.tau, dtype=dtype, device=DEVICE)},
        **{"g_shift": field, "g_mean": v},
        "g_log_density": torch.randn(z.shape[:2], generator=generator).to(DEVICE, dtype),
        **{"num_steps": 4, "chain_noise": noise, "seed": torch.tensor(-(2**62) + 12345, device=DEVICE)},
    }
    found, ends = run_pass(inputs) if "flux_pass" in names else ({}, {})
    for kernel in KERNELS:
        if kernel.name in names and kernel.name != "flux_pass":
            moved = ends if "xt" in kernel.arguments else {}
            for name, args in kernel.variants({**inputs, **moved}).items():
                if seeded or name == kernel.name:
                    got = getattr(triton_kernels, kernel.name)(*args)
                    truth = getattr(reference, kernel.name)(*double(args))
                    results = [f"{name}: {result}" for result in kernel.results]
                    found |= compare(results, as_tuple(got), as_tuple(truth))
    if "residual_gradient" in names:
        args = z, field, refs, sigma2, inputs["g_log_density"]
        got, truth = triton_kernels.residual_gradient(*args), reference.residual_gradient(*double(args))
        found |= compare(["residual_gradient with a factor: residual"], (got,), (truth,))
    return found


def run_pass(inputs: dict[str, Any]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(errors of a pass of three steps, inputs of the transition kernels from its results).

    Later results of the pass are compared at its own rounded points.
    """
    z, refs, sigma2, seed = inputs["x"], inputs["refs"], inputs["per_query"], inputs["seed"]
    chain = refs, inputs["per_group"], inputs["tau"]
    x0, shift0, xt, shift_t = triton_kernels.flux_pass(z, *chain, 3, None, seed)
    n0 = philox.normal(seed, (1, *z.shape), philox.START, torch.float64)[0]
    start = (z.double() + inputs["per_group"].double().sqrt() * n0).to(z.dtype).double()
    end = reference.langevin_chain(*double((x0, *chain)), 3, None, seed)
    shifts = [reference.kde(*double((x, refs, sigma2)))[0] for x in (x0, xt)]
    found = compare(("x0", "xt", "shift0", "shift_t"), (x0, xt, shift0, shift_t), (start, end, *shifts))
    return found, {"x": x0, "shift": shift0, "xt": xt}


def results_of_ops(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Public ops on groups with strides and a bandwidth per group, and the derivatives of a combination of them all."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    x, refs, values = leaf(2, 2, 17, 3).transpose(0, 1), leaf(2, 1, 3, 19).mT, leaf(2, 2, 17, 5)
    leaves = x, refs, values
    for t in leaves:
        t.retain_grad()
    sigma2 = torch.tensor([[0.1, 0.4], [2.0, 0.7]], dtype=dtype, device=DEVICE).requires_grad_()
    tau = torch.tensor(0.7, dtype=dtype, device=DEVICE).requires_grad_()
    inputs: dict[str, Any] = {
        **{"x": x, "refs": refs, "values": values, "field": torch.sin(x)},
        **{"per_group": sigma2, "per_query": sigma2, "tau": tau, "h": 0.3},
    }
    results = {}
    with fk.use_backend(backend):
        step = fk.flux_pass(x, refs, sigma2, tau, num_steps=2, seed=5)
        for op in OPS:
            # Transitions go from the starts to the ends of the pass.
            given = {**inputs, "x": step.x0, "xt": step.xt} if "xt" in op.arguments.values() else inputs
            steps = {"num_steps": 2} if op.takes_num_steps else {}
            result = tensors(op.call(given, **steps, **({"seed": 6} if op.noise else {})), values)
            results |= {f"{op.name} {i}": tensor for i, tensor in enumerate(result)}
        # Of a fixed combination: a function with large arguments would only magnify their rounding.
        sum((r * torch.arange(r.numel(), device=DEVICE).cos().view(r.shape)).sum() for r in results.values()).backward()
    named = dict(zip(("x", "refs", "values", "sigma2", "tau"), (*leaves, sigma2, tau), strict=True))
    return {k: v.detach() for k, v in results.items()} | {f"gradient in {k}": t.grad for k, t in named.items()}


def of_ops(dtype: torch.dtype) -> dict[str, float]:
    got, truth = results_of_ops("triton", dtype), results_of_ops("torch", torch.float64)
    return compare(got, tuple(got.values()), tuple(truth.values()))


def of_half() -> dict[str, float]:
    """Errors of a pass and a score in bfloat16 and float16, in few and many dimensions."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        for D in (3, 20):
            x = torch.randn(2, 11, D, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
            results = {}
            for backend in ("triton", "torch"):
                step = fk.flux_pass(x, x, 0.5 * D, 0.7, seed=3, backend=backend)
                score = fk.kde_score(x, x, 0.5 * D, backend=backend)
                results[backend] = step.x0, step.xt, step.score_t, score
            assert all(r.dtype == dtype for r in results["triton"])
            names = [f"{op}_{dtype}_{D}" for op in ("x0", "xt", "score_t", "score")]
            found |= compare(names, results["triton"], tuple(r.double() for r in results["torch"]))
    return found


def of_nan() -> dict[str, float]:
    """Number of finite results where a query, a reference point or σ² is not finite: a chain that diverges must not
    look correct. In many dimensions, of rows that are repaired too."""
    found = {}
    for D in (3, 20):
        z = torch.randn(1, 5, D, device=DEVICE)
        z[0, 4, 1] = float("nan")
        sigma2, tau = torch.ones(1, 5, device=DEVICE), torch.ones(1, device=DEVICE)
        results = triton_kernels.kde(z, z.nan_to_num(), sigma2)
        weights = triton_kernels.transition_weights(z.nan_to_num(), torch.zeros_like(z), z, sigma2[:, 0], tau)
        parts = [result[0, 4].flatten() for result in results] + [weights[0, :, 4]]
        found[f"finite_{D}"] = float(torch.cat(parts).isfinite().sum())
    x, nowhere = torch.randn(1, 5, 20, device=DEVICE), torch.full((1, 5), float("nan"), device=DEVICE)
    refs = torch.cat([x, x + 1e-4, x], 1)
    refs[0, -1, 3] = float("nan")
    for name, given, sigma2 in (("refs", refs, torch.full((1, 5), 1e-6, device=DEVICE)), ("sigma2", x, nowhere)):
        results = triton_kernels.kde(x, given, sigma2)
        step = triton_kernels.flux_pass(
            x, given, sigma2[:, 0], torch.ones(1, device=DEVICE), 2, None, torch.tensor(1, device=DEVICE)
        )
        found[f"finite of {name}"] = float(sum(result.isfinite().sum() for result in (*results, step[1], *step[2:])))
    return found


def of_groups() -> dict[str, float]:
    """Number of results that differ if groups are taken one by one: exact products do not depend on that."""
    x, refs = (torch.randn(3, 6, 19, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (3, 4))
    sigma2, tau = torch.tensor([0.5, 5.0, 50.0], device=DEVICE), torch.ones(3, device=DEVICE)
    noise = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    v = x.flip(1)

    def results() -> list[Tensor]:
        per_query = sigma2[:, None].expand(3, 6)
        step = triton_kernels.flux_pass(x, refs, sigma2, tau, 3, noise, None)
        seeded = triton_kernels.flux_pass(x, refs, sigma2, tau, 3, None, torch.tensor(7, device=DEVICE))
        average = triton_kernels.transition_average(step[0], step[1], step[2], v, sigma2, tau)
        backward = triton_kernels.kde_backward(v, v, v[..., 0], x, refs, per_query)
        return [*step, *seeded, average, *backward, *triton_kernels.kde(x, refs, per_query)]

    together = results()
    with mock.patch.multiple(fixed_point, MOST_PAIRS=6 * 6, MOST_PRODUCTS=5 * 6 * 6):
        apart = results()
    return {str(i): float(not torch.equal(a, b)) for i, (a, b) in enumerate(zip(together, apart, strict=True))}


Check = tuple[str, torch.dtype, float, Callable[[], dict[str, float]]]


def checks(complete: bool) -> Iterator[Check]:
    """Yield (name, dtype, largest error, function that returns the errors by op)."""
    for dtype in (torch.float32, torch.float64):
        yield "ops", dtype, 1e-5 if dtype == torch.float32 else 1e-11, partial(of_ops, dtype)
        for case, names in EDGES:
            if dtype == torch.float32 or not case.clusters:
                yield case.name, dtype, limit(case, dtype), partial(errors, case, dtype, names)
        for case in kinds(17, 19, 3):
            if dtype == torch.float32 or case.drawn_as in IN_FLOAT64:
                yield case.name, dtype, limit(case, dtype), partial(errors, case, dtype, ON_KINDS, False)
        for case in kinds(5, 9, 20):
            # In float64 the formulas themselves have too few digits in clusters far from their origin.
            if dtype == torch.float32 or not (case.clusters and case.outlier):
                yield case.name, dtype, limit(case, dtype), partial(errors, case, dtype, ON_KINDS, False)
        for case in CASES if complete else ():
            quick = (case.M <= MOST_REFS or case.outlier > 0) and case.name not in TILES_OF_CPU | SLOW
            if dtype == torch.float64 and case.clusters and case.outlier:
                continue  # see above
            if DEVICE == "cuda" or (quick and (dtype == torch.float32 or case.name in IN_FLOAT64)):
                seeded = case.D <= triton_kernels.MOST_STREAMED or case.name in SEEDED
                yield case.name, dtype, limit(case, dtype), partial(errors, case, dtype, ALL, seeded)
    yield "NaN", torch.float32, 0.5, of_nan
    # The interpreter truncates float32 to bfloat16, where a GPU rounds: a unit in the last place, 4e-3.
    yield "half precision", torch.bfloat16, 1e-2, of_half
    yield "groups", torch.float32, 0.5, of_groups
    yield from ways()


def ways() -> Iterator[Check]:
    """Yield the same for every layout of `streaming`, and every way to split a problem of the other packages."""

    def patched(
        case: Case, target: object, names: Collection[str] = ALL, dtype: torch.dtype = torch.float32, **changes: object
    ) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            with mock.patch.multiple(target, **changes):
                return errors(case, dtype, names)

        return run

    # Two whole tiles of each lane, of up to 16 reference points each, and five more points.
    for columns, lanes in launch.LAYOUTS:
        few = Case(f"layout {columns, lanes}", N=33 if columns == 32 else 17, M=16 * lanes + 5, D=3)
        only = patched(few, launch, layouts=lambda *_, layout=(columns, lanes): [layout])
        yield few.name, torch.float32, 1e-5, only
    many, chains = Case("paths", N=9, M=17, D=40, sigma2=10.0), ("flux_pass", "langevin_chain")
    yield "a chain by steps", torch.float32, 1e-6, patched(many, fixed_point, chains, MOST_REFS=16)
    yield "a chain by steps", torch.float64, 1e-9, patched(many, gram, chains, torch.float64, MOST_PRODUCTS=16)
    # Blocks of 5 and 4 queries, or of 4, of which the last has one.
    yield "blocks of queries", torch.float32, 1e-6, patched(many, fixed_point, MOST_PAIRS=5 * 17)
    yield "blocks of queries", torch.float64, 1e-9, patched(many, gram, ALL, torch.float64, MOST_PAIRS=4 * 17)
    parts = Case("parts", N=3, M=70, D=140, sigma2=50.0)
    yield "split products", torch.float32, 1e-6, patched(parts, fixed_point, ("flux_pass", "kde"), LONGEST=64)
    sums = "kde", "kde_backward", "residual_gradient"
    large = {"LEAST_BY_COLUMNS": (1, 1), "LARGE_TILE": 64}
    yield "as with many reference points", torch.float32, 1e-6, patched(parts, fixed_point, sums, **large)
    for tile in fixed_point.TILES:
        yield f"tile {tile}", torch.float32, 1e-6, patched(parts, fixed_point, ("kde", "kde_backward"), TILES=(tile,))


@contextmanager
def launched() -> Iterator[set[str]]:
    """Record the names of the kernels that are launched, with their modules."""
    names: set[str] = set()
    launching = KernelInterface.__getitem__

    def launch_kernel(kernel: Any, grid: Any) -> Any:
        names.add(f"{kernel.fn.__module__}.{kernel.fn.__name__}")
        return launching(kernel, grid)

    with mock.patch.object(KernelInterface, "__getitem__", launch_kernel):
        yield names


def patch_once() -> None:
    """Replace Triton's language once: the interpreter does so at every call of a function, 40% of its time."""
    patch = getattr(interpreter, "_patch_lang", None)
    if launch.INTERPRETED and patch is not None:
        patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        kept = SimpleNamespace(restore=lambda: None)
        interpreter._patch_lang = lambda function: kept


def report(find_checks: Callable[[bool], Iterator[Check]]) -> None:
    """Run the checks that the command line asks for, and print a JSON line for each."""
    assert fk.backends()["triton"].available
    patch_once()
    many, (part, parts) = sys.argv[1], map(int, sys.argv[2:] or (0, 1))
    for name, dtype, largest, find in list(find_checks({"few": False, "all": True}[many]))[part::parts]:
        with launched() as kernels:
            row = {"case": name, "dtype": str(dtype), "limit": largest, "errors": find(), "kernels": sorted(kernels)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    report(checks)
