"""The default device of PyTorch decides nothing: every tensor that the library makes is on the device of the data."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fluxkernels import philox
from fluxkernels.backend import implementation
from fluxmatching import (
    DenoisingScoreMatching,
    DSMOptions,
    DualFluxMatching,
    EDMField,
    ExactCoupling,
    FlowMatching,
    FlowOptions,
    FluxMatching,
    FluxOptions,
    GuidedField,
    IndependentCoupling,
    LearnedHorizon,
    LinearFeatures,
    LinearPath,
    LogitNormalTimes,
    LogNormalNoise,
    LogUniformNoise,
    LossNormalizer,
    NoiseAnnealedFluxMatching,
    ODESolver,
    QuadraticFeatures,
    SDEOptions,
    SinkhornCoupling,
    TruncatedExponentialHorizon,
    UniformTimes,
    VariancePreservingPath,
    VFluxMatching,
    augmentation_loss,
    autocorrelation_loss,
    conditional_flow_matching_loss,
    couple,
    dsm_loss,
    edm_heun,
    exponential_schedule,
    field_from_denoiser,
    flow_log_likelihood,
    flux_matching_loss,
    integrate_flow,
    karras_schedule,
    log_likelihood,
    marginal_velocity,
    mixing_loss,
    noise_annealed_flux_loss,
    predictor_corrector,
    probability_flow,
    rectified_pairs,
    reverse_ve,
    step_defect_loss,
    stochastic_flow,
    straightness,
    unadjusted_langevin,
    v_flux_loss,
)
from fluxmatching.losses.draws import Draws
from fluxmatching.velocity import SplicingField, VelocityOptions, flux_velocity, splicing_loss
from tests.support.ops import OPS, noises, tensors, with_leaves

Call = Callable[[], Any]


@contextmanager
def default_device(device: str) -> Iterator[None]:
    """Set the default device inside of the block, as a program does at its start."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def same_under_any_default_device(call: Call) -> None:
    """Call twice with the same random numbers, and compare values and gradients exactly."""
    torch.manual_seed(3)
    expected = call()
    torch.manual_seed(3)
    # Tensors without data, which fail where a result depends on them.
    with default_device("meta"):
        got = call()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


X = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
ONE = torch.ones(())


class Net(nn.Module):
    """Network of z and, if given, σ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))

    def forward(self, z: Tensor, sigma: Tensor = ONE) -> Tensor:
        return self.layers(z) / (1 + sigma.square().reshape(-1, 1))


NET = Net()


def with_gradient(loss: Callable[[], Tensor], *modules: nn.Module) -> Call:
    """Return the loss, and its derivatives in the parameters of the modules."""

    def call() -> tuple[Tensor, ...]:
        value = loss()
        parameters = [p for module in modules for p in module.parameters()]
        return value.detach(), *torch.autograd.grad(value.sum(), parameters, materialize_grads=True)

    return call


def inputs_of_ops(groups: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    def positive(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.4).requires_grad_()

    names = {"x": (5, 3), "xt": (4, 3), "refs": (7, 3), "field": (5, 3), "values": (4, 2)}
    numbers = {"per_group": (), "per_query": (5,), "tau": (), "h": ()}
    inputs = {
        **{name: normal(*groups, *shape) for name, shape in names.items()},
        **{name: positive(*groups, *shape) for name, shape in numbers.items()},
        **noises(normal(5, *groups, 5, 3)),
    }
    return with_leaves(inputs)


@pytest.mark.parametrize("groups", [(), (2,)], ids=["one group", "groups"])
@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_ops(op: Any, groups: tuple[int, ...], backend: str) -> None:
    inputs = inputs_of_ops(groups)
    random: list[dict[str, Any]] = [{}, {"seed": 5}, {"seed": None, "noise": None}] if op.noise else [{}]

    def call() -> list[Tensor]:
        found = []
        for options in random:
            results = tensors(op.call(inputs, **options), inputs["x"])
            leaves = [inputs[name] for name in op.differentiable]
            total = sum((result.square().sum() for result in results), torch.zeros((), device="cpu"))
            found += [*results, *torch.autograd.grad(total, leaves, materialize_grads=True)]
        # Numbers in place of tensors.
        numbers = {"per_group": 0.3, "per_query": 0.3, "tau": 1.0, "h": 0.2}
        return found + list(tensors(op.call(inputs | numbers), inputs["x"]))

    same_under_any_default_device(call)


def test_random_numbers_of_a_backend(backend: str) -> None:
    """Below the ops, whose implementations PyTorch runs without a default device."""
    seed = torch.tensor(3)
    normal = implementation(backend).normal
    same_under_any_default_device(lambda: normal(seed, (2, 5), philox.CHAIN, torch.float32))


HORIZON = TruncatedExponentialHorizon(2.0)


def flux(sigma: float | Tensor = 0.5, *, given: dict[str, Any] | None = None, **options: Any) -> Call:
    return with_gradient(lambda: flux_matching_loss(NET, X, sigma, FluxOptions(**options), **(given or {})), NET)


def dsm(**options: Any) -> Call:
    return with_gradient(lambda: dsm_loss(NET, X, 0.5, DSMOptions(**options)), NET)


def flow(*, given: dict[str, Any] | None = None, **options: Any) -> Call:
    return with_gradient(lambda: conditional_flow_matching_loss(NET, X, FlowOptions(**options), **(given or {})), NET)


def labeled(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Velocity that depends on the label."""
    return NET(x, t) * (1 + labels.reshape(-1, 1))


LABELS = torch.arange(8) % 2
STABLE = FlowOptions(stable_target=True, num_classes=2)


def flow_of_classes(**given: Any) -> Tensor:
    return conditional_flow_matching_loss(labeled, X, STABLE, labels=LABELS, refs=[X[:3], X[3:]], **given)


TIMES = torch.tensor([0.3, 0.6])
LOSSES: dict[str, Call] = {
    **{
        f"flux {method} {divergence}": flux(second_derivatives=method, divergence=divergence)
        for method in ("double_backward", "forward_over_reverse", "finite_difference")
        for divergence in ("hutchinson", "exact")
    },
    "flux of a seed": flux(given={"seed": 3}),
    "flux of a tensor": flux(torch.tensor(0.5), given={"seed": torch.tensor(3)}),
    "flux of chunks and a fraction": flux(chunk_size=3, endpoint_fraction=0.5),
    "flux of a seed and a fraction": flux(endpoint_fraction=0.5, given={"seed": 3}),
    "flux of single chains": flux(estimator="single_chain", horizon=HORIZON),
    "flux of draws": flux(given={"draws": Draws.from_seed(3, X, HORIZON), "refs": X[:5]}),
    "flux of some draws": flux(given={"draws": Draws(start=X)}),
    "dsm": dsm(),
    "dsm of single samples": dsm(form="x0", stable=False),
    "flow": flow(),
    "flow of a seed and a time": flow(given={"seed": 3, "t": 0.5}),
    "flow between data": flow(given={"x0": X.flip(0), "t": torch.tensor(0.5)}),
    "flow, noise of a variance-preserving path": flow(
        path=VariancePreservingPath(), prediction="noise", error="denoiser", times=UniformTimes(0.1, 0.9)
    ),
    "flow, stable target": flow(stable_target=True, times=LogitNormalTimes()),
    "flow of classes": with_gradient(flow_of_classes, NET),
    "flow of classes, of a seed": with_gradient(partial(flow_of_classes, seed=3), NET),
    "v-flux": with_gradient(lambda: v_flux_loss(NET, X, 0.5), NET),
    "v-flux of a seed and two times": with_gradient(
        lambda: v_flux_loss(NET, X, TIMES, options=FluxOptions(strata=2), seed=3), NET
    ),
    "augmentation": with_gradient(lambda: augmentation_loss(NET, X, 0.5), NET),
    "autocorrelation": with_gradient(lambda: autocorrelation_loss(NET, X, QuadraticFeatures()), NET),
    "step defect": with_gradient(lambda: step_defect_loss(NET, X, 0.1), NET),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, backend: str) -> None:
    same_under_any_default_device(LOSSES[name])


def test_loss_with_all_that_is_learned(backend: str) -> None:
    normalizer, horizon = LossNormalizer(8), LearnedHorizon(8)
    loss = lambda: noise_annealed_flux_loss(NET, X, 0.5, normalizer, FluxOptions(horizon=horizon))  # noqa: E731
    same_under_any_default_device(with_gradient(loss, NET, normalizer, horizon))


def test_loss_modules(backend: str) -> None:
    modules = (
        FluxMatching(Net(), torch.tensor(0.5)),
        DualFluxMatching(nn.Linear(3, 3), [LinearFeatures(), QuadraticFeatures()]),
        NoiseAnnealedFluxMatching(Net(), options=FluxOptions(horizon=LearnedHorizon(8))),
        DenoisingScoreMatching(Net(), LogUniformNoise()),
        DenoisingScoreMatching(Net(), 0.5, refs=X.repeat(2, 1)),
        FlowMatching(Net(), source=X.repeat(2, 1), coupling=SinkhornCoupling()),
        FlowMatching(Net(), FlowOptions(stable_target=True), refs=X.repeat(2, 1)),
        VFluxMatching(Net(), options=FluxOptions(horizon=LearnedHorizon(8)), normalizer=LossNormalizer(8)),
    )
    for module in modules:
        for seed in (None, 4):
            same_under_any_default_device(with_gradient(partial(_loss, module, seed), module))


def _loss(module: nn.Module, seed: int | None) -> Tensor:
    loss: Tensor = module(X, seed=seed)[0]
    return loss


def test_splicing_loss(backend: str) -> None:
    genes, cells = SplicingField(4), torch.rand(6, 4, 2)
    same_under_any_default_device(with_gradient(lambda: splicing_loss(genes, cells, 0.3, seed=1), genes))


@pytest.mark.parametrize("seed", [None, 7])
def test_mixing_loss(seed: int | None) -> None:
    pytest.importorskip("geomloss")
    same_under_any_default_device(with_gradient(lambda: mixing_loss(NET, X, 0.5, seed=seed), NET))


FIELDS: dict[str, Any] = {
    "function": lambda z, s: -z / (1 + s**2),
    "network": EDMField(Net()).eval(),
    "denoiser": field_from_denoiser(lambda z, s: z / (1 + s.square())),
}


@pytest.mark.parametrize("schedule", [exponential_schedule, karras_schedule])
@pytest.mark.parametrize("sampler", [reverse_ve, predictor_corrector, edm_heun])
@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_samplers_of_a_schedule(field: Any, sampler: Any, schedule: Any) -> None:
    same_under_any_default_device(lambda: sampler(field, X, schedule(4)))


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_samplers(field: Any) -> None:
    generator = torch.Generator()
    same_under_any_default_device(
        lambda: reverse_ve(field, X, exponential_schedule(4), generator=generator.manual_seed(1))
    )
    same_under_any_default_device(lambda: unadjusted_langevin(lambda z: field(z, ONE), X, step_size=0.1, num_steps=3))


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_adaptive_solver_and_likelihood(field: Any) -> None:
    pytest.importorskip("torchdiffeq")
    options: dict[str, Any] = {"sigma_min": 0.5, "sigma_max": 3.0, "solver": ODESolver(rtol=1e-3, atol=1e-3)}
    same_under_any_default_device(lambda: probability_flow(field, X, **options))
    for divergence in ("hutchinson", "exact"):
        same_under_any_default_device(partial(log_likelihood, field, X, divergence=divergence, **options))


def test_flows() -> None:
    pytest.importorskip("torchdiffeq")
    guided = GuidedField(labeled, LABELS, 2.0, num_classes=2)
    solver, generator = ODESolver("heun", num_steps=3), torch.Generator()
    times = torch.linspace(0, 1, 4)
    for field in (Net().eval(), guided):
        same_under_any_default_device(partial(integrate_flow, field, X))
        same_under_any_default_device(partial(rectified_pairs, field, X, solver=solver, chunk_size=3))
        same_under_any_default_device(partial(integrate_flow, field, X, times=times, solver=solver, chunk_size=3))
        same_under_any_default_device(partial(stochastic_flow, field, X, LinearPath(), SDEOptions(0.5, 3)))
        for divergence in ("hutchinson", "exact"):
            same_under_any_default_device(partial(flow_log_likelihood, field, X, divergence=divergence, solver=solver))
    same_under_any_default_device(
        lambda: flow_log_likelihood(guided, X, generator=generator.manual_seed(1), solver=solver)
    )
    same_under_any_default_device(lambda: GuidedField(labeled, 1, 2.0, num_classes=2)(X, 0.5))
    same_under_any_default_device(lambda: straightness(torch.stack([X, X + 1, 2 * X, X]), times))


def test_closed_forms_and_couplings(backend: str) -> None:
    same_under_any_default_device(lambda: marginal_velocity(X, 0.5, X[:5]))
    for coupling in (ExactCoupling(), IndependentCoupling(), SinkhornCoupling()):
        for seed in (None, 3):
            same_under_any_default_device(partial(couple, coupling, X[:5], X.flip(0), seed=seed))


FIRST_USE = """
import torch
torch.set_default_device("meta")
from fluxmatching import probability_flow
x = torch.ones(2, 3, device="cpu")
end = probability_flow(lambda z, s: -z / (1 + s**2), x, sigma_min=0.5, sigma_max=3.0)
torch.set_default_device("cpu")
torch.testing.assert_close(end, probability_flow(lambda z, s: -z / (1 + s**2), x, sigma_min=0.5, sigma_max=3.0))
"""


def test_the_first_use_of_a_solver_leaves_nothing_on_the_default_device() -> None:
    """torchdiffeq makes its constants when it is imported."""
    pytest.importorskip("torchdiffeq")
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True)


@pytest.mark.parametrize("noise", [LogNormalNoise(), LogUniformNoise()])
def test_noise_levels_are_drawn_where_the_caller_wants_them(noise: Any) -> None:
    same_under_any_default_device(lambda: noise.sample((5,)))
    same_under_any_default_device(lambda: noise.sample((5,), generator=torch.Generator().manual_seed(1)))
    with default_device("meta"):
        assert noise.sample().device.type == "cpu"
    assert noise.sample((2,), device="meta").device.type == "meta"


def test_velocity_fit() -> None:
    anndata = pytest.importorskip("anndata")
    generator = np.random.default_rng(1)
    layers = {key: generator.uniform(0.1, 2, (20, 4)).astype(np.float32) for key in ("Mu", "Ms")}

    def call() -> dict[str, Tensor]:
        adata = anndata.AnnData(np.zeros((20, 4), dtype=np.float32), layers=layers)
        options = VelocityOptions.from_preset("circulating", iterations=3, batch_size=8, progress=False, device="cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            flux_velocity(adata, "per_gene", options=options)
        return {name: torch.from_numpy(adata.layers[name]) for name in ("velocity", "velocity_u", "velocity_alpha")}

    same_under_any_default_device(call)
