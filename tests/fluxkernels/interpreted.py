"""Every Triton kernel on the cases of tests/cases.py against the formulas in float64; one JSON line a case and dtype.

TRITON_INTERPRET=1 python -m tests.fluxkernels.interpreted
"""

import json
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fluxkernels import philox, reference, triton_kernels
from tests.cases import CASES, Case

# Pairs above which the interpreter takes too long.
MOST_PAIRS = 60_000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def limit(case: Case, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1e-11
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


def main() -> None:
    for case in CASES:
        if case.D > triton_kernels.MOST_DIMENSIONS or case.N * case.M * case.D > MOST_PAIRS:
            continue
        for dtype in (torch.float32, torch.float64):
            row = {"case": case.name, "dtype": str(dtype), "limit": limit(case, dtype)}
            print(json.dumps(row | {"errors": errors(case, dtype)}), flush=True)


if __name__ == "__main__":
    main()
