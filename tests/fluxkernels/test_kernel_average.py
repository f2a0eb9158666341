"""Averages of values under a kernel, with weights, exclusions and parts, against the formula written out."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import fluxkernels as fk
from fluxkernels.ops.kernel_average import kernel_average_backward_op, kernel_average_op

F64 = torch.float64
KERNELS = ("gaussian", "laplace")
BANDWIDTHS = ("number", "per query", "per reference point")
DIMENSIONS = (1, 3, 16, 17, 40, 200)


def dense(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """The formula with all pairs at once, from differences."""
    squares = (x.unsqueeze(-2) - refs.unsqueeze(-3)).square().sum(-1)
    if sigma2.ndim == x.ndim - 1:
        sigma2 = sigma2.unsqueeze(-1)
    logits = -squares / (2 * sigma2) if kernel == "gaussian" else -(squares / sigma2).sqrt()
    if log_weights is not None:
        logits = logits + log_weights.unsqueeze(-2)
    if exclude_self:
        logits = logits.masked_fill(torch.eye(x.shape[-2], dtype=torch.bool), -torch.inf)
    return logits.softmax(-1) @ (refs if values is None else values), logits.logsumexp(-1)


def problem(D: int, bandwidth: str, *, square: bool = False, dtype: torch.dtype = F64) -> dict[str, Any]:
    """Arguments for two groups; `square` gives as many queries as reference points."""
    generator = torch.Generator().manual_seed(D)
    N, M = (37, 37) if square else (21, 37)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

    shape = {"number": (), "per query": (2, N), "per reference point": (2, 1, M)}[bandwidth]
    return {
        "x": normal(2, N, D),
        "refs": normal(2, M, D),
        "sigma2": (D * (0.3 + torch.rand(shape, generator=generator, dtype=F64))).to(dtype),
        "values": normal(2, M, 5),
        "log_weights": 3 * normal(2, M),
    }


def relative(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("D", DIMENSIONS)
@pytest.mark.parametrize(("kernel", "bandwidth"), list(product(KERNELS, BANDWIDTHS)))
def test_results_and_derivatives(kernel: str, bandwidth: str, D: int, backend: str) -> None:
    for values, weights, exclude_self in product((True, False), (True, False), (True, False)):
        given = problem(D, bandwidth, square=exclude_self)
        given |= {"values": given["values"] if values else None}
        given |= {"log_weights": given["log_weights"] if weights else None}
        leaves = [t.requires_grad_() for t in given.values() if t is not None]
        truth = dense(*given.values(), exclude_self, kernel)
        got = fk.kernel_average(**given, exclude_self=exclude_self, kernel=kernel)
        cotangents = [torch.randn_like(t) for t in truth]
        for g, t in zip(got, truth, strict=True):
            torch.testing.assert_close(g, t, rtol=1e-10, atol=1e-10)
        for g, t in zip(
            torch.autograd.grad(got, leaves, cotangents), torch.autograd.grad(truth, leaves, cotangents), strict=True
        ):
            torch.testing.assert_close(g, t, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("D", DIMENSIONS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("span", [0.0, 10.0, 100.0, 1000.0, "half absent", "all but one absent"])
def test_float32_with_adversarial_weights(span: float | str, kernel: str, D: int, backend: str) -> None:
    given = problem(D, "per query", dtype=torch.float32)
    if isinstance(span, float):
        given["log_weights"] = span * torch.linspace(-1, 0, 37).expand(2, 37)
    else:
        present = torch.arange(37) % 2 == 0 if span == "half absent" else torch.arange(37) == 17
        given["log_weights"] = torch.where(present, given["log_weights"], -torch.inf)
    exact = {name: t.double() for name, t in given.items()}
    truth = dense(*exact.values(), False, kernel)
    got = fk.kernel_average(**given, kernel=kernel)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert relative(got[0], truth[0]) < 1e-5
    assert relative(got[1], truth[1]) < 1e-6


@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_one_reference_point(bandwidth: str, backend: str) -> None:
    given = problem(3, bandwidth)
    one = {name: t[:, :1] for name, t in given.items() if name in ("refs", "values", "log_weights")}
    if bandwidth == "per reference point":
        one["sigma2"] = given["sigma2"][..., :1]
    given |= one
    leaves = [t.requires_grad_() for t in given.values()]
    got, truth = fk.kernel_average(**given), dense(*given.values(), False, "gaussian")
    torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-11)
    cotangents = [torch.randn_like(t) for t in truth]
    for g, t in zip(
        torch.autograd.grad(got, leaves, cotangents), torch.autograd.grad(truth, leaves, cotangents), strict=True
    ):
        torch.testing.assert_close(g, t, rtol=1e-10, atol=1e-10)


def test_integer_weights_are_repetitions(backend: str) -> None:
    x, refs, counts = (
        torch.randn(6, 3, dtype=F64),
        torch.randn(9, 3, dtype=F64),
        torch.tensor([0, 1, 2, 3, 1, 1, 4, 0, 2]),
    )
    repeated, logs = refs.repeat_interleave(counts, 0), counts.to(F64).log()
    for op in (fk.kde_score, fk.kde_mean, fk.kde_log_density):
        torch.testing.assert_close(op(x, refs, 0.6, log_weights=logs), op(x, repeated, 0.6), rtol=1e-11, atol=1e-11)
        # Weights are relative: a constant factor changes nothing.
        torch.testing.assert_close(op(x, refs, 0.6, log_weights=logs + 50), op(x, repeated, 0.6), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("D", [2, 20])
def test_exclusion_leaves_out_one_point(D: int, weighted: bool, backend: str) -> None:
    x = torch.randn(7, D, dtype=F64)
    logs = torch.randn(7, dtype=F64) if weighted else torch.zeros(7, dtype=F64)
    logs[2] = -torch.inf if weighted else 0.0
    for op in (fk.kde_score, fk.kde_mean, fk.kde_log_density):
        got = op(x, x, 0.3 * D, log_weights=logs if weighted else None, exclude_self=True)
        others = [[j for j in range(7) if j != n] for n in range(7)]
        expected = [op(x[n : n + 1], x[j], 0.3 * D, log_weights=logs[j])[0] for n, j in enumerate(others)]
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-11, atol=1e-11)


def test_weights_of_a_density_have_derivatives(backend: str) -> None:
    x, logs = torch.randn(5, 2, dtype=F64), torch.randn(5, dtype=F64, requires_grad=True)

    def density(logs: Tensor, exclude_self: bool) -> Tensor:
        return fk.kde_log_density(x, x, 0.4, log_weights=logs, exclude_self=exclude_self)

    for exclude_self in (False, True):
        assert torch.autograd.gradcheck(lambda b, e=exclude_self: density(b, e), (logs,))
    absent = logs.detach().index_fill(0, torch.tensor([1, 4]), -torch.inf).requires_grad_()
    (gradient,) = torch.autograd.grad(density(absent, True).sum(), absent)
    assert gradient.isfinite().all()


def test_parts_add_up(backend: str) -> None:
    given = problem(3, "number")
    x, sigma2 = given["x"], given["sigma2"]
    leaves = [given[name].requires_grad_() for name in ("refs", "values", "log_weights")]
    whole = fk.kernel_average(x, leaves[0], sigma2, leaves[1], log_weights=leaves[2])
    pieces = zip(*(t.split([20, 1, 16], 1) for t in leaves), strict=True)
    merged = fk.merge_averages([fk.kernel_average(x, r, sigma2, v, log_weights=b) for r, v, b in pieces])
    for g, t in zip(merged, whole, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-12)
    for g, t in zip(
        torch.autograd.grad(merged[0].square().sum(), leaves),
        torch.autograd.grad(whole[0].square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(g, t, rtol=1e-10, atol=1e-12)


def test_a_part_without_reference_points_counts_for_nothing() -> None:
    average, log_sum = torch.randn(4, 2), torch.randn(4)
    nothing = torch.full((4, 2), torch.nan), torch.full((4,), -torch.inf)
    merged = fk.merge_averages([nothing, (average, log_sum), nothing])
    torch.testing.assert_close(merged, (average, log_sum))
    both = fk.merge_averages([nothing, nothing])
    assert both[0].isnan().all()
    assert (both[1] == -torch.inf).all()


def test_derivatives_of_parts_ignore_one_without_reference_points() -> None:
    average, log_sum = torch.randn(4, 2, dtype=F64, requires_grad=True), torch.randn(4, dtype=F64, requires_grad=True)
    nothing = torch.full((4, 2), torch.nan, dtype=F64), torch.full((4,), -torch.inf, dtype=F64, requires_grad=True)
    merged = fk.merge_averages([nothing, (average, log_sum)])
    g_average, g_log, g_nothing = torch.autograd.grad(
        (merged[0] + merged[1].unsqueeze(1)).sum(), (average, log_sum, nothing[1])
    )
    torch.testing.assert_close(g_average, torch.ones_like(g_average))
    torch.testing.assert_close(g_log, torch.full_like(g_log, 2))
    assert not g_nothing.any()


def test_far_half_precision_has_a_log_sum(backend: str) -> None:
    """-90000 is beyond float16."""
    x, refs = torch.full((1, 2), 300.0).half(), torch.zeros(3, 2).half()
    _, log_sum = fk.kernel_average(x, refs, 1.0)
    assert log_sum.item() == pytest.approx(-90_000 + math.log(3), rel=1e-6)


def test_weights_of_a_density_are_relative(backend: str) -> None:
    x, refs, logs = torch.randn(4, 2), torch.randn(9, 2), torch.randn(9)
    expected = fk.kde_log_density(x.double(), refs.double(), 0.5, log_weights=logs.double()).float()
    shifted = (logs.double() + 1e6).float()
    rounded = fk.kde_log_density(x.double(), refs.double(), 0.5, log_weights=shifted.double()).float()
    torch.testing.assert_close(fk.kde_log_density(x, refs, 0.5, log_weights=shifted), rounded, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fk.kde_log_density(x, refs, 0.5, log_weights=logs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [fk.kde_score, fk.kde_mean, fk.kde_log_density], ids=lambda op: op.__name__)
def test_a_density_has_one_bandwidth_per_query(op: Callable[..., Tensor]) -> None:
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match="sigma2 must be a number or have one entry per group"):
        op(x, x, torch.ones(1, 5), exclude_self=True)
    with pytest.raises(ValueError, match="log_weights must not be empty"):
        op(x, x, 0.5, log_weights=torch.ones(0))


@pytest.mark.parametrize("D", [2, 30])
@pytest.mark.parametrize("kernel", KERNELS)
def test_queries_without_reference_points(kernel: str, D: int, backend: str) -> None:
    """Where values cannot be checked: an average of NaN, a log-sum of -inf, and no effect on other queries."""
    given = problem(D, "per query")
    x, refs, sigma2, values, logs = given.values()
    logs = logs.index_fill(0, torch.tensor([1]), -torch.inf)
    _, average, log_sum = kernel_average_op(x, refs, sigma2, values, logs, False, kernel, backend)
    assert average[0].isfinite().all()
    assert average[1].isnan().all()
    assert log_sum[0].isfinite().all()
    assert (log_sum[1] == -torch.inf).all()
    cotangents = x.new_empty((*x.shape[:2], 0)), torch.ones_like(average), torch.ones_like(log_sum)
    gradients = kernel_average_backward_op(*cotangents, x, refs, sigma2, values, logs, False, kernel, backend)
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[1].any()


@pytest.mark.parametrize("D", [1, 2, 24, 40])
def test_distance_has_derivative_zero_at_zero(D: int, backend: str) -> None:
    """Queries on reference points, exactly."""
    x = torch.randn(6, D, dtype=F64).requires_grad_()
    for result in fk.kernel_average(x, x.detach(), 1.0, kernel="laplace"):
        (gradient,) = torch.autograd.grad(result.sum(), x, retain_graph=True)
        assert gradient.isfinite().all()
    alone = fk.kernel_average(x, x.detach()[:1], 1.0, kernel="laplace")[1]
    (gradient,) = torch.autograd.grad(alone.sum(), x)
    assert not gradient[0].any()
    torch.testing.assert_close(gradient[1:].norm(dim=1), torch.ones(5, dtype=F64))


def test_broadcasting_strides_and_dtypes(backend: str) -> None:
    given = problem(3, "number")
    x, refs, values, logs = given["x"], given["refs"][0], given["values"][0], given["log_weights"][0]
    truth = dense(
        x,
        refs.expand(2, -1, -1),
        torch.tensor(0.7, dtype=F64),
        values.expand(2, -1, -1),
        logs.expand(2, -1),
        False,
        "gaussian",
    )
    spread = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    for query in (x, spread, x.mT.contiguous().mT):
        got = fk.kernel_average(query, refs, 0.7, values, log_weights=logs)
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-11)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = [t.to(dtype) for t in (x, refs, values)]
        got = fk.kernel_average(rounded[0], rounded[1], 0.7, rounded[2], log_weights=logs.float())
        wide = fk.kernel_average(
            *(t.double() for t in rounded[:2]), 0.7, rounded[2].double(), log_weights=logs.float().double()
        )
        assert got[0].dtype == dtype
        assert got[1].dtype == torch.float32
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
        torch.testing.assert_close(got[0], wide[0].to(dtype), **tolerance)
        torch.testing.assert_close(got[1], wide[1].float(), rtol=1e-5, atol=1e-5)


Change = dict[str, Any]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"kernel": "cauchy"}, ValueError, "kernel must be one of 'gaussian', 'laplace', got 'cauchy'"),
        ({"sigma2": -1.0}, ValueError, "sigma2 must be a positive finite number, got -1.0"),
        ({"sigma2": torch.ones(1, 6)}, ValueError, r"or per reference point, [1, 7], got [1, 6]"),
        ({"values": torch.ones(6, 2)}, ValueError, "values must have shape [7] + [V], one row for each"),
        ({"values": torch.ones(7)}, ValueError, "values must have shape [..., points, V], got [7]; values.unsqueeze"),
        ({"refs": torch.ones(3)}, ValueError, "refs must have shape [..., M, D], got [3]"),
        ({"values": torch.full((7, 1), torch.nan)}, ValueError, "values must be finite"),
        ({"values": torch.ones(7, 2).double()}, TypeError, "values must have the dtype of the first argument"),
        ({"sigma2": torch.ones(7)}, ValueError, r"or per reference point, [1, 7], got [7]"),
        ({"log_weights": torch.zeros(6)}, ValueError, "log_weights must have shape [7], one for each reference"),
        ({"log_weights": torch.tensor(0.0)}, ValueError, "log_weights must have shape [7], one for each reference"),
        ({"exclude_self": 1}, TypeError, "exclude_self must be True or False, got int"),
        ({"log_weights": torch.zeros(2, 7)}, ValueError, "log_weights must have shape"),
        ({"log_weights": [0.0] * 7}, TypeError, "log_weights must be a torch.Tensor, got list"),
        ({"log_weights": torch.zeros(7).long()}, TypeError, "log_weights must have a floating dtype"),
        ({"log_weights": torch.full((7,), torch.nan)}, ValueError, "must be numbers or -inf, got NaN or +inf"),
        ({"log_weights": torch.full((7,), torch.inf)}, ValueError, "must be numbers or -inf, got NaN or +inf"),
        ({"log_weights": torch.full((7,), -torch.inf)}, ValueError, "each query a reference point above -inf, got 0"),
        ({"exclude_self": True}, ValueError, "exclude_self must be False unless x and refs have equally many points"),
    ],
)  # fmt: skip
def test_bad_input(change: Change, error: type[Exception], text: str) -> None:
    given: Change = {"x": torch.randn(5, 2), "refs": torch.randn(7, 2), "sigma2": 0.5, **change}
    with pytest.raises(error) as caught:
        fk.kernel_average(**given)
    assert str(caught.value).startswith("kernel_average: ")
    assert text in str(caught.value)


def test_exclusion_needs_another_reference_point() -> None:
    x, only = torch.randn(3, 2), torch.tensor([-torch.inf, 0.0, -torch.inf])
    with pytest.raises(ValueError, match="exclude_self must be False with one reference point"):
        fk.kde_score(x[:1], x[:1], 0.5, exclude_self=True)
    with pytest.raises(ValueError, match="above -inf beside its own, for exclude_self, got 1 in a group"):
        fk.kde_mean(x, x, 0.5, log_weights=only, exclude_self=True)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([], "parts must be a list of one or more pairs"),
        (None, "parts must be a list of one or more pairs"),
        ((torch.ones(3, 2), torch.ones(3)), "parts must be a list of one or more pairs"),
        ([(torch.ones(3, 2), torch.ones(4))], r"of one shape, got \[3, 2\] and \[4\]"),
        ([(torch.ones(3, 2), torch.ones(3)), (torch.ones(4, 2), torch.ones(4))], r"\[3, 2\] and \[3\], \[4, 2\] and"),
    ],
)
def test_parts_must_fit(parts: list[tuple[Tensor, Tensor]], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fk.merge_averages(parts)


def test_compiled(backend: str) -> None:
    given = {name: t.detach() for name, t in problem(3, "per reference point").items()}
    call: Callable[..., Any] = torch.compile(lambda **g: fk.kernel_average(**g, kernel="laplace"), fullgraph=True)
    torch.testing.assert_close(call(**given), fk.kernel_average(**given, kernel="laplace"))
