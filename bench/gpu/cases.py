"""What the GPU benchmarks run on, and who competes: our kernels, eager PyTorch, torch.compile, KeOps."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fluxkernels as fk
from bench import cases, peers, published

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A "pass" or a "score", by `kind`, of `queries` points a group: if as many as `centres`, the centres themselves.

    Attributes:
        compiled: mode of torch.compile for its peer, or None for no such peer, which takes long to compile.
    """

    kind: str
    name: str
    groups: int
    queries: int
    centres: int
    dimensions: int
    sigma2: float
    compiled: str | None = None

    def inputs(self) -> tuple[Tensor, Tensor]:
        make = cases.phase_portraits if self.dimensions == 2 and self.groups > 1 else cases.normal
        refs = make(self.groups, self.centres, self.dimensions, torch.Generator().manual_seed(0)).cuda()
        return (refs if self.queries == self.centres else refs[:, : self.queries] + 0.1), refs

    def first(self) -> "Case":
        """Its first groups and queries, on which answers are judged."""
        queries = self.queries if self.kind == "pass" else min(self.queries, 512)
        return replace(self, groups=min(self.groups, 4), queries=queries)


def _own(case: cases.Case, kind: str, compiled: str | None = None) -> Case:
    return Case(kind, case.name, case.groups, case.points, case.points, case.dimensions, case.sigma2, compiled)


def _many(queries: int) -> Case:
    return Case("score", f"{queries} queries, 50000 centres, D = 3072", 1, queries, 50_000, 3072, 6000.0, "default")


CASES = [
    *(_own(case, "pass", "default") for case in cases.GENES),
    *(_own(case, "pass", "default" if case.points == 4096 else None) for case in cases.SINGLE),
    *(_own(case, "pass", "reduce-overhead") for case in cases.MINIBATCHES),
    *(_own(case, "score") for case in (*cases.GENES, *cases.SINGLE)),
    _many(128),
    _many(4096),
]


def contenders(case: Case, x: Tensor, refs: Tensor) -> dict[str, Call]:
    """Functions without arguments, by name; each makes its own noise."""
    ours, plain = (
        (peers.our_pass, peers.published_pass)
        if case.kind == "pass"
        else (fk.kde_score, published.kde_score if case.queries <= peers.ROWS else peers.published_score)
    )
    found: dict[str, Call] = {
        "triton": lambda: ours(x, refs, case.sigma2, backend="triton"),
        "torch backend": lambda: ours(x, refs, case.sigma2, backend="torch"),
        "eager": lambda: plain(x, refs, case.sigma2),
    }
    if case.compiled:
        torch.compiler.reset()
        fast = torch.compile(plain, mode=case.compiled, dynamic=False)
        found["torch.compile"] = lambda: fast(x, refs, case.sigma2)
    if case.kind == "score" and peers.missing("keops") is None:
        found["KeOps"] = lambda: peers.keops_score(x, refs, case.sigma2)
    return found


def error(case: Case, who: str) -> float:
    """Relative error against the torch backend in float64, with noise given; of peers for plausibility."""
    part = case.first()
    x, refs = part.inputs()
    noise = torch.randn(1 + cases.STEPS, *x.shape, generator=torch.Generator().manual_seed(1)).cuda()
    plain = who != "triton"
    if case.kind == "pass":
        result = (peers.published_pass if plain else peers.our_pass)(
            x, refs, case.sigma2, noise, **({} if plain else {"backend": "triton"})
        )
        truth = peers.our_pass(x.double(), refs.double(), case.sigma2, noise.double(), backend="torch")
    else:
        result = published.kde_score(x, refs, case.sigma2) if plain else fk.kde_score(x, refs, case.sigma2)
        truth = fk.kde_score(x.double(), refs.double(), case.sigma2, backend="torch")
    return float((result.double() - truth).norm() / truth.norm())
