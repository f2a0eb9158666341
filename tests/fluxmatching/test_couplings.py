"""Couplings against scipy's assignment, sorted points, a Monge map in closed form, and plans by plain iterations."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.stats import chi2
from torch import Tensor

from fluxmatching.distributed import rank_seed
from fluxmatching.flows.couplings import Coupling, ExactCoupling, IndependentCoupling, SinkhornCoupling, couple
from fluxmatching.losses.draws import seeded_start
from tests.programs.couplings import CASES, SEED, minibatch
from tests.support.processes import run

F64 = torch.float64
ALL = [IndependentCoupling(), ExactCoupling(), SinkhornCoupling()]


def distances(x0: Tensor, x1: Tensor) -> Tensor:
    """|x1_j - x0_i|², `[N1, N0]` float64, from the differences themselves."""
    return (x1.flatten(1).double()[:, None] - x0.flatten(1).double()).square().sum(-1)


def cost(x0: Tensor, x1: Tensor, index: Tensor) -> float:
    return float(distances(x0, x1).gather(1, index[:, None]).sum())


def least_cost(x0: Tensor, x1: Tensor) -> float:
    every = distances(x0, x1).numpy()
    return float(every[linear_sum_assignment(every)].sum())


def entropic_plan(every: Tensor, epsilon: float) -> Tensor:
    """Plan of equal weights by plain updates of both scalings until they rest."""
    kernel = (-every / epsilon).exp()
    columns = torch.ones(every.shape[1], dtype=F64)
    for _ in range(5000):
        rows = 1 / (len(every) * (kernel @ columns))
        columns = 1 / (every.shape[1] * (kernel.T @ rows))
    return rows[:, None] * kernel * columns


POINTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "random": lambda: (torch.randn(97, 3), 1 + 2 * torch.randn(97, 3)),
    "images in float16": lambda: (torch.randn(16, 3, 4, 4).half(), torch.rand(16, 3, 4, 4).half()),
    "one pair": lambda: (torch.randn(1, 2), torch.randn(1, 2)),
    "ties": lambda: (torch.randint(3, (60, 2)).float(), torch.randint(3, (60, 2)).float()),
    "one point": lambda: (torch.full((9, 2), 0.1), torch.full((9, 2), 0.7)),
    "an outlier": lambda: (torch.randn(50, 2), torch.cat([torch.randn(49, 2), torch.full((1, 2), 1e4)])),
    "tiny": lambda: (1e-200 * torch.randn(40, 2, dtype=F64), 1e-200 * torch.randn(40, 2, dtype=F64)),
    "huge": lambda: (1e200 * torch.randn(40, 2, dtype=F64), 1e200 * torch.randn(40, 2, dtype=F64)),
    "a thin cloud far away": lambda: (1e-7 * torch.randn(40, 2, dtype=F64) + 1, torch.randn(40, 2, dtype=F64)),
}


@pytest.mark.parametrize("name", POINTS)
def test_the_exact_coupling_is_an_optimal_permutation(name: str) -> None:
    x0, x1 = POINTS[name]()
    index = ExactCoupling()(x0, x1)
    assert (index.dtype, index.shape) == (torch.int64, x1.shape[:1])
    assert index.sort().values.tolist() == list(range(len(x0)))
    scale = x1.double().abs().max().item()
    x0, x1 = x0.double() / scale, x1.double() / scale  # the squares of the truth may overflow
    assert cost(x0, x1, index) == pytest.approx(least_cost(x0, x1), rel=1e-9)


def test_in_one_dimension_the_exact_coupling_sorts() -> None:
    x0, x1 = torch.randn(200, 1), torch.randn(200, 1).exp()
    paired, kept = couple(ExactCoupling(), x0, x1)
    assert kept is x1
    assert torch.equal(paired[x1[:, 0].argsort()], x0.sort(0).values)


def test_pairs_of_two_gaussians_approach_the_monge_map() -> None:
    """T(x) = m + A x with A² = Σ maps N(0, I) to N(m, Σ) at the least cost."""
    A, m = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64), torch.tensor([3.0, -1.0], dtype=F64)
    errors = []
    for n in (64, 256, 1024):
        x0, x1 = torch.randn(n, 2, dtype=F64), m + torch.randn(n, 2, dtype=F64) @ A
        paired, _ = couple(ExactCoupling(), x0, x1)
        errors.append((x1 - m - paired @ A).square().sum(1).mean().item())
    assert errors[1] < errors[0] / 1.5
    assert errors[2] < errors[1] / 1.5
    assert errors[2] < 0.02 * 2 * A.square().sum()  # of the error of independent pairs


@pytest.mark.parametrize(("n0", "n1"), [(30, 12), (12, 30), (24, 12), (7, 1), (1, 7)])
def test_unequal_sizes_draw_from_an_optimal_plan(n0: int, n1: int) -> None:
    """Over many seeds, the mean cost is the least one of all plans and every row of x0 has its weight."""
    x0, x1 = torch.randn(n0, 2), torch.randn(n1, 2)
    every = distances(x0, x1).numpy()
    sums = torch.cat([torch.eye(n1).repeat_interleave(n0, 1), torch.eye(n0).repeat(1, n1)])
    weights = torch.cat([torch.full((n1,), 1 / n1), torch.full((n0,), 1 / n0)])
    least = linprog(every.ravel(), A_eq=sums.double().numpy(), b_eq=weights.double().numpy()).fun
    found = torch.stack([ExactCoupling()(x0, x1, seed=seed) for seed in range(200)])
    costs = torch.as_tensor(every).gather(1, found.T).mean(0)
    deviation = costs.std().item() / len(costs) ** 0.5
    assert abs(costs.mean().item() - least) <= 4 * deviation + 1e-6
    counts = torch.bincount(found.flatten(), minlength=n0) / found.numel()
    torch.testing.assert_close(counts, torch.full((n0,), 1 / n0), rtol=0, atol=4 * (n0 * found.numel()) ** -0.5)


def test_a_source_twice_as_large_is_used_without_repetition_where_the_plan_is_split_evenly() -> None:
    x0 = torch.arange(8.0)[:, None]
    x1 = torch.tensor([[0.5], [2.5], [4.5], [6.5]])
    for seed in range(20):
        assert (ExactCoupling()(x0, x1, seed=seed) // 2).tolist() == [0, 1, 2, 3]


def chi_square(found: Tensor, plan: Tensor) -> float:
    """p-value of draws `[n, N1]` from the rows of a plan."""
    wanted = len(found) * plan / plan.sum(1, keepdim=True)
    counts = torch.stack([torch.bincount(column, minlength=plan.shape[1]) for column in found.T]).double()
    statistic = ((counts - wanted).square() / wanted).sum().item()
    return float(chi2.sf(statistic, plan.shape[0] * (plan.shape[1] - 1)))


@pytest.mark.parametrize("regularization", [0.05, 0.5, 1e4])
def test_sinkhorn_pairs_are_draws_from_the_entropic_plan(regularization: float) -> None:
    """ε is in units of the total variances; a large one gives independent pairs."""
    x0, x1 = torch.randn(5, 2, dtype=F64), torch.randn(4, 2, dtype=F64) + torch.tensor([3.0, 0.0])
    coupling = SinkhornCoupling(regularization=regularization, tolerance=1e-6, max_iterations=10**5)
    unit = sum(x.var(0, correction=0).sum() for x in (x0, x1)).item()
    plan = entropic_plan(distances(x0, x1), regularization * unit)
    # Copies of x1 have the plan of x1: one call draws many times.
    found = coupling(x0, x1.repeat(4000, 1), seed=1).reshape(4000, 4)
    assert chi_square(found, plan) > 1e-3
    assert regularization < 1e3 or chi_square(found, torch.full((4, 5), 0.05, dtype=F64)) > 1e-3
    assert regularization > 1 or chi_square(found, torch.full((4, 5), 0.05, dtype=F64)) < 1e-6


def test_sinkhorn_with_little_regularization_is_the_exact_coupling() -> None:
    x0, x1 = torch.randn(8, 2), torch.randn(8, 2)
    exact, copies = ExactCoupling()(x0, x1), x1.repeat(20, 1)
    little = SinkhornCoupling(regularization=3e-4, tolerance=1e-3)
    assert torch.equal(little(x0, copies, seed=0), exact.repeat(20))
    costs = [cost(x0, copies, SinkhornCoupling(regularization=r)(x0, copies, seed=0)) for r in (3e-4, 0.1, 1.0, 100.0)]
    assert costs == sorted(costs)
    assert costs[-1] > 2 * costs[0]


@pytest.mark.parametrize("name", POINTS)
def test_sinkhorn_pairs_cost_no_more_than_independent_ones(name: str) -> None:
    x0, x1 = POINTS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = SinkhornCoupling()(x0, x1, seed=0)
    x0, x1 = (x.double() / x1.double().abs().max() for x in (x0, x1))
    assert cost(x0, x1, index) <= distances(x0, x1).mean(1).sum().item() * (1 + 1e-9)


def test_sinkhorn_warns_where_it_does_not_converge() -> None:
    x0, x1 = torch.randn(64, 2), torch.randn(64, 2)
    with pytest.warns(RuntimeWarning, match="the weights of x0 are wrong by .* after 20 iterations, more than tol"):
        index = SinkhornCoupling(regularization=1e-5, max_iterations=20)(x0, x1, seed=0)
    assert ((index >= 0) & (index < 64)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SinkhornCoupling()(x0, x1, seed=0)


@pytest.mark.parametrize("coupling", ALL[1:], ids=lambda coupling: type(coupling).__name__)
def test_far_points_have_the_coupling_of_near_ones_in_float32(coupling: Coupling) -> None:
    # Multiples of 2⁻⁸ and an offset at which float32 holds them exactly.
    x0, x1 = ((torch.randn(64, 2) * 256).round() / 256 for _ in range(2))
    near = coupling(x0, x1, seed=4)
    assert torch.equal(coupling(x0 + 1e4, x1 + 1e4, seed=4), near)
    assert torch.equal(coupling(x0, x1 + 1e4, seed=4), near)
    assert torch.equal(coupling(x0 * 2.0**40, x1 * 2.0**40, seed=4), near)


def test_the_independent_coupling_pairs_row_by_row_or_uses_the_source_evenly() -> None:
    x = torch.randn(10, 2)
    assert IndependentCoupling()(x, x).tolist() == list(range(10))
    for n0, n1 in ((30, 12), (12, 30)):
        found = torch.stack(
            [IndependentCoupling()(x[:1].expand(n0, 2), x[:1].expand(n1, 2), seed=s) for s in range(50)]
        )
        counts = torch.stack([torch.bincount(row, minlength=n0) for row in found])
        assert (counts >= n1 // n0).all()
        assert (counts <= -(-n1 // n0)).all()
        assert len(found[:, 0].unique()) > n0 / 2


@pytest.mark.parametrize("coupling", ALL, ids=lambda coupling: type(coupling).__name__)
def test_seeds_reproduce(coupling: Coupling) -> None:
    x0, x1 = torch.randn(30, 2), torch.randn(20, 2)
    state = torch.get_rng_state()
    first = coupling(x0, x1, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(coupling(x0, x1, seed=torch.tensor(3)), first)
    assert torch.equal(couple(coupling, x0, x1, 3)[0], x0[first])
    assert not torch.equal(coupling(x0, x1, seed=4), first)
    drawn = coupling(x0, x1)
    assert not torch.equal(coupling(x0, x1), drawn)
    torch.set_rng_state(state)
    assert torch.equal(coupling(x0, x1), drawn)


@pytest.mark.parametrize("coupling", ALL, ids=lambda coupling: type(coupling).__name__)
def test_autocast_default_device_and_gradients_change_nothing(coupling: Coupling) -> None:
    x0, x1 = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    index = coupling(x0, x1, seed=1)
    torch.set_default_device("meta")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(coupling(x0, x1, seed=1), index)
    finally:
        torch.set_default_device(None)
    couple(coupling, x0, x1, 1)[0].square().sum().backward()
    assert x0.grad is not None
    counts = torch.bincount(index, minlength=6)[:, None]
    torch.testing.assert_close(x0.grad, 2 * x0.detach() * counts)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x0": torch.ones(4, 3)}, ValueError, r"x1 must have the event of x0, \[3\], .* got shape \[4, 2\]"),
    ({"x0": torch.ones(4, 2, 1)}, ValueError, "x1 must have the event of x0"),
    ({"x0": torch.ones(4), "x1": torch.ones(4)}, ValueError, r"x0 must have shape \[N, \*event\], got \[4\]"),
    ({"x0": torch.ones(4, 2, dtype=F64)}, TypeError, "x1 must have the dtype of the first argument, torch.float64"),
    ({"x1": torch.ones(4, 2, dtype=torch.int64)}, TypeError, "x1 must have a floating dtype"),
    ({"x0": torch.ones(4, 2, device="meta")}, ValueError, "x1 must be on meta like the first argument, got cpu"),
    ({"x0": torch.ones(0, 2)}, ValueError, "x0 must not be empty"),
    ({"x0": torch.tensor([[0.0, torch.nan]])}, ValueError, "x0 must be finite"),
    ({"x1": torch.tensor([[0.0, torch.inf]])}, ValueError, "x1 must be finite"),
    ({"x1": [[0.0, 1.0]]}, TypeError, "x1 must be a torch.Tensor, got list"),
    ({"seed": 0.5}, TypeError, "seed must be an integer"),
]


@pytest.mark.parametrize("coupling", ALL, ids=lambda coupling: type(coupling).__name__)
def test_bad_arguments_are_named(coupling: Coupling) -> None:
    for change, error, text in BAD:
        arguments = {"x0": torch.ones(4, 2), "x1": torch.ones(4, 2), "seed": 0, **change}
        for call in (coupling, lambda *a, **k: couple(coupling, *a, **k)):
            with pytest.raises(error, match=f"^{type(coupling).__name__}: {text}"):
                call(arguments["x0"], arguments["x1"], seed=arguments["seed"])


def test_solvers_refuse_values_that_were_not_checked_before() -> None:
    """On an accelerator they are read only here."""
    x, bad = torch.randn(4, 2), torch.tensor([[0.0, 1.0], [torch.nan, 2.0]])
    for coupling in ALL[1:]:
        for x0, x1, name in ((bad, x, "x0"), (x, bad, "x1"), (x, bad / 0, "x1")):
            with pytest.raises(ValueError, match=f"{type(coupling).__name__}: {name} must be finite"):
                coupling.index(x0, x1, None)


def test_samples_without_values_are_refused() -> None:
    for coupling in ALL[1:]:
        with pytest.raises(RuntimeError, match="x0 and x1 must have values"):
            coupling(torch.ones(4, 2, device="meta"), torch.ones(4, 2, device="meta"))


def test_bad_options_are_named() -> None:
    for options, text in (
        ({"regularization": 0.0}, "regularization must be a positive number, got 0.0"),
        ({"tolerance": -1.0}, "tolerance must be a positive number"),
        ({"max_iterations": 0}, "max_iterations must be a positive integer, got 0"),
    ):
        with pytest.raises(ValueError, match=f"SinkhornCoupling: {text}"):
            SinkhornCoupling(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ExactCoupling: gather_across_ranks must be True or False, got 1"):
        ExactCoupling(gather_across_ranks=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="couple: coupling must be a Coupling, such as ExactCoupling"):
        couple("exact", torch.ones(4, 2), torch.ones(4, 2))  # type: ignore[arg-type]


def test_without_pot_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    x = torch.randn(4, 2)
    for coupling in ALL[1:]:
        with pytest.raises(ImportError, match=f"{type(coupling).__name__} needs POT: pip install POT"):
            coupling(x, x)
    assert IndependentCoupling()(x, x).tolist() == [0, 1, 2, 3]


def test_a_solver_that_stops_early_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxmatching.flows.couplings._MOST_PIVOTS", 2)
    with (
        pytest.warns(UserWarning, match="numItermax"),
        pytest.raises(RuntimeError, match="exact solver ended without the optimum"),
    ):
        ExactCoupling()(torch.randn(50, 2), torch.randn(50, 2))


def test_a_function_is_a_coupling_if_it_returns_one_row_per_sample() -> None:
    x0, x1 = torch.arange(6.0)[:, None], torch.randn(3, 1)
    assert couple(lambda x0, x1, seed: torch.tensor([5, 0, seed]), x0, x1, 2)[0].tolist() == [[5.0], [0.0], [2.0]]
    for bad, got in (
        (torch.tensor([[1], [2], [3]]), r"torch.int64 \[3, 1\]"),
        (torch.ones(3), r"torch.float32 \[3\]"),
        ([0, 1, 2], "list"),
    ):
        with pytest.raises(ValueError, match=rf"couple: coupling must return .* int64 of shape \[3\], got {got}"):
            couple(lambda x0, x1, seed, bad=bad: bad, x0, x1)


Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two() -> Rows:
    """What two processes report."""
    torchrun = ["--standalone", "--nproc-per-node", 2, "-m", "tests.programs.process", "tests.programs.couplings"]
    return run("torch.distributed.run", torchrun, {})


@pytest.mark.parametrize("name", CASES)
def test_two_processes_pair_their_joint_minibatch_as_one_process_does(name: str, two: Rows) -> None:
    kind, times = CASES[name]
    shares = [minibatch(rank, times) for rank in range(2)]
    x0, x1 = (torch.cat(parts) for parts in zip(*shares, strict=True))
    for row in [row for row in two if row["what"] == "pairs" and row["name"] == name]:
        assert row["kept"] == [True, True]
        found = torch.tensor(row["x0"], dtype=F64)
        if row["gather"]:
            wanted = couple(kind(), x0, x1, SEED)[0]
            assert torch.equal(found.flatten(0, 1), wanted)
            joint = (found.flatten(0, 1) - x1).square().sum().item()
        else:
            for rank, (own0, own1) in enumerate(shares):
                assert torch.equal(found[rank], couple(kind(), own0, own1, SEED)[0])
            alone = (found.flatten(0, 1) - x1).square().sum().item()
    if name == "exact":
        assert joint == pytest.approx(least_cost(x0, x1))
        assert joint < alone - 1


def test_processes_share_the_numbers_that_no_seed_makes(two: Rows) -> None:
    """Their generators differ, and the joint plan is that of all samples."""
    (row,) = [row for row in two if row["what"] == "without a seed"]
    x0, x1 = (torch.cat(parts) for parts in zip(*(minibatch(rank, 2) for rank in range(2)), strict=True))
    torch.manual_seed(0)
    assert torch.equal(torch.tensor(row["x0"], dtype=F64).flatten(0, 1), couple(ExactCoupling(), x0, x1)[0])


def test_a_loss_module_couples_the_noise_of_all_processes(two: Rows) -> None:
    """Each process draws noise of its own; with a field of zero the loss is |x1 - x0|² of the joint pairs."""
    (row,) = [row for row in two if row["what"] == "module"]
    data = [minibatch(rank, 2)[1] for rank in range(2)]
    noise = [seeded_start(x1, rank_seed(torch.tensor(SEED), rank)) for rank, x1 in enumerate(data)]
    assert not torch.equal(*noise)
    x0, x1 = couple(ExactCoupling(), torch.cat(noise), torch.cat(data), SEED)
    wanted = (x1 - x0).square().sum(1).reshape(2, -1).mean(1)
    torch.testing.assert_close(torch.tensor(row["loss"], dtype=F64), wanted)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NaN in one process", "ValueError: couple: x1 must be finite, got NaN or infinity"),
        ("shape", "x0 must have the same shape and dtype in all processes, got rank 0 [24, 2] torch.float64"),
        ("seed", "ValueError: couple: seed must be the same in all processes, got values from 5 to 6"),
        ("index", "RuntimeError: ExactCoupling: gather_across_ranks pairs samples of different processes"),
    ],
)
def test_mistakes_raise_an_error_in_every_process(name: str, text: str, two: Rows) -> None:
    (row,) = [row for row in two if row["what"] == "refused" and row["name"] == name]
    assert len(row["messages"]) == 2
    assert all(text in message for message in row["messages"]), row
