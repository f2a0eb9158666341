"""What the GPU benchmarks run on, and who competes: our kernels, plain PyTorch, torch.compile of it, KeOps."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fluxkernels as fk
from bench import cases, peers, published

Call = Callable[[], Tensor]
OURS, PLAIN, COMPILED, KEOPS = "triton", "plain PyTorch", "torch.compile", "KeOps"


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

    def judged(self) -> "Case":
        """Of its kind, but with few groups and points: what answers are judged on."""
        if self.queries == self.centres:
            return replace(
                self, groups=min(self.groups, 4), queries=min(self.queries, 4096), centres=min(self.centres, 4096)
            )
        return replace(self, groups=min(self.groups, 4), queries=min(self.queries, 128))


def _own(case: cases.Case, kind: str, compiled: str | None = None) -> Case:
    return Case(kind, case.name, case.groups, case.queries, case.centres, case.dimensions, case.sigma2, compiled)


def _many(queries: int) -> Case:
    return Case("score", f"{queries} queries, 50000 centres, D = 3072", 1, queries, 50_000, 3072, 6000.0, "default")


_SINGLE = [
    cases.Case(f"{points} points, D = {dimensions}", 1, points, points, dimensions, 0.1 * dimensions)
    for points in (4096, 32768)
    for dimensions in (2, 7, 16)
]
_GENES = [_own(case, "pass", "default" if case.sigma2 == 0.2 else None) for case in cases.GENES]
_MINIBATCHES = [
    _own(case, "pass", "reduce-overhead" if case.dimensions > 16 else None)
    for case in (cases.TOY, cases.SPRINGS, cases.CIFAR)
]
_SCORES = [_own(case, "score") for case in (*cases.GENES, *_SINGLE)]
# The most wanted first: time may run out.
CASES = [
    *_GENES,
    *_MINIBATCHES,
    _many(128),
    _many(4096),
    *_SCORES[::-1],
    *(_own(case, "pass") for case in _SINGLE),
]


def contenders(case: Case, x: Tensor, refs: Tensor) -> dict[str, Call]:
    """Functions without arguments, by name; each makes its own noise."""
    ours, plain = (
        (peers.our_pass, peers.published_pass)
        if case.kind == "pass"
        else (fk.kde_score, published.kde_score if case.queries <= peers.ROWS else peers.published_score)
    )
    found: dict[str, Call] = {
        OURS: lambda: ours(x, refs, case.sigma2, backend="triton"),
        PLAIN: lambda: plain(x, refs, case.sigma2),
    }
    if case.compiled:
        torch.compiler.reset()
        fast = torch.compile(plain, mode=case.compiled, dynamic=False)
        found[COMPILED] = lambda: fast(x, refs, case.sigma2)
    if case.kind == "score" and peers.missing("keops") is None:
        found[KEOPS] = lambda: peers.keops_score(x, refs, case.sigma2)
    return found


def errors(case: Case) -> dict[str, float]:
    """Relative errors against the torch backend in float64, with noise given.

    torch.compile has plain PyTorch's formulas, and no error of its own: other shapes would be compiled for it.
    """
    part = case.judged()
    x, refs = part.inputs()
    if case.kind == "pass":
        noise = torch.randn(1 + cases.STEPS, *x.shape, generator=torch.Generator().manual_seed(1)).cuda()
        exact = peers.our_pass(x.double(), refs.double(), case.sigma2, noise.double(), backend="torch")
        found = {
            OURS: peers.our_pass(x, refs, case.sigma2, noise, backend="triton"),
            PLAIN: peers.published_pass(x, refs, case.sigma2, noise),
        }
    else:
        exact = fk.kde_score(x.double(), refs.double(), case.sigma2, backend="torch")
        found = {
            OURS: fk.kde_score(x, refs, case.sigma2, backend="triton"),
            PLAIN: published.kde_score(x, refs, case.sigma2),
        }
        if peers.missing("keops") is None:
            found[KEOPS] = peers.keops_score(x, refs, case.sigma2)
    return {who: float((result.double() - exact).norm() / exact.norm()) for who, result in found.items()}
