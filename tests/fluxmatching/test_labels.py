"""Class labels of flows: from the data through training, closed-form targets and guidance to samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fluxmatching import (
    FlowMatching,
    FlowOptions,
    GuidedField,
    LinearPath,
    ODESolver,
    Trainer,
    TrainingOptions,
    UniformTimes,
    conditional_flow_matching_loss,
    flow_log_likelihood,
    integrate_flow,
    marginal_velocity,
    rectified_pairs,
)
from fluxmatching.flows.closed_form import posterior_mean_of_class
from fluxmatching.training.data import Minibatches
from tests.support.training import OPTIONS, assert_same, loss

F64 = torch.float64
CLASSES = 3
STABLE = FlowOptions(stable_target=True, num_classes=CLASSES, label_dropout=0.0)


class Network(nn.Module):
    """v(x, t, labels), with an embedding for each class and for none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.label = nn.Embedding(CLASSES + 1, 4)
        self.layers = nn.Sequential(nn.Linear(7, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t.unsqueeze(1), self.label(labels)], 1))


class Recording(FlowMatching):
    """Flow matching that keeps what the trainer gives it."""

    seen: list[tuple[Tensor, Tensor]]

    def forward(self, x: Tensor, *, labels: Any = None, seed: Any = None) -> Any:
        self.seen.append((x, labels))
        return super().forward(x, labels=labels, seed=seed)


def labeled_data(count: int = 70) -> TensorDataset:
    """Samples whose second coordinate is their label."""
    labels = torch.arange(count) % CLASSES
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    x[:, 1] = labels
    return TensorDataset(x, labels)


# ---------------------------------------------------------------- training


def test_the_trainer_gives_each_sample_its_label() -> None:
    module = Recording(Network(), FlowOptions(num_classes=CLASSES))
    module.seen = []
    Trainer(module, labeled_data(), OPTIONS).run()
    assert len(module.seen) == OPTIONS.iterations
    for x, labels in module.seen:
        assert labels.dtype == torch.int64
        assert torch.equal(labels, x[:, 1].long())
    assert len(torch.cat([labels for _, labels in module.seen]).unique()) == CLASSES


def test_each_process_has_the_labels_of_its_own_samples() -> None:
    parts = [Minibatches(labeled_data(), 8, rank, 2, 0, torch.device("cpu")) for rank in range(2)]
    assert all(part.labeled for part in parts)
    (x0, labels0), (x1, labels1) = (part[5] for part in parts)
    for x, labels in ((x0, labels0), (x1, labels1)):
        assert torch.equal(labels, x[:, 1].long())
    assert not torch.equal(x0, x1)


def test_a_labeled_training_resumes_exactly(tmp_path: Path) -> None:
    def trainer(folder: Path) -> Trainer:
        return Trainer(
            FlowMatching(Network(), FlowOptions(num_classes=CLASSES)), labeled_data(), OPTIONS, folder=folder
        )

    whole = trainer(tmp_path / "whole")
    whole.run()
    trainer(tmp_path / "parts").run(seconds=0.0)
    resumed = trainer(tmp_path / "parts")
    assert resumed.iteration == 1
    resumed.run()
    assert_same(whole, resumed)


class Pairs:
    """Samples with what belongs to them."""

    def __init__(self, more: Callable[[Tensor], Any]) -> None:
        self.more = more

    def __len__(self) -> int:
        return 70

    def __getitem__(self, indices: Tensor) -> Any:
        return torch.randn(len(indices), 2), self.more(indices)


def test_labels_that_do_not_suit_are_refused() -> None:
    with pytest.raises(TypeError, match=r"data have labels, which the loss must take .*; ChangedLoss does not"):
        Trainer(loss(), labeled_data(), OPTIONS)  # type: ignore[arg-type]
    module = FlowMatching(Network(), FlowOptions(num_classes=CLASSES))
    with pytest.raises(ValueError, match=r"Pairs returns shape \[3\] for 2 indices"):
        Trainer(module, Pairs(lambda indices: torch.zeros(3)), OPTIONS)
    with pytest.raises(TypeError, match=r"return one or \(samples, labels\) for a tensor of indices; got list"):
        Trainer(module, Pairs(list), OPTIONS)
    with pytest.raises(ValueError, match="give labels if and only if the options have num_classes"):
        Trainer(module, torch.randn(70, 2), OPTIONS).step()
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got"):
        Trainer(module, Pairs(lambda indices: indices + 3), OPTIONS).step()


def test_a_trained_flow_has_the_classes_of_its_data() -> None:
    """Class k is N((3(k - 1), 0), 0.3² I). Means of samples by label, and of those without a label: of all classes."""
    means = 3.0 * torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    labels = torch.arange(3000) % CLASSES
    x = means[labels] + 0.3 * torch.randn(3000, 2, generator=torch.Generator().manual_seed(2))
    by_class = [x[labels == k] for k in range(CLASSES)]
    options = FlowOptions(stable_target=True, num_classes=CLASSES, label_dropout=0.2, times=UniformTimes(end=0.98))
    training = TrainingOptions(300, 128, lr=1e-2, ema=0.97, accelerator="cpu", progress=False)
    trainer = Trainer(FlowMatching(Network(), options, refs=by_class), TensorDataset(x, labels), training)
    trainer.run()
    field = trainer.average.module.field.eval()
    start, wanted = torch.randn(900, 2, generator=torch.Generator().manual_seed(3)), torch.arange(900) % CLASSES
    solver = ODESolver("midpoint", num_steps=20)
    found = integrate_flow(GuidedField(field, wanted, 1.0, CLASSES), start, end=0.98, solver=solver)
    for k in range(CLASSES):
        torch.testing.assert_close(found[wanted == k].mean(0), means[k], atol=0.15, rtol=0)
        assert found[wanted == k].std(0).max() < 0.6
    unlabeled = integrate_flow(GuidedField(field, 0, 0.0, CLASSES), start, end=0.98, solver=solver)
    nearest = torch.cdist(unlabeled, means).argmin(1)
    assert (torch.bincount(nearest, minlength=CLASSES) / 900 - 1 / 3).abs().max() < 0.08


# ---------------------------------------------------------------- closed-form targets


def points_of_classes(dtype: torch.dtype = F64) -> list[Tensor]:
    """Classes that overlap, of different size."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(count, 2, generator=generator, dtype=dtype) + k for k, count in enumerate((4, 9, 6))]


def velocity_of_class(x: Tensor, t: Tensor, labels: Tensor, refs: list[Tensor]) -> Tensor:
    """Marginal velocity of the linear path given the class, by one softmax per sample."""
    found = []
    for point, time, label in zip(x, t, labels, strict=True):
        away = point - time * refs[int(label)]
        weights = (-away.square().sum(1) / (2 * (1 - time) ** 2)).softmax(0)
        found.append(weights @ (refs[int(label)] - away / (1 - time)))
    return torch.stack(found)


def test_the_stable_target_of_a_class_is_the_closed_form_of_its_points(backend: str) -> None:
    refs, labels = points_of_classes(), torch.arange(30) % CLASSES
    x1 = torch.randn(30, 2, dtype=F64)
    options = {"options": STABLE, "labels": labels, "refs": refs, "seed": 3}
    field: Any = lambda x, t, given: velocity_of_class(x, t, given, refs)  # noqa: E731
    assert conditional_flow_matching_loss(field, x1, **options).max() < 1e-15
    wrong: Any = lambda x, t, given: velocity_of_class(x, t, (given + 1) % CLASSES, refs)  # noqa: E731
    assert conditional_flow_matching_loss(wrong, x1, **options).mean() > 0.1
    of_all: Any = lambda x, t, given: marginal_velocity(x, t, torch.cat(refs))  # noqa: E731
    assert conditional_flow_matching_loss(of_all, x1, **options).mean() > 0.1


def test_means_of_classes_average_to_the_mean_of_all(backend: str) -> None:
    """Σ_k P(k | x) m_k(x) = m(x), which is why a sample whose label was dropped keeps the target of its class."""
    refs, x = points_of_classes(), 2 * torch.randn(8, 2, dtype=F64)
    t = torch.linspace(0.1, 0.9, 8, dtype=F64)
    c = LinearPath().coefficients(t)
    away = [x.unsqueeze(1) - t[:, None, None] * points for points in refs]
    logits = [-part.square().sum(-1) / (2 * (1 - t[:, None]) ** 2) for part in away]
    whole = torch.cat(logits, 1).softmax(1)
    shares = torch.stack([part.sum(1) for part in whole.split([len(points) for points in refs], 1)])
    means = [posterior_mean_of_class(x, c, refs, torch.full((8,), k), None) for k in range(CLASSES)]
    mixed = sum(share.unsqueeze(1) * mean for share, mean in zip(shares, means, strict=True))
    torch.testing.assert_close(mixed, whole @ torch.cat(refs), rtol=1e-12, atol=1e-12)


def test_without_its_label_a_sample_still_teaches_the_marginal_velocity(backend: str) -> None:
    """The loss gains |shift|² where the marginal velocity of all classes is shifted: there is its minimum."""
    refs = points_of_classes()
    points, sizes = torch.cat(refs), torch.tensor([len(part) for part in refs])
    rows = torch.randint(len(points), (40_000,))
    labels = torch.arange(CLASSES).repeat_interleave(sizes)[rows]
    options = FlowOptions(stable_target=True, num_classes=CLASSES, label_dropout=1.0, times=UniformTimes(0.0, 0.9))
    shift = torch.tensor([0.3, -0.2], dtype=F64)

    def losses(extra: Tensor) -> Tensor:
        field: Any = lambda x, t, given: marginal_velocity(x, t, points) + extra  # noqa: E731
        return conditional_flow_matching_loss(field, points[rows], options, labels=labels, refs=refs, seed=1)

    gain = losses(shift) - losses(torch.zeros(2, dtype=F64))
    error = gain.std() / len(gain) ** 0.5
    assert abs(gain.mean() - shift.square().sum()) < 4 * error
    assert error < 0.1 * shift.square().sum()


def test_the_module_keeps_and_moves_the_points_of_classes(backend: str) -> None:
    refs, x, labels = points_of_classes(), torch.randn(16, 2, dtype=F64), torch.arange(16) % CLASSES
    module = FlowMatching(Network(), STABLE, refs=[points.float() for points in refs]).double()
    module.class_refs[0].points = refs[0]
    found, _ = module(x, labels=labels, seed=2)
    given = [refs[0], *(points.float().double() for points in refs[1:])]
    expected = conditional_flow_matching_loss(module.field, x, STABLE, labels=labels, refs=given, seed=2).mean()
    torch.testing.assert_close(found, expected)
    copied = copy.deepcopy(module)
    assert copied.class_refs[1].points is module.class_refs[1].points
    copied.load_state_dict(module.state_dict())
    assert not any("points" in name for name in module.state_dict())


@pytest.mark.parametrize(
    ("refs", "error", "text"),
    [
        (
            None,
            ValueError,
            "refs must be a list of 3 tensors with labels, the reference points of each class, got None",
        ),
        (torch.randn(5, 2), ValueError, "refs must be a list of 3 tensors .* got Tensor"),
        ([torch.randn(5, 2)] * 2, ValueError, "refs must be a list of 3 tensors .* got 2 of them"),
        ([torch.randn(5, 2), torch.randn(5, 3), torch.randn(5, 2)], ValueError, r"refs\[1\] must have shape \[M, \*ev"),
        ([torch.randn(5, 2), torch.randn(5, 2), torch.randn(0, 2)], ValueError, r"refs\[2\] must not be empty"),
        ([torch.randn(5, 2), torch.randn(5, 2), "points"], TypeError, r"refs\[2\] must be a torch.Tensor, got str"),
    ],
)
def test_reference_points_that_do_not_suit_labels_are_refused(refs: Any, error: type[Exception], text: str) -> None:
    x, labels = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    with pytest.raises(error, match=f"conditional_flow_matching_loss: {text}"):
        conditional_flow_matching_loss(lambda x, t, k: x, x, STABLE, labels=labels, refs=refs)


def test_the_newest_samples_have_no_classes() -> None:
    with pytest.raises(ValueError, match=r"FlowMatching: refs must be a list of 3 tensors with labels, .* got int"):
        FlowMatching(Network(), STABLE, refs=64)
    with pytest.raises(ValueError, match="FlowMatching: refs are those of the stable target"):
        FlowMatching(Network(), FlowOptions(num_classes=3), refs=points_of_classes())
    with pytest.raises(TypeError, match=r"conditional_flow_matching_loss: refs must be a torch.Tensor, got list"):
        conditional_flow_matching_loss(
            lambda x, t: x, torch.randn(4, 2), FlowOptions(stable_target=True), refs=points_of_classes(torch.float32)
        )


# ---------------------------------------------------------------- guidance


RATES = torch.tensor([0.5, -0.4, 0.1, 0.2], dtype=F64)  # the last is of no label


def linear(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """v(x, t, y) = rate of y times x, which carries x to x e^rate."""
    return RATES[labels].unsqueeze(1) * x


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_chunks_of_samples_keep_their_labels(scale: float) -> None:
    x, labels = torch.randn(10, 2, dtype=F64), torch.arange(10) % CLASSES
    rates = (RATES[3] + scale * (RATES[labels] - RATES[3])).unsqueeze(1)
    field, solver = GuidedField(linear, labels, scale, CLASSES), ODESolver("rk4", num_steps=40)
    end = x * rates.exp()
    for chunk_size in (None, 1, 4, 100):
        start, found = rectified_pairs(field, x, solver=solver, chunk_size=chunk_size)
        torch.testing.assert_close(found, end)
        assert torch.equal(start, x)
        torch.testing.assert_close(integrate_flow(field, x, solver=solver, chunk_size=chunk_size), end)
        times = torch.tensor([1.0, 0.5, 0.0], dtype=F64)
        back = integrate_flow(field, end, times=times, solver=solver, chunk_size=chunk_size)
        torch.testing.assert_close(back, torch.stack([end, x * (rates / 2).exp(), x]))


def test_chunks_of_a_field_with_one_label_or_none() -> None:
    x, solver = torch.randn(5, 2, dtype=F64), ODESolver("rk4", num_steps=40)
    found = integrate_flow(GuidedField(linear, 1, 1.0, CLASSES), x, solver=solver, chunk_size=2)
    torch.testing.assert_close(found, x * RATES[1].exp())
    torch.testing.assert_close(integrate_flow(lambda z, t: -z, x, solver=solver, chunk_size=2), x * math.exp(-1))
    with pytest.raises(ValueError, match="integrate_flow: chunk_size must be a positive integer, got 0"):
        integrate_flow(lambda z, t: -z, x, chunk_size=0)


@pytest.mark.parametrize("count", [9, 11])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_labels_must_be_as_many_as_samples_in_chunks_too(count: int, chunk_size: int | None) -> None:
    field, x = GuidedField(linear, torch.zeros(count, dtype=torch.int64), 1.0, CLASSES), torch.randn(10, 2, dtype=F64)
    text = rf"GuidedField: labels must be one number or one per sample of x, shape \[10\], got \[{count}\]"
    for sample in (integrate_flow, rectified_pairs):
        with pytest.raises(ValueError, match=text):
            sample(field, x, chunk_size=chunk_size)  # type: ignore[operator]
    with pytest.raises(ValueError, match=text):
        flow_log_likelihood(field, x)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_likelihood_given_a_label_per_sample(divergence: str) -> None:
    """x = e^r z with z standard normal: log p(x) = log N(x e^-r) - D r; every probe of signs is exact here."""
    x, labels = torch.randn(7, 2, dtype=F64), torch.tensor([0, 1, 2, 2, 1, 0, 1])
    field = GuidedField(linear, labels, 1.0, CLASSES)
    solver = ODESolver("dopri5", rtol=1e-9, atol=1e-9)
    found = flow_log_likelihood(field, x, divergence=divergence, solver=solver)
    rates = RATES[labels]
    start = x * (-rates).exp().unsqueeze(1)
    expected = -start.square().sum(1) / 2 - math.log(2 * math.pi) - 2 * rates
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    some = flow_log_likelihood(field.rows(slice(2, 5)), x[2:5], divergence=divergence, solver=solver)
    torch.testing.assert_close(some, expected[2:5], rtol=1e-7, atol=1e-7)
