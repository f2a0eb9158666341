"""What training takes and keeps: data, checkpoints of any module, compiled modules, devices, reference sets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fluxmatching import FluxMatching, Trainer, TrainingError, dsm_loss
from fluxmatching.training.average import MovingAverage
from tests.support.training import OPTIONS, ChangedLoss, assert_same, data, loss, model, trained


class Pairs(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 70

    def __getitem__(self, index: Any) -> Any:
        return data()[index], index


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        ([torch.zeros(2)] * 70, r"data must be a tensor \[samples, \*event\], or an object with .*; got list"),
        (
            torch.utils.data.Subset(torch.utils.data.TensorDataset(data()), range(70)),
            "Subset does not take a tensor of indices",
        ),
        (Pairs(), r"data have labels, which the loss must take .*; ChangedLoss does not"),
        (iter([1]), "got list_iterator"),
        (data().to_sparse(), r"data must be a dense tensor, got layout torch\.sparse_coo"),
        (data().to_mkldnn(), r"data must be a dense tensor, got layout torch\._mkldnn"),
        (torch.nested.nested_tensor([data(), data()]), "data must be a dense tensor, got a nested tensor"),
    ],
)
def test_data_that_cannot_be_used_is_named(samples: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Trainer(loss(), samples, OPTIONS)


class Indexed:
    """Data whose samples are found(indices)."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def __len__(self) -> int:
        return 70

    def __getitem__(self, indices: Any) -> Any:
        return self.found(indices)


@pytest.mark.parametrize(
    ("samples", "error", "text"),
    [
        (torch.tensor(1.0), ValueError, r"data must have shape \[samples, \*event\], got \[\]"),
        (data().to("meta"), ValueError, "data must have values, got a tensor on meta"),
        (Indexed(lambda k: data()[int(k)]), TypeError, "Indexed does not take a tensor of indices"),
        (Indexed(lambda k: data()[:5]), ValueError, r"Indexed returns shape \[5, 2\] for 2 indices"),
        (Indexed(lambda k: torch.ones(())), ValueError, r"Indexed returns shape \[\] for 2 indices"),
    ],
)
def test_data_without_samples_or_with_others_is_refused_at_once(
    samples: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Trainer(loss(), samples, OPTIONS)


def test_a_trainer_that_is_made_draws_no_random_numbers() -> None:
    samples = Indexed(lambda k: data()[k] + torch.rand(len(k), 1))
    torch.manual_seed(3)
    expected = torch.rand(())
    module = loss()
    torch.manual_seed(3)
    Trainer(module, samples, OPTIONS)
    assert torch.equal(torch.rand(()), expected)


def test_data_of_another_precision_than_the_network_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"field has parameters in torch\.float32, its input is torch\.float64; convert"
    ):
        Trainer(loss(), data().double(), OPTIONS).step()
    with pytest.raises(TypeError, match=r"field has parameters in torch\.float64, its input is torch\.float32"):
        dsm_loss(model().double(), data(), 0.7)
    both = Trainer(loss(), data(), replace(OPTIONS, precision="64-true"))
    both.run()
    assert both.average.module.field[0].weight.dtype == torch.float64


class Extra(nn.Module):
    """A module that keeps something of its own in checkpoints."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def loss_with(kept: Any) -> ChangedLoss:
    module = loss()
    module.extra = Extra(kept)
    return module


@pytest.mark.parametrize("kept", [{"scale": 0.5, "names": ["a", None]}, torch.ones(3), 7])
def test_what_a_module_keeps_is_resumed(kept: Any, tmp_path: Path) -> None:
    Trainer(loss_with(kept), data(), OPTIONS, folder=tmp_path).run()
    module = loss_with(None)
    Trainer(module, data(), OPTIONS, folder=tmp_path)
    assert str(module.extra.kept) == str(kept)


@pytest.mark.parametrize(
    "kept",
    [
        {"scale": np.float64(0.5)}, Path("x"), lambda: 0, [object()],
        {1, 2}, [{"a": {1}}], 1j, torch.float32, torch.device("cpu"), bytearray(b"a"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_again_is_refused_before_training(kept: Any, tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"'loss' cannot be kept in a checkpoint, .*convert what get_extra_state or stat"
    ):
        Trainer(loss_with(kept), data(), OPTIONS, folder=tmp_path)
    assert Trainer(loss_with(kept), data(), OPTIONS).iteration == 0  # without checkpoints there is nothing to keep


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(2), requires_grad=False)

    def get_extra_state(self) -> Any:
        return {"kept": self.kept}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["kept"]


def test_a_parameter_may_be_kept(tmp_path: Path) -> None:
    for iterations in (3, 6):
        module = loss()
        module.extra = Kept()
        Trainer(module, data(), replace(OPTIONS, iterations=iterations), folder=tmp_path).run()
    assert torch.equal(module.extra.seen, torch.zeros(2))


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = model(), nn.Linear(2, 2)

    def forward(self, z: Tensor) -> Tensor:
        return self.used(z)


def test_a_parameter_that_the_loss_does_not_use_is_resumed(tmp_path: Path) -> None:
    def module() -> FluxMatching:
        return FluxMatching(WithUnused(), 0.7)

    whole = Trainer(module(), data(), OPTIONS)
    whole.run()
    Trainer(module(), data(), OPTIONS, folder=tmp_path).run(seconds=0.0)
    resumed = Trainer(module(), data(), OPTIONS, folder=tmp_path)
    assert resumed.iteration == 1
    resumed.run()
    assert_same(whole, resumed)


@pytest.mark.parametrize("saved", [False, True])
def test_a_state_before_the_first_step_changes_nothing(saved: bool, tmp_path: Path) -> None:
    trainer = Trainer(loss(), data(), OPTIONS, folder=tmp_path)
    if saved:
        trainer.save()
        trainer = Trainer(loss(), data(), OPTIONS, folder=tmp_path)
    else:
        trainer.state_dict()
    trainer.run()
    assert_same(trainer, trained())


def test_parameters_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = Trainer(loss(), data(), OPTIONS, folder=tmp_path)
    trainer.step()
    trainer.save()
    trainer.step()
    nn.init.constant_(trainer.loss.field[0].bias, float("nan"))
    with pytest.raises(TrainingError, match=r"iteration 2: parameter field\.0\.bias is not finite; nothing is written"):
        trainer.save()
    assert Trainer(loss(), data(), OPTIONS, folder=tmp_path).iteration == 1


def test_a_type_that_turns_up_during_training_spoils_no_checkpoint(tmp_path: Path) -> None:
    module = loss_with(1.0)
    trainer = Trainer(module, data(), OPTIONS, folder=tmp_path)
    trainer.step()
    trainer.save()
    module.extra.kept = np.float64(2.0)
    with pytest.raises(TypeError, match="cannot be kept in a checkpoint"):
        trainer.save()
    module = loss_with(0.0)
    assert Trainer(module, data(), OPTIONS, folder=tmp_path).iteration == 1
    assert module.extra.kept == 1.0


def test_a_sound_file_with_a_refused_type_is_not_called_damaged(tmp_path: Path) -> None:
    trained(folder=tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(state | {"iteration": np.float64(12.0)}, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match=r"last\.pt is sound but holds a type that cannot be read safely: .*numpy"):
        Trainer(loss(), data(), OPTIONS, folder=tmp_path)


def test_compiled_and_uncompiled_resume_each_other(tmp_path: Path) -> None:
    def until(iterations: int, module: nn.Module) -> Trainer:
        trainer = Trainer(module, data(), replace(OPTIONS, iterations=iterations), folder=tmp_path)
        trainer.run()
        return trainer

    torch.compiler.reset()
    inside = loss().eval()  # a compiled field that draws random numbers is refused
    inside.field = torch.compile(inside.field, backend="eager")
    modules = (torch.compile(loss().eval(), backend="eager"), loss().eval(), inside, loss().eval())
    steps = [until(3 + 2 * k, module) for k, module in enumerate(modules)]
    # The same numbers, whatever is compiled: backend "eager" runs the same kernels.
    whole = Trainer(loss().eval(), data(), replace(OPTIONS, iterations=9))
    whole.run()
    assert_same(steps[-1], whole)
    torch.compiler.reset()


def test_the_default_device_decides_nothing(tmp_path: Path) -> None:
    module, samples = loss(), data()
    torch.set_default_device("meta")
    try:
        Trainer(module, samples, OPTIONS, folder=tmp_path).run()
        resumed = Trainer(module, samples, replace(OPTIONS, iterations=14), folder=tmp_path)
        resumed.run()
    finally:
        torch.set_default_device(None)
    assert_same(resumed, trained(replace(OPTIONS, iterations=14)))


def test_gradients_are_averaged_over_accumulated_minibatches() -> None:
    """Two minibatches per step: the loop one would write with the same minibatches and seeds."""
    seen: list[tuple[Tensor, Tensor]] = []

    def recorded(found: Any, x: Tensor, seed: Tensor) -> Any:
        seen.append((x, seed))
        return found

    options = replace(OPTIONS, accumulate=2, iterations=2, clip=None)
    trainer = Trainer(loss(recorded).eval(), data(), options)
    trainer.run()
    other = loss().eval()
    optimizer = torch.optim.AdamW(other.parameters(), lr=options.lr, weight_decay=0.0)
    for k in range(0, 4, 2):
        optimizer.zero_grad()
        for x, seed in seen[k : k + 2]:
            (other(x, seed=seed)[0] / 2).backward()
        optimizer.step()
    assert len({int(seed) for _, seed in seen}) == 4
    for p, q in zip(trainer.loss.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_reference_set_of_the_newest_samples_is_resumed(tmp_path: Path) -> None:
    def module() -> FluxMatching:
        return FluxMatching(model(), 0.7, refs=40)

    whole = Trainer(module(), data(), OPTIONS)
    whole.run()
    Trainer(module(), data(), OPTIONS, folder=tmp_path).run(seconds=0.0)
    resumed = Trainer(module(), data(), OPTIONS, folder=tmp_path)
    resumed.run()
    assert_same(whole, resumed)
    assert torch.equal(whole.loss.refs.newest, resumed.loss.refs.newest)
    assert not torch.equal(whole.loss.field[0].weight, trained().loss.field[0].weight)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions_of_the_engine_train(precision: str) -> None:
    trainer = trained(replace(OPTIONS, precision=precision))
    kind = torch.float64 if precision == "64-true" else torch.float32
    assert all(p.dtype == kind and p.isfinite().all() for p in trainer.loss.parameters())


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)])
def test_moving_average_is_that_of_pytorch(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Also where parameters differ in dtype, one is frozen and one is shared."""
    net = torch.nn.ModuleList([torch.nn.Linear(3, 3, dtype=dtype) for dtype in dtypes])
    net[0].bias.requires_grad_(False)
    net.append(net[0])
    net.register_buffer("kept", torch.zeros(2))
    ours, theirs = MovingAverage(net, 0.9), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(3):
        with torch.no_grad():
            for tensor in (*net.parameters(), *net.buffers()):
                tensor.add_(torch.randn_like(tensor))
        for average in (ours, theirs):
            average.update_parameters(net)
        assert int(ours.n_averaged) == step + 1
        for got, expected in zip(ours.module.state_dict().values(), theirs.module.state_dict().values(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
