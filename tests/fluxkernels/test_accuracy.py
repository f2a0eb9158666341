"""Section "numbers that must stay right": every op, every adversarial case, against extended precision."""

import functools

import numpy as np
import pytest
import torch

import fluxkernels as fk
from fluxkernels.reference import blocks
from tests.support import accuracy, oracles
from tests.support.cases import CASES, Case
from tests.support.ops import OPS

IDS = [case.name for case in CASES]


@functools.cache
def truths(case: Case, dtype: type[np.floating]) -> dict[str, np.ndarray]:
    return accuracy.truths(case, dtype)


def float32_errors(case: Case, backend: str) -> dict[str, float]:
    truth = truths(case, np.float32)
    return accuracy.relative_errors(accuracy.results(case, truth["end"], backend), truth)


float32_errors_of_torch = functools.cache(functools.partial(float32_errors, backend="torch"))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float32_against_extended_precision(case: Case, implementation: str) -> None:
    theirs = float32_errors_of_torch(case)
    ours = theirs if implementation == "torch" else float32_errors(case, implementation)
    assert accuracy.wrong(case, ours, theirs) == {}


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float64_in_float64_out(case: Case, implementation: str) -> None:
    truth = truths(case, np.float64)
    results = accuracy.results(case, truth["end"], implementation, torch.float64)
    for label, got in results.items():
        assert got.dtype == torch.float64
        assert oracles.relative_error(got.numpy(), truth[label]) < 1e-9, label


def test_plain_formula_fails_where_we_do_not() -> None:
    """The table's point, and a check that its right-hand column measures something."""
    case = next(c for c in CASES if c.name == "offset 1000, spread 1")
    ours, plain = accuracy.errors_beside_published(case, "torch")
    assert plain["score"] > 0.1
    assert ours["score"] < 1e-6


def test_every_op_but_those_made_of_others_has_a_truth() -> None:
    assert [op.name for op in OPS if op.truth is None] == ["langevin_step", "flux_pass"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, backend: str) -> None:
    x, refs = torch.randn(9, 3).to(dtype), torch.randn(20, 3).to(dtype)
    for op in (fk.kde_score, fk.kde_mean, fk.kde_log_density):
        got = op(x, refs, 0.5)
        assert got.dtype == dtype
        torch.testing.assert_close(
            got, op(x.double(), refs.double(), 0.5).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0
        )


def test_half_precision_keeps_a_bandwidth_it_cannot_hold(backend: str) -> None:
    """σ² = 4e-8 is zero in float16."""
    x = torch.zeros(1, 1, dtype=torch.float16)
    score = fk.kde_score(x, torch.full_like(x, 1e-3), 4e-8)
    assert score.item() == pytest.approx(1e-3 / 4e-8, rel=2e-3)


def test_strided_and_expanded_inputs(backend: str) -> None:
    base = torch.randn(7, 5, 3, 2)
    x = base.permute(2, 0, 3, 1)[..., ::2]  # [3, 7, 2, 3], no unit stride where one would expect it
    refs = torch.randn(11, 3).expand(3, 7, 11, 3)
    torch.testing.assert_close(
        fk.kde_score(x, refs, 0.3), fk.kde_score(x.contiguous(), refs.contiguous(), 0.3), rtol=0, atol=0
    )
    noise = torch.randn(4, 3, 7, 2, 3)
    torch.testing.assert_close(
        fk.langevin_chain(x, refs, 0.3, 1.0, noise=noise),
        fk.langevin_chain(x.contiguous(), refs.contiguous(), 0.3, 1.0, noise=noise),
        rtol=0,
        atol=0,
    )


def test_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole groups, split groups and split rows give the results of one block that holds everything."""
    x, refs, values = (torch.randn(5, n, 3, dtype=torch.float64) for n in (40, 30, 40))

    def evaluate() -> list[torch.Tensor]:
        refs_leaf = refs.clone().requires_grad_()
        p = fk.flux_pass(x, refs_leaf, 0.3, 1.0, seed=1, backend="torch")
        (gradient,) = torch.autograd.grad(p.score_t.square().sum(), refs_leaf)
        return [p.x0, p.score0, p.xt, p.transition_average(values), gradient]

    whole = evaluate()
    for pairs in (1 << 11, 100, 1):
        monkeypatch.setattr(blocks, "PAIRS_IN_BLOCK", pairs)
        for got, expected in zip(evaluate(), whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_float32_only_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas hold on a device without float64, to float32's own accuracy."""
    case = Case("plain")
    for module in (blocks, fk.reference.langevin):
        monkeypatch.setattr(module, "compute_dtype", lambda device: torch.float32)
    ours = accuracy.errors(case, "torch")
    assert max(ours.values()) < 1e-5
    assert max(ours.values()) > 1e-7  # the switch was thrown


def test_wide_bandwidth_sees_the_mean(backend: str) -> None:
    x, refs = torch.randn(5, 3), torch.randn(50, 3)
    torch.testing.assert_close(fk.kde_score(x, refs, 1e12) * 1e12, refs.mean(0) - x, rtol=1e-5, atol=1e-6)


def test_narrow_bandwidth_sees_the_nearest_reference_point(backend: str) -> None:
    x, refs = torch.randn(5, 3), torch.randn(50, 3)
    nearest = refs[torch.cdist(x, refs).argmin(1)]
    torch.testing.assert_close(fk.kde_mean(x, refs, 1e-12), nearest, rtol=0, atol=0)


def test_one_reference_point_is_an_ornstein_uhlenbeck_process(backend: str) -> None:
    """K steps of size τ/K from x0 end in N(r + e^{-τ}(x0 - r), σ²(1 - e^{-2τ})), exactly, for every K."""
    x0, refs, n = torch.full((200_000, 1), 2.0), torch.ones(1, 1), 200_000
    xt = fk.langevin_chain(x0, refs, 0.25, 0.7, seed=3)
    mean, variance = 1 + np.exp(-0.7), 0.25 * (1 - np.exp(-1.4))
    assert xt.mean().item() == pytest.approx(mean, abs=4 * (variance / n) ** 0.5)
    assert xt.var().item() == pytest.approx(variance, abs=4 * variance * (2 / n) ** 0.5)
