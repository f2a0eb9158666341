"""Every Triton kernel on the cases of tests/cases.py against the formulas in float64; one JSON line a case and dtype.
The ops above them, with derivatives, against those of the torch backend.

TRITON_INTERPRET=1 python -m tests.fluxkernels.interpreted [PART PARTS]     every PARTS-th of them, from PART on
"""

import json
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import fluxkernels as fk
from fluxkernels import philox, reference, triton_kernels
from fluxkernels.triton_kernels import gram, launch
from tests.cases import CASES, Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Centres above which the interpreter takes too long, and cases that it runs in float64 too; a GPU runs all.
MOST_CENTRES = 100
IN_FLOAT64 = {
    "plain", "offset 1000, spread 1", "sigma2 = 4e-6", "sigma2 = 6400", "duplicates, D = 17, sigma2 = 4e-6", "D = 3",
    "M = 1", "N = 1", "D = 17", "tau = 0", "tau = 1e-6, D = 200", "tau = 4", "windows, one far outlier, tau = 4",
}  # fmt: skip
# Beyond tests/cases.py: more centres than a tile of the chain's kernels, and than a row's vector, has.
MORE = [Case(f"D = 20, M = {M}", N=5, M=M, D=20, sigma2=6.0) for M in (150, 300, 1100)]


def limit(case: Case, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        # In many dimensions distances come from inner products, and lose what |x|² is above σ².
        return 1e-9 if case.D > triton_kernels.MOST_STREAMED else 1e-11
    # Far from the origin or with few digits in σ a float32 coordinate itself is the error, to which all ops but the
    # score are no better conditioned.
    hard = case.offset or case.far or case.outlier or case.sigma2 < 1e-3 or case.sigma2 > 1000
    return 1e-4 if hard else 1e-5


def compare(names: str, got: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> Iterator[tuple[str, float]]:
    for name, g, t in zip(names.split(), got, truth, strict=True):
        error = torch.linalg.vector_norm(g.double() - t) / torch.linalg.vector_norm(t).clamp_min(1e-30)
        yield name, error.item()


def errors(case: Case, dtype: torch.dtype) -> dict[str, float]:
    arrays = case.arrays()
    z, refs, field, noise = (torch.from_numpy(arrays[k]).to(DEVICE, dtype) for k in ("z", "refs", "field", "noise"))
    z, refs, field, noise = z[None], refs[None], field[None], noise[:, None]
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(z.shape, generator=generator).to(DEVICE, dtype)
    g = torch.randn(z.shape[:2], generator=generator).to(DEVICE, dtype)
    sigma2 = torch.full(z.shape[:2], float(np.float32(case.sigma2)), dtype=dtype, device=DEVICE)
    per_group, tau = sigma2[:, 0].contiguous(), torch.full((1,), case.tau, dtype=dtype, device=DEVICE)
    seed = torch.tensor(-(2**62) + 12345, device=DEVICE)

    def double(*tensors: Tensor) -> list[Tensor]:
        return [t.double() for t in tensors]

    found = dict(
        compare("shift mean log_density", triton_kernels.kde(z, refs, sigma2), reference.kde(*double(z, refs, sigma2)))
    )
    inputs = field, v, g, z, refs, sigma2
    names = "g_z g_refs g_sigma2"
    found |= compare(names, triton_kernels.kde_backward(*inputs), reference.kde_backward(*double(*inputs)))
    points = z, field, refs, sigma2
    residual = triton_kernels.residual_gradient(*points), reference.residual_gradient(*double(*points))
    found |= compare("residual", residual[:1], residual[1:])

    chain = z, refs, per_group, tau
    found |= compare(
        "chain", (triton_kernels.langevin_chain(*chain, 4, noise, None),),
        (reference.langevin_chain(*double(*chain), 4, noise.double(), None),),
    )  # fmt: skip
    found |= compare(
        "chain_of_seed", (triton_kernels.langevin_chain(*chain, 3, None, seed),),
        (reference.langevin_chain(*double(*chain), 3, None, seed),),
    )  # fmt: skip
    x0, shift0, xt, shift_t = triton_kernels.flux_pass(*chain, 3, None, seed)
    n0 = philox.normal(seed, (1, *z.shape), philox.START, torch.float64)[0]
    truth = (z.double() + per_group.double().sqrt() * n0).to(dtype).double()
    found |= compare("x0", (x0,), (truth,))
    # What follows is judged at the points as rounded.
    truth = reference.langevin_chain(*double(x0, refs, per_group, tau), 3, None, seed)
    ends = [reference.kde(*double(x, refs, sigma2))[0] for x in (x0, xt)]
    found |= compare("xt shift0 shift_t", (xt, shift0, shift_t), (truth, *ends))

    transition = x0, shift0, xt
    weights = triton_kernels.transition_weights(*transition, per_group, tau)
    average = triton_kernels.transition_average(*transition, field, per_group, tau)
    found |= compare(
        "weights average", (weights, average),
        (
            reference.transition_weights(*double(*transition, per_group, tau)),
            reference.transition_average(*double(*transition, field, per_group, tau)),
        ),
    )  # fmt: skip
    return found


def results_of_ops(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Public ops on groups with strides and a bandwidth each, and the derivatives of a combination of them all."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    x, refs, values = leaf(3, 2, 17, 3).transpose(0, 1), leaf(2, 1, 3, 23).mT, leaf(2, 3, 17, 5)
    leaves = x, refs, values
    for t in leaves:
        t.retain_grad()
    sigma2 = torch.tensor([[0.1, 0.4, 2.0]] * 2, dtype=dtype, device=DEVICE).requires_grad_()
    tau = torch.tensor(0.7, dtype=dtype, device=DEVICE).requires_grad_()
    with fk.use_backend(backend):
        step = fk.flux_pass(x, refs, sigma2, tau, steps=2, seed=5)
        results = {
            "kde_score": fk.kde_score(x, refs, sigma2),
            "kde_mean": fk.kde_mean(x, refs, sigma2),
            "kde_log_density": fk.kde_log_density(x, refs, sigma2),
            "langevin_step": fk.langevin_step(x, refs, sigma2, 0.3, seed=6),
            "langevin_chain": fk.langevin_chain(x, refs, sigma2, tau, seed=7),
            "transition_weights": fk.transition_weights(step.x0, step.xt, refs, sigma2, tau),
            "transition_average": step.transition_average(values),
            "residual_gradient": fk.residual_gradient(x, torch.sin(x), refs, sigma2),
            "x0": step.x0,
            "score0": step.score0,
            "xt": step.xt,
            "score_t": step.score_t,
        }
        # Of a fixed combination: a function with large arguments would only magnify their rounding.
        sum((r * torch.arange(r.numel(), device=DEVICE).cos().view(r.shape)).sum() for r in results.values()).backward()
    named = dict(zip(("x", "refs", "values", "sigma2", "tau"), (*leaves, sigma2, tau), strict=True))
    return {k: v.detach() for k, v in results.items()} | {f"gradient in {k}": t.grad for k, t in named.items()}


def of_ops(dtype: torch.dtype) -> dict[str, float]:
    got, truth = results_of_ops("triton", dtype), results_of_ops("torch", torch.float64)
    return dict(compare(" ".join(k.replace(" ", "_") for k in got), tuple(got.values()), tuple(truth.values())))


def of_half() -> dict[str, float]:
    """A pass and a score in bfloat16 and float16, in few and many dimensions, against the torch backend's."""
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
            names = " ".join(f"{op}_{dtype}_{D}" for op in ("x0", "xt", "score_t", "score"))
            found |= compare(names, results["triton"], tuple(r.double() for r in results["torch"]))
    return found


def of_nan() -> dict[str, float]:
    """Results that are finite though a query is not: a chain that diverges must not look sound."""
    found = {}
    for D in (3, 20):
        z = torch.randn(1, 9, D, device=DEVICE)
        z[0, 4, 1] = float("nan")
        sigma2, tau = torch.ones(1, 9, device=DEVICE), torch.ones(1, device=DEVICE)
        results = triton_kernels.kde(z, z.nan_to_num(), sigma2)
        weights = triton_kernels.transition_weights(z.nan_to_num(), torch.zeros_like(z), z, sigma2[:, 0], tau)
        parts = [result[0, 4].flatten() for result in results] + [weights[0, :, 4]]
        found[f"finite_{D}"] = float(torch.cat(parts).isfinite().sum())
    return found


def checks() -> Iterator[tuple[str, torch.dtype, float, Callable[[], dict[str, float]]]]:
    """(name, dtype, largest error, what finds the errors by op)."""
    for dtype in (torch.float32, torch.float64):
        yield "ops", dtype, 1e-5 if dtype == torch.float32 else 1e-11, lambda dtype=dtype: of_ops(dtype)
        for case in (*CASES, *MORE):
            quick = case.M <= MOST_CENTRES or case.outlier > 0
            quick = quick and (dtype == torch.float32 or case.name in IN_FLOAT64)
            if quick or case in MORE or DEVICE == "cuda":
                yield case.name, dtype, limit(case, dtype), lambda case=case, dtype=dtype: errors(case, dtype)

    def patched(
        case: Case, target: object, dtype: torch.dtype = torch.float32, **changes: object
    ) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            with mock.patch.multiple(target, **changes):
                return errors(case, dtype)

        return run

    yield "NaN", torch.float32, 0.5, of_nan
    # The interpreter cuts float32 off to bfloat16, where a GPU rounds: a unit in the last place, 4e-3.
    yield "half precision", torch.bfloat16, 1e-2, of_half
    few, many = Case("layouts", N=40, M=130, D=3), Case("paths", N=70, M=90, D=50, sigma2=10.0)
    for each in launch.LAYOUTS:
        only = patched(few, launch, layouts=lambda *_, each=each: [each])
        yield f"layout {each}", torch.float32, 1e-5, only
    yield "a chain by steps", torch.float32, 1e-5, patched(many, gram, MOST_CENTRES=16)
    yield "a chain by steps", torch.float64, 1e-9, patched(many, gram, torch.float64, MOST_PRODUCTS=16)
    yield "blocks of queries", torch.float32, 1e-5, patched(many, gram, MOST_PAIRS=2000)


def main() -> None:
    assert fk.backends()["triton"].available
    part, parts = map(int, sys.argv[1:] or (0, 1))
    for name, dtype, largest, find in list(checks())[part::parts]:
        print(json.dumps({"case": name, "dtype": str(dtype), "limit": largest, "errors": find()}), flush=True)


if __name__ == "__main__":
    main()
