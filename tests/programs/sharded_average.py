"""Kernel averages with reference points shared out over processes, against the average over all of them.

torchrun --standalone --nproc-per-node P -m tests.programs.process tests.programs.sharded_average
"""

import json
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

import fluxkernels as fk

F64 = torch.float64


def leaves(D: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    return {
        "x": normal(2, 6, D),
        "refs": normal(2, 17, D),
        "sigma2": D * (0.5 + torch.rand(2, 6, generator=generator, dtype=F64)),
        "values": normal(2, 17, 3),
        "log_weights": normal(2, 17),
    }


def second_derivatives(D: int, backend: str) -> dict[str, float]:
    """Derivatives of a norm of the first ones, with σ² of three groups and queries that all share."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(4)
    x, refs = (torch.randn(shape, generator=generator, dtype=F64) for shape in ((6, D), (3, 2 * size, D)))
    sigma2 = D * (0.5 + torch.rand(3, 6, generator=generator, dtype=F64))
    own = refs[:, 2 * rank : 2 * rank + 2]

    def found(function: Any, points: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, sigma2)]
        result = function(leaves[0], points, leaves[1], backend=backend)[0].square().sum()
        first = torch.autograd.grad(result, leaves, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    names = "x", "sigma2", "second in x", "second in sigma2"
    pairs = zip(names, found(fk.sharded_kernel_average, own), found(fk.kernel_average, refs), strict=True)
    return {name: distance(g, t) / float(t.abs().max()) for name, g, t in pairs}


def errors(D: int, kernel: str, backend: str) -> dict[str, float]:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = {name: t.requires_grad_() for name, t in leaves(D).items()}
    # Parts of different sizes; the last one has all of the second group's points absent.
    cuts = [17 * k * k // (size * size) for k in range(size + 1)]
    own = slice(cuts[rank], cuts[rank + 1])
    with torch.no_grad():
        if size > 1:
            whole["log_weights"][1, cuts[-2] :] = -torch.inf
    parts = {
        name: (t[:, own] if name in ("refs", "values", "log_weights") else t).detach().clone().requires_grad_()
        for name, t in whole.items()
    }
    expected = fk.kernel_average(**whole, kernel=kernel, backend=backend)
    got = fk.sharded_kernel_average(**parts, kernel=kernel, backend=backend)
    cotangents = [torch.ones_like(t) for t in expected]
    mine = torch.autograd.grad(got, list(parts.values()), cotangents)
    theirs = torch.autograd.grad(expected, list(whole.values()), cotangents)
    found = {f"result {k}": distance(g, t) for k, (g, t) in enumerate(zip(got, expected, strict=True))}
    for name, g, t in zip(parts, mine, theirs, strict=True):
        found[name] = distance(g, t[:, own] if name in ("refs", "values", "log_weights") else t)
    return found


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max())


def main() -> None:
    dist.init_process_group("gloo")
    for backend in filter(lambda name: fk.backends()[name].available, ("torch", "cpu")):
        for D in (2, 20):
            found = {kernel: errors(D, kernel, backend) for kernel in ("gaussian", "laplace")}
            found["second derivatives"] = second_derivatives(D, backend)
            for what, each in found.items():
                row = {"D": D, "what": what, "backend": backend, "rank": dist.get_rank()}
                print(json.dumps(row | {"errors": each}) + "\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
