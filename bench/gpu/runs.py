"""Runs of the GPU benchmarks: a workload, the op that is timed on it, and the implementations that compete."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import baselines, workloads
from bench.tasks import KERNEL_AVERAGE, PASS, SCORE, Task, inputs_of
from bench.workloads import Workload
from tests.support import published
from tests.support.ops import NUM_STEPS, value_of
from tests.support.ops import judged as judged_of

Call = Callable[[], Tensor]
OURS, PLAIN, COMPILED, KEOPS = "triton", "plain PyTorch", "torch.compile", "KeOps"


@dataclass(frozen=True)
class GPURun:
    """A pass, a score or a kernel average on one workload.

    Attributes:
        compiled: mode of torch.compile for its baseline, or None for no such baseline, which takes long to compile.
    """

    task: Task
    workload: Workload
    compiled: str | None = None

    @property
    def kind(self) -> str:
        return self.task.op.label

    @property
    def name(self) -> str:
        return self.workload.name

    def described(self) -> dict[str, str]:
        return {"kind": self.kind, "name": self.name}

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Queries and reference points on the GPU."""
        x, refs = self.workload.inputs()
        on_gpu = refs.cuda()
        return (on_gpu if x is refs else x.cuda()), on_gpu

    def judged(self) -> "GPURun":
        """The run with few groups and points: on it answers are judged."""
        whole = self.workload
        groups = min(whole.groups, 4)
        if whole.queries == whole.refs:
            part = replace(whole, groups=groups, queries=min(whole.queries, 4096), refs=min(whole.refs, 4096))
        else:
            part = replace(whole, groups=groups, queries=min(whole.queries, 128))
        return replace(self, workload=part)


def _many(queries: int) -> Workload:
    name = f"{queries} queries, 50000 reference points, D = 3072"
    return Workload(name, 1, queries, 50_000, 3072, 6000.0)


_SINGLE = [
    Workload(f"{points} points, D = {dimensions}", 1, points, points, dimensions, 0.1 * dimensions)
    for points in (4096, 32768)
    for dimensions in (2, 7, 16)
]
_GENES = [GPURun(PASS, workload, "default" if workload.sigma2 == 0.2 else None) for workload in workloads.GENES]
_MINIBATCHES = [
    GPURun(PASS, workload, "reduce-overhead" if workload.dimensions > 16 else None)
    for workload in (workloads.TOY, workloads.SPRINGS, workloads.CIFAR)
]
_SCORES = [GPURun(SCORE, workload) for workload in (*workloads.GENES, *_SINGLE)]
# The most wanted first: time may run out.
RUNS = [
    *_GENES,
    *_MINIBATCHES,
    *(GPURun(SCORE, _many(queries), "default") for queries in (128, 4096)),
    *_SCORES[::-1],
    *(GPURun(KERNEL_AVERAGE, workload) for workload in (*_SINGLE[::-1], workloads.GENES[1], _many(4096))),
    *(GPURun(PASS, workload) for workload in _SINGLE),
]


def contenders(run: GPURun, x: Tensor, refs: Tensor, compiled: bool = False) -> dict[str, Call]:
    """Functions without arguments, by name; each makes its own noise. `compiled`: only that of torch.compile."""
    ours, plain, sigma2 = baselines.ours(run.task.op, OURS), baselines.plain(run.task.op), run.workload.sigma2
    if run.task == SCORE and run.workload.queries <= baselines.ROWS:
        plain = published.kde_score
    if compiled:
        torch.compiler.reset()
        fast = torch.compile(plain, mode=run.compiled, dynamic=False)
        return {COMPILED: lambda: fast(x, refs, sigma2)}
    found: dict[str, Call] = {OURS: lambda: ours(x, refs, sigma2), PLAIN: lambda: plain(x, refs, sigma2)}
    if run.task == SCORE and baselines.missing("keops") is None:
        found[KEOPS] = lambda: baselines.keops_score(x, refs, sigma2)
    return found


def errors(run: GPURun) -> dict[str, float]:
    """Relative errors against the torch backend in float64, with noise given.

    Those of a kernel average are relative to the average of the values' sizes: the values, of mean 0, cancel in it.
    torch.compile has plain PyTorch's formulas, and no error of its own: other shapes would be compiled for it.
    """
    part = run.judged()
    (x, refs), op, sigma2 = part.inputs(), part.task.op, part.workload.sigma2
    noise = None
    if count := op.draws(NUM_STEPS):
        noise = torch.randn(count, *x.shape, generator=torch.Generator().manual_seed(1)).cuda()
    given = () if noise is None else (noise,)
    exact_noise = () if noise is None else (noise.double(),)
    exact = size = baselines.ours(op, "torch")(x.double(), refs.double(), sigma2, *exact_noise)
    if part.task == KERNEL_AVERAGE:
        inputs = inputs_of(x.double(), refs.double(), sigma2)
        size = judged_of(op, op.call({**inputs, "ref_values": value_of(inputs, "ref_values").abs()}, backend="torch"))
    found = {
        OURS: baselines.ours(op, OURS)(x, refs, sigma2, *given),
        PLAIN: baselines.plain(op)(x, refs, sigma2, *given),
    }
    if part.task == SCORE and baselines.missing("keops") is None:
        found[KEOPS] = baselines.keops_score(x, refs, sigma2)
    return {name: float((result.double() - exact).norm() / size.norm()) for name, result in found.items()}
