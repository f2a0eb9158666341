"""Averages of values under a kernel: softmax over the reference points, with a weight for each of them."""

# A registered op takes tensors and constants one by one.
# ruff: noqa: PLR0913
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fluxkernels.reference.blocks import blocks, center, upcast
from fluxkernels.reference.kde import squared_distances


class Problem(NamedTuple):
    """Arguments of `kernel_average` in the dtype of the formulas, with centered points.

    Attributes:
        z, refs: `[B, N, D]` and `[B, M, D]`.
        sigma2: `[B, N, 1]` or `[B, 1, M]`.
        values: `[B, M, V]`.
        log_weights: `[B, M]`, or None for zeros.
        exclude_self: whether the weight of reference point n for query n is 0.
        kernel: "gaussian" or "laplace".
        per_reference: whether sigma2 is `[B, 1, M]`.
    """

    z: Tensor
    refs: Tensor
    sigma2: Tensor
    values: Tensor
    log_weights: Tensor | None
    exclude_self: bool
    kernel: str
    per_reference: bool

    def blocks(self) -> Iterator[tuple[slice, slice, "Problem"]]:
        """Yield (groups, queries, their problem) for blocks of about 2¹⁶ pairs."""
        for group, rows in blocks(self.z, self.refs):
            for row in rows:
                yield (
                    group,
                    row,
                    self._replace(
                        z=self.z[group, row],
                        refs=self.refs[group],
                        sigma2=self.sigma2[group] if self.per_reference else self.sigma2[group, row],
                        values=self.values[group],
                        log_weights=None if self.log_weights is None else self.log_weights[group],
                    ),
                )


class Weights(NamedTuple):
    """Weights of one block `[b, n, M]`.

    Attributes:
        w: they sum to one over the reference points; NaN where all are absent.
        log_sum: log Σ_j exp(logit_j), `[b, n]`.
        exponent: the kernel is exp(-exponent).
        pull: -2 times the derivative of a logit in the squared distance.
    """

    w: Tensor
    log_sum: Tensor
    exponent: Tensor
    pull: Tensor


def weights(problem: Problem, first: int) -> Weights:
    """Weights of the queries `first`, `first` + 1, ... of their groups."""
    z, refs, sigma2, _, log_weights, exclude_self, kernel, _ = problem
    squares = squared_distances(z, refs)
    if kernel == "laplace":
        # The distance has no derivative at 0, where this takes 0.
        apart = squares > 0
        distance = torch.where(apart, squares, 1).sqrt()
        exponent = torch.where(apart, distance, 0) / sigma2.sqrt()
        pull = torch.where(apart, 1 / distance, 0) / sigma2.sqrt()
    else:
        exponent = squares / (2 * sigma2)
        pull = (1 / sigma2).expand(squares.shape)
    logits = -exponent
    heaviest: Tensor | float = 0.0
    if log_weights is not None:
        # Relative to the largest: where all are large, exponents would vanish beside them.
        heaviest = log_weights.detach().amax(-1, keepdim=True)
        heaviest = torch.where(heaviest == -torch.inf, 0, heaviest)
        logits = logits + (log_weights - heaviest).unsqueeze(-2)
    if exclude_self:
        n = torch.arange(first, first + z.shape[1], device=z.device)
        own = n.unsqueeze(-1) == torch.arange(refs.shape[1], device=z.device)
        logits = logits.masked_fill(own, -torch.inf)
    top = logits.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    relative = (logits - top).exp()
    total = relative.sum(-1, keepdim=True)
    return Weights(relative / total, (top + total.log()).squeeze(-1) + heaviest, exponent, pull)


def prepare(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
) -> tuple[Problem, Tensor | None]:
    """(problem, origin of the values, which is that of the points where the values are the reference points)."""
    query, centered, origin = center(z, refs)
    (variance,) = upcast(sigma2.unsqueeze(-1) if sigma2.ndim == 2 else sigma2)
    averaged = centered if values is None else upcast(values)[0]
    logs = None if log_weights is None else upcast(log_weights)[0]
    problem = Problem(query, centered, variance, averaged, logs, exclude_self, kernel, sigma2.ndim == 3)
    return problem, origin if values is None else None


def kernel_average(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ_j w_j r_j - z or, with values, `[B, N, 0]`; Σ_j w_j v_j; log Σ_j exp(logit_j)), each rounded once.

    Shapes: z `[B, N, D]`, refs `[B, M, D]`, sigma2 `[B, N]` or `[B, 1, M]`, values `[B, M, V]`, log_weights `[B, M]`.
    """
    problem, origin = prepare(z, refs, sigma2, values, log_weights, exclude_self, kernel)
    averages, log_sums = [], []
    for _, row, block in problem.blocks():
        found = weights(block, row.start or 0)
        averages.append(found.w @ block.values)
        log_sums.append(found.log_sum)
    average = torch.cat([part.flatten(0, 1) for part in averages]).view(*z.shape[:2], problem.values.shape[-1])
    log_sum = torch.cat([part.flatten() for part in log_sums]).view(z.shape[:2])
    shift = z.new_empty((*z.shape[:2], 0)) if origin is None else (average - problem.z).to(z.dtype)
    wide = torch.promote_types(z.dtype, torch.float32)
    return shift, (average if origin is None else average + origin).to(z.dtype), log_sum.to(wide)


def kernel_average_backward(
    g_shift: Tensor,
    g_average: Tensor,
    g_log_sum: Tensor,
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of z, refs, sigma2, values and log_weights; zero-size tensors for the last two where they are None.

    With v the cotangent of the average and g that of the log-sum, a logit has the cotangent
    c_j = w_j ((v_j - average)·v + g); the rest is the chain rule through the logit, and through v_j in the average.
    """
    problem, origin = prepare(z, refs, sigma2, values, log_weights, exclude_self, kernel)
    v, g = upcast(g_average, g_log_sum)
    if origin is not None:
        v = v + upcast(g_shift)[0]
    g_z, g_refs, g_values = (torch.zeros_like(t) for t in (problem.z, problem.refs, problem.values))
    g_sigma2 = torch.zeros_like(problem.sigma2)
    g_logs = problem.refs.new_zeros(problem.refs.shape[:2])
    for group, row, block in problem.blocks():
        found, here = weights(block, row.start or 0), v[group, row]
        # A query all of whose reference points are absent has an average of NaN, and adds nothing to derivatives.
        absent = found.log_sum.unsqueeze(-1) == -torch.inf
        w, here = torch.where(absent, 0, found.w), torch.where(absent, 0, here)
        average = w @ block.values
        along = here @ block.values.mT - (here * average).sum(-1, keepdim=True)
        c = w * (along + torch.where(absent, 0, g[group, row].unsqueeze(-1)))
        e = c * found.pull
        g_z[group, row] = e @ block.refs - e.sum(-1, keepdim=True) * block.z
        g_refs[group] += e.mT @ block.z - e.sum(-2).unsqueeze(-1) * block.refs
        g_values[group] += w.mT @ here
        g_logs[group] += c.sum(-2)
        slope = c * found.exponent / block.sigma2 * (0.5 if kernel == "laplace" else 1.0)
        if problem.per_reference:
            g_sigma2[group] += slope.sum(-2, keepdim=True)
        else:
            g_sigma2[group, row] = slope.sum(-1, keepdim=True)
    if origin is not None:
        g_z, g_refs = g_z - upcast(g_shift)[0], g_refs + g_values
    return (
        g_z.to(z.dtype),
        g_refs.to(refs.dtype),
        g_sigma2.view(sigma2.shape).to(sigma2.dtype),
        refs.new_empty(0) if values is None else g_values.to(values.dtype),
        refs.new_empty(0) if log_weights is None else g_logs.to(log_weights.dtype),
    )
