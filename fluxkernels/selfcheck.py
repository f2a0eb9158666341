"""A few seconds of checks: every op of every backend that runs here, against float64 and against a closed form."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fluxkernels.backend import Backend, backends
from fluxkernels.ops.kde import kde_log_density, kde_mean, kde_score
from fluxkernels.ops.langevin import flux_pass, langevin_chain
from fluxkernels.ops.residual import residual_gradient
from fluxkernels.ops.transition import transition_average

# Largest relative errors of a sound installation. The errors of the kernels are some ten times smaller.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}
SECONDS = 5.0  # after which a backend starts no other check on a device in one dtype: ten seconds in all
# (queries, reference points, dimensions): the kernels for few dimensions and for many, no multiple of any tile.
SIZES = ((65, 83, 2), (33, 47, 200))
TAU, SEED = 1.5, 1


@dataclass(frozen=True)
class Check:
    """One op of one backend.

    Attributes:
        device: where its tensors are, such as "cpu" or "cuda:0".
        error: relative error, or None if the op raised one or did not run.
        bound: largest error that is accepted.
        problem: message of what the op raised, or the reason why it did not run.
        skipped: whether it did not run, because the checks before it took all the time.
    """

    backend: str
    device: str
    dtype: str
    dimensions: int
    op: str
    error: float | None
    bound: float
    seconds: float
    problem: str | None = None
    skipped: bool = False

    @property
    def passed(self) -> bool:
        return self.skipped or (self.error is not None and self.error <= self.bound)


@dataclass(frozen=True)
class _Problem:
    """Points and field in float64 on the CPU, rounded to the dtype that is checked."""

    x: Tensor
    refs: Tensor
    field: Tensor
    sigma2: float

    def on(self, device: str, dtype: torch.dtype) -> "_Problem":
        x, refs, field = (t.to(device=device, dtype=dtype) for t in (self.x, self.refs, self.field))
        return _Problem(x, refs, field, self.sigma2)


def _problem(queries: int, refs: int, dimensions: int, dtype: torch.dtype) -> _Problem:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2 * queries + refs, dimensions, dtype=torch.float64, generator=generator).to(dtype).double()
    # Several reference points share the weight of a query, in any dimension.
    return _Problem(points[:queries], points[queries:-queries], points[-queries:], 0.25 * dimensions)


def _closed_form(p: _Problem, exact: bool, **options: Any) -> Tensor:
    """Score and log-density of one reference point: a Gaussian; `exact` takes the formulas."""
    center, D = p.refs[:1], p.x.shape[-1]
    if not exact:
        score, log_density = (op(p.x, center, p.sigma2, **options) for op in (kde_score, kde_log_density))
    else:
        score = (center - p.x) / p.sigma2
        two_pi = torch.as_tensor(2 * torch.pi * p.sigma2, dtype=p.x.dtype)
        log_density = -(center - p.x).square().sum(-1) / (2 * p.sigma2) - D / 2 * two_pi.log()
    return torch.cat([score, log_density.unsqueeze(-1)], -1)


def _gradient(p: _Problem, **options: Any) -> Tensor:
    """Derivatives of a score with respect to queries and reference points."""
    x, refs = (t.detach().requires_grad_() for t in (p.x, p.refs))
    score = kde_score(x, refs, p.sigma2, **options)
    return torch.cat(torch.autograd.grad((score * p.field).sum(), (x, refs)))


def _pass(p: _Problem, **options: Any) -> Tensor:
    result = flux_pass(p.x, p.refs, p.sigma2, TAU, seed=SEED, **options)
    parts = (result.x0, result.score0, result.xt, result.score_t, result.transition_average(p.field))
    return torch.cat([part / part.norm() for part in parts])


def _written_out_score(p: _Problem) -> Tensor:
    """The score as one line of plain PyTorch, so that the reference implementation is compared with something else."""
    difference = p.refs - p.x.unsqueeze(1)
    weights = (-difference.square().sum(-1) / (2 * p.sigma2)).softmax(-1)
    return (weights.unsqueeze(-1) * difference).sum(1) / p.sigma2


Call = Callable[..., Tensor]
OPS: dict[str, Call] = {
    "kde_score": lambda p, **options: kde_score(p.x, p.refs, p.sigma2, **options),
    "kde_mean": lambda p, **options: kde_mean(p.x, p.refs, p.sigma2, **options),
    "kde_log_density": lambda p, **options: kde_log_density(p.x, p.refs, p.sigma2, **options),
    "kde_score, gradient": _gradient,
    "residual_gradient": lambda p, **options: residual_gradient(p.x, p.field, p.refs, p.sigma2, **options),
    "langevin_chain": lambda p, **options: langevin_chain(p.x, p.refs, p.sigma2, TAU, seed=SEED, **options),
    "transition_average": lambda p, **options: transition_average(
        p.x, p.x.flip(0), p.field, p.refs, p.sigma2, TAU, **options
    ),
    "flux_pass": _pass,
}


def _error(found: Tensor, truth: Tensor) -> float:
    difference = (found.detach().to("cpu", torch.float64) - truth).norm() / truth.norm()
    return float(difference.nan_to_num(nan=torch.inf))


def _checks(name: str, device: str, dtype: torch.dtype) -> Iterator[Check]:
    """Yield the checks of a backend on a device, the last ones skipped if the time is up."""
    deadline = time.perf_counter() + SECONDS
    for queries, refs, dimensions in SIZES:
        exact = _problem(queries, refs, dimensions, dtype)
        given = exact.on(device, dtype)
        calls: dict[str, tuple[Call, Call]] = {
            "one reference point": (partial(_closed_form, exact=False), partial(_closed_form, exact=True)),
            **{op: (call, partial(call, backend="torch")) for op, call in OPS.items()},
            "kde_score": (OPS["kde_score"], _written_out_score),
        }
        check = partial(Check, name, device, str(dtype).removeprefix("torch."), dimensions)
        for op, (call, truth) in calls.items():
            begin, bound = time.perf_counter(), BOUNDS[dtype]
            if begin > deadline:
                yield check(op, None, bound, 0.0, f"not run: the checks before it took {SECONDS:g} s", skipped=True)
                continue
            error, problem = None, None
            try:
                error = _error(call(given, backend=name), truth(exact))
            except Exception as raised:  # whatever a broken installation raises is what the check reports
                problem = " ".join(f"{type(raised).__name__}: {raised}".split())
            yield check(op, error, bound, time.perf_counter() - begin, problem)


def devices_of(backend: Backend) -> list[str]:
    """Devices of this machine whose tensors a backend takes, without the cards that it refuses."""
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    present = ["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])]
    takes = [device for device in present if not backend.devices or device.split(":")[0] in backend.devices]
    return [device for device in takes if not any(reason.startswith(f"{device},") for reason in backend.refused)]


def run() -> list[Check]:
    """Check every available backend on every device that it takes, in float32 and, where there is one, in float64."""
    found: list[Check] = []
    for backend in backends().values():
        for device in devices_of(backend) if backend.available else ():
            for dtype in BOUNDS:
                if device != "mps" or dtype != torch.float64:
                    found += _checks(backend.name, device, dtype)
    return found
