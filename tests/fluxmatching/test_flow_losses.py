"""Conditional flow matching: its minimum, its closed-form targets and its forms, against known Gaussians."""

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxmatching import (
    CosinePath,
    DSMOptions,
    ExactCoupling,
    FlowMatching,
    FlowOptions,
    LinearPath,
    LogitNormalTimes,
    UniformTimes,
    VarianceExplodingPath,
    VariancePreservingPath,
    conditional_flow_matching_loss,
    dsm_loss,
    marginal_velocity,
)
from fluxmatching.flows.losses import _error_scale
from fluxmatching.flows.paths import PREDICTIONS, Path

F64 = torch.float64
PATHS = [LinearPath(), LinearPath(0.1), CosinePath(), VariancePreservingPath(), VarianceExplodingPath(0.1, 10.0)]
BY_PATH = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


class Network(nn.Module):
    """A small velocity field with labels, in float64."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.label = nn.Embedding(classes + 1, 4)
        self.layers = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 2))
        self.double()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        assert t.shape == (len(x),)
        embedded = self.label(torch.zeros_like(t, dtype=torch.int64) if labels is None else labels)
        return self.layers(torch.cat([x, t.unsqueeze(1), embedded], 1))


@BY_PATH
def test_closed_form_velocity_of_every_path(path: Path, backend: str) -> None:
    """Against the posterior mean of the conditional velocities, by a softmax in float64."""
    x, refs, t = 2 * torch.randn(6, 3, dtype=F64), torch.randn(9, 3, dtype=F64), torch.linspace(0.05, 0.95, 6).double()
    c = path.coefficients(t).reshape_for(x)
    away = x.unsqueeze(1) - c.alpha.unsqueeze(-1) * refs
    weights = (-away.square().sum(-1) / (2 * c.sigma**2)).softmax(1)
    velocities = c.alpha_rate.unsqueeze(-1) * refs + (c.sigma_rate / c.sigma).unsqueeze(-1) * away
    expected = (weights.unsqueeze(-1) * velocities).sum(1)
    torch.testing.assert_close(marginal_velocity(x, t, refs, path), expected, rtol=1e-9, atol=1e-9)
    single = marginal_velocity(x.float(), t.float(), refs.float(), path)
    torch.testing.assert_close(single.double(), expected, rtol=2e-4, atol=2e-4)


def test_closed_form_velocity_at_the_ends(backend: str) -> None:
    refs = torch.randn(7, 2, dtype=F64)
    x = torch.randn(5, 2, dtype=F64)
    for path, rate in ((LinearPath(), 1.0), (CosinePath(), math.pi / 2)):
        start = marginal_velocity(x, 0.0, refs, path)
        noise_rate = path.coefficients(torch.zeros((), dtype=F64)).sigma_rate
        torch.testing.assert_close(start, rate * refs.mean(0) + noise_rate * x, rtol=1e-12, atol=1e-12)
    # At the data each point stays with itself: v is α' times it, and infinite away from the points.
    torch.testing.assert_close(marginal_velocity(refs, 1.0, refs), refs)
    assert marginal_velocity(x, 1.0, refs).isinf().all()


def test_least_loss_is_at_the_marginal_velocity(backend: str) -> None:
    """Theorems 1 and 2: the gradient at the closed-form velocity vanishes, and a shifted field loses |shift|²."""
    refs = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]], dtype=F64)
    x1 = refs[torch.randint(3, (40_000,))]
    shift = torch.tensor([0.3, -0.2], dtype=F64)
    options = FlowOptions(times=UniformTimes(0.0, 0.9))

    def mean_loss(extra: Tensor) -> Tensor:
        return conditional_flow_matching_loss(lambda x, t: marginal_velocity(x, t, refs) + extra, x1, options, seed=1)

    gain = mean_loss(shift) - mean_loss(torch.zeros(2, dtype=F64))
    error = (gain - shift.square().sum()).std() / len(x1) ** 0.5
    assert abs(gain.mean() - shift.square().sum()) < 4 * error
    assert error < 0.3 * shift.square().sum()


@BY_PATH
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_stable_target_is_the_mean_of_the_single_sample_target(path: Path, prediction: str, backend: str) -> None:
    """With the field zero, single-sample loss minus stable loss is the variance of the target: never negative. And
    the stable target of a reference set of one point is the single-sample one."""
    x1 = torch.randn(1, 2, dtype=F64).expand(64, 2)
    options = {"path": path, "prediction": prediction, "times": UniformTimes(0.05, 0.95)}
    zero: Any = lambda x, t: torch.zeros_like(x)  # noqa: E731
    single = conditional_flow_matching_loss(zero, x1, FlowOptions(**options), seed=2)
    stable = conditional_flow_matching_loss(zero, x1, FlowOptions(stable_target=True, **options), refs=x1[:1], seed=2)
    torch.testing.assert_close(stable, single, rtol=1e-8, atol=1e-8)


def test_stable_target_is_the_closed_form_velocity(backend: str) -> None:
    x1, refs = torch.randn(20, 2, dtype=F64), torch.randn(50, 2, dtype=F64)
    loss = conditional_flow_matching_loss(
        lambda x, t: marginal_velocity(x, t, refs), x1, FlowOptions(stable_target=True), refs=refs, seed=3
    )
    # The refs do not hold x1, so the target follows from x_t alone.
    assert loss.max() < 1e-15


@BY_PATH
def test_every_error_of_every_prediction_is_the_same_error(path: Path) -> None:
    """A field given as velocity, score, noise or denoiser has the same error in any of these forms."""
    x1, network = torch.randn(30, 2, dtype=F64), Network()
    t = torch.rand(30, dtype=F64) * 0.9 + 0.05

    def as_prediction(target: str) -> Any:
        return lambda x, t: path.convert(network(x, t), x, t, source="velocity", target=target)

    for error in PREDICTIONS:
        losses = [
            conditional_flow_matching_loss(
                as_prediction(prediction), x1, FlowOptions(path=path, prediction=prediction, error=error), t=t, seed=1
            )
            for prediction in PREDICTIONS
        ]
        for loss in losses[1:]:
            torch.testing.assert_close(loss, losses[0], rtol=1e-8, atol=1e-8)


def test_forms_of_denoising_score_matching(backend: str) -> None:
    """On the variance-exploding path a score with error "noise" or "denoiser" is `dsm_loss` in its two forms."""
    x, path = torch.randn(12, 2, dtype=F64), VarianceExplodingPath(0.1, 10.0)
    field: Any = lambda z: torch.tanh(z) - z  # noqa: E731
    t = torch.rand(12, dtype=F64)
    sigma = path.coefficients(t).sigma
    for stable in (False, True):
        for error, form in (("noise", "eps"), ("denoiser", "x0")):
            options = FlowOptions(path=path, prediction="score", error=error, stable_target=stable)
            found = conditional_flow_matching_loss(lambda z, t: field(z), x, options, t=t, seed=7)
            expected = dsm_loss(field, x, sigma, DSMOptions(form=form, stable=stable), seed=7)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@BY_PATH
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_errors_at_the_ends_are_limits(path: Path, end: float) -> None:
    """The ratio of errors at an end is that beside it, or the loss says that it is not finite."""
    ends, beside = (torch.full((1,), value, dtype=F64) for value in (end, abs(end - 1e-9)))
    for error, prediction in permutations(PREDICTIONS, 2):
        at_end, near = (_error_scale(path.coefficients(t), error, prediction) for t in (ends, beside))
        if near < 1e3:
            torch.testing.assert_close(at_end, near, rtol=1e-3, atol=1e-3)


def test_data_to_data_finds_the_known_map() -> None:
    """Between two Gaussians with a deterministic coupling x1 = A x0 the velocity (A - I) x0 is linear in x_t."""
    A = torch.tensor([[1.5, 0.3], [0.0, 0.5]], dtype=F64)
    x0 = torch.randn(500, 2, dtype=F64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        between = torch.eye(2, dtype=F64) + t.view(-1, 1, 1) * (A - torch.eye(2, dtype=F64))
        return ((A - torch.eye(2, dtype=F64)) @ torch.linalg.solve(between, x.unsqueeze(-1))).squeeze(-1)

    loss = conditional_flow_matching_loss(velocity, x0 @ A.T, x0=x0, seed=1)
    assert loss.max() < 1e-24


def test_times() -> None:
    uniform = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    assert abs(UniformTimes(0.2, 0.6).quantile(uniform).mean() - 0.4) < 1e-9
    t = LogitNormalTimes(0.5, 2.0).quantile(uniform)
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean() - 0.5) < 1e-9
    assert abs(logit.std() - 2.0) < 1e-2
    seen: list[Tensor] = []
    field: Any = lambda x, t: (seen.append(t), x)[1]  # noqa: E731
    conditional_flow_matching_loss(field, torch.randn(1000, 2), FlowOptions(times=UniformTimes(0.2, 0.6)), seed=0)
    assert 0.2 < seen[0].min() < 0.201
    assert 0.599 < seen[0].max() <= 0.6


def test_labels_are_dropped_at_their_rate(backend: str) -> None:
    labels, seen = torch.randint(4, (20_000,)), []

    def field(x: Tensor, t: Tensor, given: Tensor) -> Tensor:
        seen.append(given)
        return x

    options = FlowOptions(num_classes=4, label_dropout=0.2)
    conditional_flow_matching_loss(field, torch.randn(20_000, 1), options, labels=labels, seed=0)
    dropped = seen[0] == 4
    assert abs(dropped.double().mean() - 0.2) < 4 * (0.2 * 0.8 / 20_000) ** 0.5
    assert torch.equal(seen[0][~dropped], labels[~dropped])
    conditional_flow_matching_loss(
        field, torch.randn(5, 1), FlowOptions(num_classes=4, label_dropout=0.0), labels=labels[:5], seed=0
    )
    assert torch.equal(seen[1], labels[:5])


def test_module_and_function_agree(backend: str) -> None:
    x, network = torch.randn(16, 2, dtype=F64), Network()
    loss, logged = FlowMatching(network)(x, seed=5)
    expected = conditional_flow_matching_loss(network, x, seed=5).mean()
    torch.testing.assert_close(loss, expected)
    assert not any(value.requires_grad for value in logged.values())
    assert abs(logged["t"] - 0.5) < 0.05
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.layers.parameters())


def test_module_with_a_source_a_coupling_and_pairs() -> None:
    x, source = torch.randn(16, 2, dtype=F64), torch.randn(50, 2, dtype=F64) + 5
    drawn: list[Tensor] = []

    def record(x0: Tensor, x1: Tensor, *, seed: Any = None) -> Tensor:
        drawn.append(x0)
        return torch.arange(len(x1))

    FlowMatching(lambda x, t: x, source=source, coupling=record)(x, seed=1)  # type: ignore[arg-type]
    assert drawn[0].shape == x.shape
    assert all((row == source).all(1).any() for row in drawn[0])
    # Pairs: a field that knows the displacement of a shift by 3 has no loss.
    pairs = torch.stack([x, x + 3], 1)
    loss, _ = FlowMatching(lambda x, t: torch.full_like(x, 3.0), paired=True)(pairs, seed=1)
    assert loss < 1e-25
    # In one dimension the optimal coupling is that of the sorted samples, and the loss at t = 0.5 tells the pairs.
    line = torch.randn(64, 1, dtype=F64)
    x1, key = torch.randn(64, 1, dtype=F64), torch.tensor(3)
    x0, same = FlowMatching(lambda x, t: x, coupling=ExactCoupling(), source=line)._pairs(x1, key, key)
    assert torch.equal(same, x1)
    assert (x0[x1.flatten().argsort()].flatten().diff() >= 0).all()


def test_a_fixed_row_gets_all_times() -> None:
    """Full batches in the same order: each row meets early and late times, and times stay below 1."""
    seen: list[Tensor] = []
    module = FlowMatching(lambda x, t: (seen.append(t), x)[1])
    for seed in range(200):
        module(torch.zeros(64, 1, dtype=F64), seed=seed)
    times = torch.stack(seen)
    assert ((times.mean(0) - 0.5).abs() < 5 * (1 / 12 / 200) ** 0.5).all()
    # Still one of each interval.
    assert torch.equal((times[0].sort().values * 64).long(), torch.arange(64))
    many = FlowOptions(path=VariancePreservingPath())
    conditional_flow_matching_loss(lambda x, t: x, torch.zeros(4096, 1), many, seed=9016)


def test_reference_points_of_the_module_are_used(backend: str) -> None:
    x, refs, network = torch.randn(16, 2, dtype=F64), torch.randn(64, 2, dtype=F64), Network()
    options = FlowOptions(stable_target=True)
    loss, _ = FlowMatching(network, options, refs=refs)(x, seed=2)
    torch.testing.assert_close(loss, conditional_flow_matching_loss(network, x, options, refs=refs, seed=2).mean())
    assert loss != conditional_flow_matching_loss(network, x, options, seed=2).mean()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"field": None}, TypeError, "field must be callable"),
        ({"x1": torch.randn(4)}, ValueError, r"x1 must have shape \[N, \*event\]"),
        ({"x1": torch.full((4, 2), torch.nan)}, ValueError, "x1 must be finite"),
        ({"x0": torch.randn(3, 2)}, ValueError, r"x0 must have the shape of x1, \[4, 2\], got \[3, 2\]"),
        ({"t": 1.2}, ValueError, r"t must lie in \[0, 1\], got 1.2"),
        ({"t": torch.rand(3)}, ValueError, r"t must be one number or one per sample, shape \[4\], got \[3\]"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, "give labels if and only if"),
        ({"options": FlowOptions(num_classes=3)}, ValueError, "give labels if and only if"),
        (
            {"options": FlowOptions(num_classes=3), "labels": torch.tensor([0, 1, 3, 2])},
            ValueError,
            r"labels must lie in \[0, 3\), got 3",
        ),
        (
            {"options": FlowOptions(num_classes=3), "labels": torch.tensor([0, 1])},
            ValueError,
            r"labels must have one entry per sample, shape \[4\], got \[2\]",
        ),
        ({"options": FlowOptions(num_classes=3), "labels": torch.rand(4)}, TypeError, "labels must be an int64"),
        (
            {"options": FlowOptions(stable_target=True), "refs": torch.randn(5, 3)},
            ValueError,
            r"refs must have shape \[M, \*event\] with the event of x1, \[2\], got \[5, 3\]",
        ),
        (
            {"options": FlowOptions(stable_target=True), "x0": torch.randn(4, 2)},
            ValueError,
            "x0 must be None with stable_target",
        ),
        (
            {"options": FlowOptions(path=VariancePreservingPath()), "t": 1.0},
            ValueError,
            "velocity is not finite at t = 1",
        ),
        ({"x1": torch.randn(4, 2).bfloat16()}, TypeError, "x1 must be float32 or float64, got torch.bfloat16"),
        ({"refs": torch.randn(5, 2)}, ValueError, "refs are those of the stable target"),
        ({"options": 0.5}, TypeError, "options must be FlowOptions, got 0.5"),
        ({"field": lambda x, t: x[:2]}, ValueError, "field must return the shape of its input"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {"field": lambda x, t, *rest: x, "x1": torch.randn(4, 2), "options": FlowOptions()}
    given.update(change)
    with pytest.raises(error, match=text):
        conditional_flow_matching_loss(given.pop("field"), given.pop("x1"), given.pop("options"), **given)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"path": "linear"}, TypeError, "path must be a Path"),
        ({"times": 0.5}, TypeError, "times must be a distribution"),
        ({"times": UniformTimes}, TypeError, r"times must be .*, such as UniformTimes\(\), got <class"),
        ({"prediction": "drift"}, ValueError, "prediction must be one of"),
        ({"error": "drift"}, ValueError, "error must be one of"),
        ({"num_classes": 0}, ValueError, "num_classes must be None or a positive integer"),
        ({"label_dropout": 1.5}, ValueError, r"label_dropout must lie in \[0, 1\]"),
        ({"backend": "gpu"}, ValueError, "backend"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FlowOptions(**options)
