"""Couplings: the sample of the source that goes with each sample of the data in a minibatch.

A flow may be trained on pairs (x0, x1) of any joint distribution with the right marginals. Samples drawn independently
are one; pairs by optimal transport within the minibatch cross less, so that the flow is straighter and the loss varies
less (Tong et al. 2024; Pooladian et al. 2023). The cost of a pair is its squared distance |x1 - x0|².
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxkernels import philox
from fluxkernels.checks import (
    can_check_values,
    check_finite,
    check_num_steps,
    check_positive,
    check_seed,
    check_tensor,
    read_numbers,
    shape_of,
)
from fluxmatching.distributed import JointMinibatch, all_gather_samples, rank_and_size, shared_seed

# The simplex ends by itself. POT's default, 10⁵, is not enough for 2048 pairs in many dimensions.
_MOST_PIVOTS = 10**9


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """Base of the couplings. A coupling of one's own defines `index`.

    Attributes:
        gather_across_ranks: whether `couple` joins the minibatches of all processes. Each process solves the joint
            problem, so that none has to wait for the result of another one.
    """

    gather_across_ranks: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.gather_across_ranks, bool):
            raise TypeError(
                f"{type(self).__name__}: gather_across_ranks must be True or False, got {self.gather_across_ranks!r}"
            )

    def __call__(self, x0: Tensor, x1: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        """Return the row of x0 that goes with each row of x1: `x0[index], x1` are pairs, and labels of x1 stay valid.

        Args:
            x0: samples of the source, `[N0, *event]`.
            x1: samples of the data, `[N1, *event]`; N1 may differ from N0.
            seed: makes what is drawn by Philox, equal on every device; None uses torch's generator.

        Returns:
            int64 `[N1]`, on the device of x1.

        Raises:
            TypeError, ValueError: an argument of wrong shape, dtype, device or value; the message names it.
            RuntimeError: `gather_across_ranks` with several processes, where rows of other processes have no index.
        """
        function = type(self).__name__
        _check_samples(function, x0, x1)
        check_finite(function, x0=x0, x1=x1)
        check_seed(function, seed)
        if self.gather_across_ranks and rank_and_size()[1] > 1:
            raise RuntimeError(
                f"{function}: gather_across_ranks pairs samples of different processes, which have no common index; "
                f"couple(coupling, x0, x1) returns the samples"
            )
        with torch.no_grad():
            return self.index(x0.detach(), x1.detach(), seed)

    def index(self, x0: Tensor, x1: Tensor, seed: int | Tensor | None) -> Tensor:
        """Return the row of x0 for each row of x1, int64 `[N1]`; the arguments are checked and without gradients."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class IndependentCoupling(Coupling):
    """Independent pairs: row k of x0 with row k of x1, since the rows are independent already.

    For N0 ≠ N1 the rows of x0 are taken in a random order, again and again if N1 > N0: how often two of them are used
    differs by at most one.
    """

    def index(self, x0: Tensor, x1: Tensor, seed: int | Tensor | None) -> Tensor:
        rows = torch.arange(len(x1), device=x1.device)
        if len(x0) == len(x1):
            return rows
        order = _uniform(seed, len(x0), x1.device).argsort(stable=True)
        return order[rows % len(x0)]


@dataclass(frozen=True, kw_only=True)
class ExactCoupling(Coupling):
    """Optimal transport between the two sets of samples, by POT's network simplex.

    For N0 = N1 the result is the permutation that minimizes Σ_j |x1_j - x0_index(j)|², and nothing is drawn. Else each
    row of x1 draws its row of x0 in proportion to its shares of an optimal plan between equal weights 1/N0 and 1/N1.

    POT has no exact solver for a GPU: on an accelerator the distances are computed there, `[N1, N0]` in float64, and
    copied to the CPU, for which the host waits; the N1 indices are copied back. The solver runs on one core, and
    its time grows about as N^2.5: 0.2 s for 1024 pairs, 1 s for 2048.
    """

    def index(self, x0: Tensor, x1: Tensor, seed: int | Tensor | None) -> Tensor:
        """Return the row of x0 for each row of x1.

        Raises:
            ImportError: POT is not installed.
            RuntimeError: the solver does not find the optimum.
        """
        function = type(self).__name__
        ot = _import_ot(function)
        cost = _squared_distances(function, x0, x1).cpu().numpy()
        n1, n0 = cost.shape
        # Masses are integers, so that every flow of the simplex is one too, without rounding.
        common = math.gcd(n0, n1)
        plan, log = ot.emd(
            np.full(n1, n0 / common), np.full(n0, n1 / common), cost, numItermax=_MOST_PIVOTS, log=True
        )  # fmt: skip
        if log["warning"] is not None:
            raise RuntimeError(f"{function}: POT's exact solver ended without the optimum: {log['warning']}")
        shares = torch.from_numpy(plan)
        found = shares.argmax(1) if n0 == n1 else _draw_columns(shares, _uniform(seed, n1, x1.device))
        return found.to(x1.device)


@dataclass(frozen=True, kw_only=True)
class SinkhornCoupling(Coupling):
    """Entropic optimal transport; each row of x1 draws its row of x0 in proportion to the plan (Cuturi 2013).

    The plan P between equal weights minimizes Σ P_ji |x1_j - x0_i|² + ε Σ P_ji log P_ji. POT finds it by Sinkhorn's
    iterations in the log domain, in float64 on the device of the samples. Small ε approach `ExactCoupling`, large ones
    `IndependentCoupling`.

    Attributes:
        regularization: ε in units of the mean squared distance of all pairs after each set was centered, that is the
            total variance of x0 plus that of x1. Neither the scale of the data nor an offset between source and data
            changes what a value means.
        tolerance: largest relative error of the weights of x0, as a root mean square. Those of x1 are exact.
        max_iterations: number of iterations after which a RuntimeWarning reports that the tolerance is not met. The
            number needed grows as 1/regularization.
    """

    regularization: float = 0.01
    tolerance: float = 0.01
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("SinkhornCoupling", "regularization", self.regularization)
        check_positive("SinkhornCoupling", "tolerance", self.tolerance)
        check_num_steps("SinkhornCoupling", self.max_iterations, "max_iterations")

    def index(self, x0: Tensor, x1: Tensor, seed: int | Tensor | None) -> Tensor:
        """Return the row of x0 for each row of x1.

        Raises:
            ImportError: POT is not installed.
        """
        function = type(self).__name__
        ot = _import_ot(function)
        cost = _squared_distances(function, x0, x1)
        n1, n0 = cost.shape
        plan = ot.bregman.sinkhorn_log(
            cost.new_full((n1,), 1 / n1),
            cost.new_full((n0,), 1 / n0),
            cost,
            float(self.regularization),
            numItermax=self.max_iterations,
            stopThr=self.tolerance / math.sqrt(n0),  # of the root of the sum of squares, of weights 1/N0
            warn=False,
        )
        error = (n0 * plan.sum(0) - 1).square().mean().sqrt().item()
        if not error <= self.tolerance:
            # One digit, so that Python shows a warning that returns in every iteration of a training only once.
            warnings.warn(
                f"{function}: the weights of x0 are wrong by {error:.0e} after {self.max_iterations} iterations, more "
                f"than tolerance {self.tolerance:g}; raise regularization {self.regularization:g} or max_iterations",
                RuntimeWarning,
                stacklevel=3,
            )
        return _draw_columns(plan, _uniform(seed, n1, x1.device))


def couple(
    coupling: Coupling | Callable[..., Tensor], x0: Tensor, x1: Tensor, seed: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return pairs (x0', x1), where row k of x0' is the sample of the source that goes with row k of x1.

    With `gather_across_ranks` the minibatches of all processes are coupled as one, and each process receives the pairs
    of its own x1. The samples of x0 must then differ between processes, or the joint source has each of them several
    times; `rank_seed` makes seeds for that.

    Args:
        coupling: such as `ExactCoupling()`; or a function of (x0, x1, seed=) that returns such an index.
        x0: samples of the source, `[N0, *event]`.
        x1: samples of the data, `[N1, *event]`; shape of all processes with `gather_across_ranks`.
        seed: see `Coupling.__call__`; with `gather_across_ranks` equal in all processes, where None takes a number of
            the first process's generator.

    Returns:
        `[N1, *event]` each. Gradients flow to x0 unless samples were gathered.

    Raises:
        TypeError, ValueError: an argument of wrong shape, dtype, device or value; the message names it. Shapes, seeds
            and values of gathered samples raise in all processes.
    """
    function = "couple"
    if not callable(coupling):
        raise TypeError(f"{function}: coupling must be a Coupling, such as ExactCoupling(), got {coupling!r}")
    minibatch = JointMinibatch(isinstance(coupling, Coupling) and coupling.gather_across_ranks)
    if not isinstance(coupling, Coupling) or minibatch.size == 1:
        return x0[_check_index(function, coupling(x0, x1, seed=seed), len(x0), x1)], x1
    _check_samples(function, x0, x1)
    check_seed(function, seed)
    source = all_gather_samples(function, x0.detach(), "x0")
    data = all_gather_samples(function, x1.detach(), "x1")
    check_finite(function, x0=source, x1=data)
    with torch.no_grad():
        found = coupling.index(source, data, shared_seed(function, seed, x1.device))
        index = _check_index(function, found, len(source), data)
    return source[minibatch.own_samples(index)], x1


def _check_samples(function: str, x0: object, x1: object) -> None:
    """Raise TypeError or ValueError unless x0 `[N0, *event]` and x1 `[N1, *event]` are samples of one kind."""
    x0 = check_tensor(function, "x0", x0)
    x1 = check_tensor(function, "x1", x1, like=x0)
    if x0.ndim < 2:
        raise ValueError(f"{function}: x0 must have shape [N, *event], got {shape_of(x0)}")
    if x1.shape[1:] != x0.shape[1:]:
        raise ValueError(
            f"{function}: x1 must have the event of x0, {list(x0.shape[1:])}, after its first dimension, got shape "
            f"{shape_of(x1)}"
        )


def _check_index(function: str, index: object, samples: int, x1: Tensor) -> Tensor:
    """Return what a coupling returned if it is int64 `[N1]` in [0, samples)."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != x1.shape[:1]:
        got = f"{index.dtype} {shape_of(index)}" if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(
            f"{function}: coupling must return one row of x0 per row of x1, int64 of shape {[len(x1)]}, got {got}"
        )
    if can_check_values(index) and not ((index >= 0) & (index < samples)).all():
        bad = index[(index < 0) | (index >= samples)][0].item()
        raise ValueError(f"{function}: coupling must return rows of x0 in [0, {samples}), got {bad}")
    return index


def _import_ot(function: str) -> Any:
    try:
        import ot  # here alone: it imports every array library there is
    except ImportError as error:
        raise ImportError(f"fluxmatching.{function} needs POT: pip install POT") from error
    return ot


def _squared_distances(function: str, x0: Tensor, x1: Tensor) -> Tensor:
    """Return |x1_j - x0_i|² after each set was centered, in units of the mean, `[N1, N0]` float64.

    Centering adds c_i + d_j to the distances, which changes no coupling. It keeps the digits of sets far from the
    origin and from each other, where |x|² - 2xy + |y|² would lose them.

    Raises:
        ValueError: a sample is not finite.
    """
    points = {"x0": x0.flatten(1).double(), "x1": x1.flatten(1).double()}
    sizes = read_numbers(function, "x0 and x1", torch.stack([p.abs().amax() for p in points.values()]))
    for name, size in zip(points, sizes, strict=True):
        if not math.isfinite(size):
            raise ValueError(f"{function}: {name} must be finite, got NaN or infinity")
    largest = max(sizes) or 1.0  # its square may overflow
    source, data = (_centered(p / largest) for p in points.values())
    squares = data.square().sum(1, keepdim=True) + source.square().sum(1)
    distances = (squares - 2 * data @ source.T).clamp_min_(0)
    mean = distances.mean()
    return distances / torch.where(mean > 0, mean, torch.ones_like(mean))


def _centered(points: Tensor) -> Tensor:
    return points - points.mean(0)


def _uniform(seed: int | Tensor | None, count: int, device: torch.device) -> Tensor:
    """Return uniform numbers on (0, 1), float64 `[count]`."""
    return philox.uniform(philox.as_seed(seed, device), (1, count), philox.PARTNER, torch.float64)[0]


def _draw_columns(shares: Tensor, uniform: Tensor) -> Tensor:
    """Draw one column for each row of shares `[N1, N0]`, in proportion to the row, by the numbers `[N1]`."""
    sums = shares.cumsum(1)
    thresholds = uniform.to(shares.device).unsqueeze(1) * sums[:, -1:]
    return torch.searchsorted(sums, thresholds, right=True).squeeze(1)
