"""Shapes and graphs of ops and losses: fake tensors, tensors on meta, and `make_fx` in all of its modes.

No value can be read there. A graph must also hold for other values than those that it was traced with, so each one runs
on data that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fluxkernels as fk
from fluxmatching import (
    DenoisingScoreMatching,
    DSMOptions,
    DualFluxMatching,
    FlowMatching,
    FlowOptions,
    FluxMatching,
    FluxOptions,
    LearnedHorizon,
    LinearFeatures,
    LogUniformNoise,
    LossNormalizer,
    NoiseAnnealedFluxMatching,
    QuadraticFeatures,
    UniformTimes,
    VariancePreservingPath,
    VFluxMatching,
    augmentation_loss,
    autocorrelation_loss,
    conditional_flow_matching_loss,
    dsm_loss,
    dual_flux_loss,
    edm_heun,
    exponential_schedule,
    flow_log_likelihood,
    flux_matching_loss,
    integrate_flow,
    karras_schedule,
    log_likelihood,
    mixing_loss,
    noise_annealed_flux_loss,
    predictor_corrector,
    probability_flow,
    quadratic_flux_loss,
    reverse_ve,
    step_defect_loss,
    unadjusted_langevin,
    v_flux_loss,
)
from fluxmatching.losses.draws import Draws
from fluxmatching.velocity import SplicingField, splicing_loss
from tests.support.ops import OPS, Op, noises, tensors, with_leaves

Call = Callable[..., list[Tensor]]
# Parameters of a network that a function refers to are real tensors in a graph of fake ones.
MODES: dict[str, dict[str, Any]] = {
    "real": {"tracing_mode": "real"},
    "fake": {"tracing_mode": "fake", "_allow_non_fake_inputs": True},
    "symbolic": {"tracing_mode": "symbolic", "_allow_non_fake_inputs": True},
}


def copies(values: list[Tensor], convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [convert(value).detach().requires_grad_(value.requires_grad) for value in values]


def layout(results: list[Tensor]) -> list[Any]:
    return [(list(result.shape), result.dtype) for result in results]


def assert_graph(call: Call, values: list[Tensor], others: list[Tensor], mode: str) -> None:
    """Trace with values, run the graph on others, and compare with the eager result."""
    graph = make_fx(call, **MODES[mode])(*values)
    torch.testing.assert_close(list(graph(*others)), call(*others))


def inputs_of_ops(D: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (0.7 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    def positive(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.4).requires_grad_()

    names = {"x": (5, D), "xt": (4, D), "refs": (7, D), "field": (5, D), "values": (4, 2)}
    numbers = {"per_group": (), "per_query": (5,), "tau": (), "h": ()}
    inputs = {
        **{name: normal(2, *shape) for name, shape in names.items()},
        **{name: positive(2, *shape) for name, shape in numbers.items()},
        **noises(normal(5, 2, 5, D).detach()),
        "seed": torch.tensor(seed),
    }
    return with_leaves(inputs)


@dataclass(frozen=True)
class OpCall:
    """An op as a function of tensors: its arguments, then its noise or a seed."""

    op: Op
    seeded: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.op.arguments.values(), "seed") if self.seeded else self.op.differentiable

    def values(self, D: int, seed: int) -> list[Tensor]:
        inputs = inputs_of_ops(D, seed)
        return [inputs[name] for name in self.names]

    def results(self, *values: Tensor) -> list[Tensor]:
        inputs = dict(zip(self.names, values, strict=True))
        return list(tensors(self.op.call(inputs, **({"seed": inputs["seed"]} if self.seeded else {})), values[0]))

    def total(self, *values: Tensor) -> Tensor:
        return sum((result.square().sum() for result in self.results(*values)), values[0].new_zeros(()))

    def with_gradients(self, *values: Tensor) -> list[Tensor]:
        leaves = [value for value in values if value.requires_grad]
        gradients = torch.autograd.grad(self.total(*values), leaves, materialize_grads=True)
        return [*self.results(*values), *gradients]


CALLS = {op.name: OpCall(op) for op in OPS}
CALLS |= {f"{op.name} of a seed": OpCall(op, seeded=True) for op in OPS if op.noise}


# Few dimensions, and more than distances are formed in directly.
@pytest.mark.parametrize("D", [3, 20])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_shapes_of_ops(call: OpCall, D: int) -> None:
    values = call.values(D, 1)
    expected = layout(call.with_gradients(*values))
    with FakeTensorMode() as mode:
        assert layout(call.with_gradients(*copies(values, mode.from_tensor))) == expected
    on_meta = call.with_gradients(*copies(values, lambda value: value.to("meta")))
    assert layout(on_meta) == expected
    assert all(result.is_meta for result in on_meta)


@pytest.mark.parametrize(("D", "mode"), [(3, "fake"), (20, "real"), (20, "symbolic")])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_graphs_of_ops(call: OpCall, D: int, mode: str) -> None:
    assert_graph(call.with_gradients, call.values(D, 1), call.values(D, 2), mode)


PRE_DISPATCH = r"takes derivatives, which a graph with pre_dispatch=True cannot hold"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_graphs_of_ops_before_dispatch(call: OpCall, backend: str) -> None:
    first, second = call.values(3, 1), call.values(3, 2)
    graph = make_fx(call.results, pre_dispatch=True)(*first)
    torch.testing.assert_close(list(graph(*second)), call.results(*second))
    if not call.op.twice_differentiable:  # its derivatives are those of plain PyTorch
        with pytest.raises(RuntimeError, match=PRE_DISPATCH):
            make_fx(call.with_gradients, pre_dispatch=True)(*first)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_compiled_derivatives_of_many_dimensions(call: OpCall) -> None:
    values = call.values(20, 1)
    leaves = [value for value in values if value.requires_grad]
    torch.compiler.reset()
    compiled = torch.compile(call.total, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*values), leaves, materialize_grads=True)
    torch.testing.assert_close(got, torch.autograd.grad(call.total(*values), leaves, materialize_grads=True))


class Learned(nn.Module):
    """Everything that is learned in the losses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        self.normalizer, self.horizon, self.genes = LossNormalizer(8), LearnedHorizon(8), SplicingField(3)

    def noisy(self, z: Tensor, sigma: Tensor) -> Tensor:
        return self.net(z) / sigma

    def flow(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = t if labels is None else t + labels
        return self.net(x) * (1 + shift.reshape(-1, 1))


Loss = Callable[[Learned, Tensor, Tensor], Tensor]


def flux(**options: Any) -> Loss:
    return lambda learned, x, seed: flux_matching_loss(learned.net, x, 0.5, FluxOptions(**options), seed=seed)


def annealed(**options: Any) -> Loss:
    return lambda learned, x, seed: noise_annealed_flux_loss(
        learned.noisy,
        x,
        x.new_tensor(0.5),
        learned.normalizer,
        FluxOptions(horizon=learned.horizon, **options),
        seed=seed,
    )


def flux_of_draws(learned: Learned, x: Tensor, seed: Tensor) -> Tensor:
    signs = torch.ones_like(x)
    draws = Draws(start=x.roll(1), chain=x.roll(2).expand(3, *x.shape), probe=signs, tau=x.new_full((), 0.7))
    return flux_matching_loss(learned.net, x, 0.5, draws=draws, refs=x[:5])


def splicing(learned: Learned, x: Tensor, seed: Tensor) -> Tensor:
    return splicing_loss(learned.genes, x.unsqueeze(-1).expand(*x.shape, 2).clone(), 0.5, seed=seed)


def flow(**options: Any) -> Loss:
    return lambda learned, x, seed: conditional_flow_matching_loss(learned.flow, x, FlowOptions(**options), seed=seed)


def flow_of_classes(learned: Learned, x: Tensor, seed: Tensor) -> Tensor:
    labels = torch.arange(len(x), device=x.device) % 2
    options = FlowOptions(num_classes=2, stable_target=True)
    return conditional_flow_matching_loss(
        learned.flow, x, options, labels=labels, refs=[x[:3].clone(), x[3:].clone()], seed=seed
    )


def v_flux(strata: int = 1, **options: Any) -> Loss:
    def loss(learned: Learned, x: Tensor, seed: Tensor) -> Tensor:
        t = torch.linspace(0.3, 0.6, strata, dtype=x.dtype, device=x.device)
        chosen = FluxOptions(strata=strata, **options)
        return v_flux_loss(learned.flow, x, t if strata > 1 else 0.3, options=chosen, seed=seed)

    return loss


FEATURES = [LinearFeatures(), QuadraticFeatures()]
LOSSES: dict[str, Loss] = {
    **{
        f"flux {method} {divergence}": flux(second_derivatives=method, divergence=divergence)
        for method in ("double_backward", "forward_over_reverse", "finite_difference")
        for divergence in ("hutchinson", "exact")
    },
    "flux of single chains, in chunks": flux(estimator="single_chain", chunk_size=3),
    "flux of a fraction": flux(endpoint_fraction=0.5),
    "flux of draws": flux_of_draws,
    "flux of some draws": lambda learned, x, seed: flux_matching_loss(
        learned.net, x, 0.5, draws=Draws(start=x.roll(1)), seed=seed
    ),
    "annealed": annealed(),
    "annealed double_backward": annealed(second_derivatives="double_backward"),
    "dsm": lambda learned, x, seed: dsm_loss(learned.net, x, 0.5, seed=seed),
    "dsm of single samples": lambda learned, x, seed: dsm_loss(
        learned.net, x, 0.5, DSMOptions(form="x0", stable=False), seed=seed
    ),
    "splicing": splicing,
    "flow": flow(),
    "flow, noise of a variance-preserving path": flow(
        path=VariancePreservingPath(), prediction="noise", error="velocity", times=UniformTimes(0.1, 0.9)
    ),
    "flow, stable target": flow(stable_target=True),
    "flow of classes": flow_of_classes,
    "v-flux": v_flux(),
    "v-flux double_backward": v_flux(second_derivatives="double_backward"),
    "v-flux of two times": v_flux(strata=2),
    "dual flux": lambda learned, x, seed: dual_flux_loss(learned.net, x, FEATURES),
    "dual flux of halves of refs": lambda learned, x, seed: dual_flux_loss(learned.net, x[:5], FEATURES, refs=x),
    "quadratic flux": lambda learned, x, seed: quadratic_flux_loss(learned.net, x, ridge=0.1),
    "autocorrelation": lambda learned, x, seed: autocorrelation_loss(learned.net, x, QuadraticFeatures()),
    "step defect": lambda learned, x, seed: step_defect_loss(learned.net, x, 0.1),
    "augmentation": lambda learned, x, seed: augmentation_loss(learned.net, x, 0.5, seed=seed),
}


# Losses that take no derivative themselves.
WITHOUT_DERIVATIVES = ("dsm", "splicing", "flow", "dual", "quadratic", "autocorrelation", "step")


def with_gradients(loss: Loss, learned: Learned) -> Call:
    def call(x: Tensor, seed: Tensor) -> list[Tensor]:
        value = loss(learned, x, seed)
        return [value, *torch.autograd.grad(value.sum(), list(learned.parameters()), materialize_grads=True)]

    return call


def samples(count: int = 8) -> Tensor:
    return torch.randn(count, 3)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_of_losses(name: str) -> None:
    expected = layout(with_gradients(LOSSES[name], Learned())(samples(), torch.tensor(3)))
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            call, x, seed = with_gradients(LOSSES[name], Learned()), samples(), torch.tensor(3)
        with mode if isinstance(mode, FakeTensorMode) else nullcontext():
            found = call(x, seed)
        assert layout(found) == expected
        assert {result.device for result in found} == {x.device}


class Noisy(nn.Module):
    """Network of z and σ."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        return self.net(z) / sigma.reshape(-1, 1)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "FluxMatching": lambda: FluxMatching(nn.Linear(3, 3), 0.5),
    "NoiseAnnealedFluxMatching": lambda: NoiseAnnealedFluxMatching(
        Noisy(), options=FluxOptions(horizon=LearnedHorizon(8))
    ),
    "DualFluxMatching": lambda: DualFluxMatching(nn.Linear(3, 3), FEATURES),
    "DenoisingScoreMatching": lambda: DenoisingScoreMatching(Noisy(), LogUniformNoise()),
    "DenoisingScoreMatching, one level": lambda: DenoisingScoreMatching(nn.Linear(3, 3), 0.5),
    "FlowMatching": lambda: FlowMatching(Noisy(), FlowOptions(times=UniformTimes(0.1, 1.0))),
    "FlowMatching, stable target": lambda: FlowMatching(
        Noisy(), FlowOptions(stable_target=True, times=UniformTimes(0.1, 0.9))
    ),
    "VFluxMatching": lambda: VFluxMatching(Noisy(), times=UniformTimes(0.2, 0.8)),
    "VFluxMatching, learned": lambda: VFluxMatching(
        Noisy(),
        options=FluxOptions(horizon=LearnedHorizon(8)),
        times=UniformTimes(0.2, 0.8),
        normalizer=LossNormalizer(8),
    ),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_shapes_of_loss_modules(make: Callable[[], nn.Module]) -> None:
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            module, x = make(), samples()
            loss, logged = module(x)
            loss.backward()
        assert {value.device for value in (loss, *logged.values())} == {x.device}
        assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


@pytest.fixture
def no_copied_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse tensors made of numbers anywhere but on the CPU: on a GPU the host waits for the copy."""
    for name in ("tensor", "as_tensor"):
        make = getattr(torch, name)

        def checked(data: Any, *args: Any, make: Any = make, device: Any = None, **options: Any) -> Tensor:
            if not isinstance(data, Tensor):
                assert torch.device(device or "cpu").type == "cpu", f"{data} is copied to {device}"
            return make(data, *args, device=device, **options)

        monkeypatch.setattr(torch, name, checked)


@pytest.mark.usefixtures("no_copied_numbers")
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_no_loss_module_copies_a_number_to_its_device(make: Callable[[], nn.Module]) -> None:
    module, seed = make().to("meta"), torch.zeros((), dtype=torch.int64, device="meta")
    module(samples().to("meta"), seed=seed)[0].backward()


@pytest.mark.usefixtures("no_copied_numbers")
@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_copies_a_number_to_its_device(name: str) -> None:
    learned, seed = Learned().to("meta"), torch.zeros((), dtype=torch.int64, device="meta")
    LOSSES[name](learned, samples().to("meta"), seed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_graphs_of_loss_modules(make: Callable[[], nn.Module], mode: str) -> None:
    module = make()

    def call(x: Tensor, seed: Tensor) -> list[Tensor]:
        loss, logged = module(x, seed=seed)
        return [loss, *logged.values(), *torch.autograd.grad(loss, list(module.parameters()))]

    assert_graph(call, [samples(), torch.tensor(3)], [samples(), torch.tensor(4)], mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_graphs_of_losses(name: str, mode: str) -> None:
    call = with_gradients(LOSSES[name], Learned())
    first, second = ([samples(), torch.tensor(seed)] for seed in (3, 4))
    assert_graph(call, first, second, mode)


@pytest.mark.parametrize("name", LOSSES)
def test_graphs_before_dispatch_hold_no_derivatives(name: str) -> None:
    """PyTorch would store values in the graph, in place of results that a derivative needs."""
    learned, (x, y) = Learned(), (samples(), samples())
    trace = make_fx(lambda x: LOSSES[name](learned, x, torch.tensor(3)), pre_dispatch=True)
    if name.startswith(
        ("dsm", "splicing", "flow", "dual", "quadratic", "autocorrelation", "step")
    ):  # losses that take no derivative themselves
        torch.testing.assert_close(trace(x)(y), LOSSES[name](learned, y, torch.tensor(3)))
    else:
        with pytest.raises(RuntimeError, match=PRE_DISPATCH):
            trace(x)


@pytest.mark.parametrize("name", ["flux double_backward hutchinson", "flux finite_difference hutchinson", "dsm"])
def test_a_symbolic_graph_takes_any_number_of_samples(name: str) -> None:
    learned = Learned()
    graph = make_fx(lambda x, seed: LOSSES[name](learned, x, seed), **MODES["symbolic"])(samples(7), torch.tensor(3))
    x, seed = samples(11), torch.tensor(4)
    torch.testing.assert_close(graph(x, seed), LOSSES[name](learned, x, seed))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_graph_draws_new_numbers_in_every_run(mode: str) -> None:
    net, x = Learned().net, samples()
    for loss in (flux_matching_loss, dsm_loss):
        graph = make_fx(partial(loss, net, sigma=0.5), **MODES[mode])(x)
        assert not torch.equal(graph(x), graph(x))
        torch.manual_seed(5)
        expected = loss(net, x, 0.5)
        torch.manual_seed(5)
        torch.testing.assert_close(graph(x), expected)


def test_a_network_with_dropout_has_shapes() -> None:
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        for method in ("double_backward", "finite_difference"):
            assert flux_matching_loss(net, samples(), 0.5, FluxOptions(second_derivatives=method)).shape == (8,)


def test_values_are_checked_again_after_tracing() -> None:
    bad = torch.full((4, 2), torch.nan)
    graph = make_fx(lambda x: fk.kde_mean(x, x, 0.5))(bad)
    assert graph(bad).isnan().all()
    with pytest.raises(ValueError, match="x must be finite"):
        fk.kde_mean(bad, bad, 0.5)


def test_jit_trace() -> None:
    x = samples()
    traced = torch.jit.trace(lambda x: fk.kde_score(x, x, 0.5), torch.full_like(x, torch.nan), check_trace=False)
    torch.testing.assert_close(traced(x), fk.kde_score(x, x, 0.5))


def field(z: Tensor, sigma: Tensor) -> Tensor:
    return -z / (1 + sigma.square())


def without_values() -> Iterator[tuple[str, Callable[[Callable[[Tensor], Any]], Any]]]:
    """Yield ways to run a function of samples without values."""

    def fake(function: Callable[[Tensor], Any]) -> Any:
        with FakeTensorMode():
            return function(samples())

    yield "fake", fake
    yield "meta", lambda function: function(samples().to("meta"))
    for mode in ("real", "symbolic"):
        yield f"graph, {mode}", lambda function, mode=mode: make_fx(function, **MODES[mode])(samples())  # type: ignore[misc]


WAYS = pytest.mark.parametrize("run", [run for _, run in without_values()], ids=[name for name, _ in without_values()])


@WAYS
@pytest.mark.parametrize("sampler", [reverse_ve, predictor_corrector, edm_heun])
def test_samplers_of_a_schedule_need_no_values(run: Any, sampler: Any) -> None:
    for schedule in (exponential_schedule(4), karras_schedule(4)):
        run(partial(sampler, field, sigmas=schedule))


@WAYS
def test_langevin_dynamics_need_no_values(run: Any) -> None:
    run(lambda x: unadjusted_langevin(lambda z: -z, x, step_size=0.1, num_steps=2))


@WAYS
def test_what_depends_on_values_is_refused(run: Any) -> None:
    pytest.importorskip("geomloss")
    pytest.importorskip("torchdiffeq")
    with pytest.raises(RuntimeError, match="sinkhorn_divergence: x and y must have values"):
        run(lambda x: mixing_loss(field, x, 0.5))
    with pytest.raises(RuntimeError, match=r"probability_flow: x must have values, .* edm_heun takes fixed steps"):
        run(lambda x: probability_flow(field, x))
    with pytest.raises(RuntimeError, match="log_likelihood: x must have values"):
        run(lambda x: log_likelihood(field, x))
    with pytest.raises(RuntimeError, match="integrate_flow: x must have values"):
        run(lambda x: integrate_flow(lambda z, t: -z, x))
    with pytest.raises(RuntimeError, match="flow_log_likelihood: x must have values"):
        run(lambda x: flow_log_likelihood(lambda z, t: -z, x))
    with pytest.raises(RuntimeError, match="edm_heun: sigmas must have values"):
        run(lambda x: edm_heun(field, x, x[:, 0].double()))
