"""Losses under torch.compile: whole modules, parts in one graph."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxmatching import (
    DenoisingScoreMatching,
    DualFluxMatching,
    EDMField,
    FlowMatching,
    FlowOptions,
    FluxMatching,
    FluxOptions,
    LinearFeatures,
    LogUniformNoise,
    LossNormalizer,
    NoiseAnnealedFluxMatching,
    QuadraticFeatures,
    UniformTimes,
    VFluxMatching,
    conditional_flow_matching_loss,
    v_flux_loss,
)
from tests.support.losses import flux_loss
from tests.support.problems import smooth_field

F64 = torch.float64


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Network(nn.Module):
    """A perceptron for f(z) and for F(z, c_noise), with a dropout that is no layer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.dropout = nn.Linear(2, 16).double(), nn.Linear(16, 2).double(), dropout

    def forward(self, z: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        shift = torch.as_tensor(noise, dtype=z.dtype).reshape(-1, 1)
        hidden = torch.tanh(self.first(z) + shift)
        return self.last(F.dropout(hidden, self.dropout) if self.dropout else hidden)


NOISE, TIMES = LogUniformNoise(0.1, 2.0), UniformTimes(0.1, 0.9)
MODULES = {
    **{
        f"flux, {method}": lambda method=method: FluxMatching(Network(), 0.7, FluxOptions(second_derivatives=method))
        for method in ("double_backward", "forward_over_reverse", "finite_difference")
    },
    "flux, dropout": lambda: FluxMatching(Network(0.5), 0.7, FluxOptions(second_derivatives="finite_difference")),
    "flux, dropout, twice": lambda: FluxMatching(Network(0.5), 0.7, FluxOptions(second_derivatives="double_backward")),
    "annealed": lambda: NoiseAnnealedFluxMatching(EDMField(Network(), 1.0), NOISE),
    "dual": lambda: DualFluxMatching(Network(), [LinearFeatures(), QuadraticFeatures()]),
    "score matching": lambda: DenoisingScoreMatching(EDMField(Network(), 1.0), NOISE, normalizer=LossNormalizer()),
    "flow": lambda: FlowMatching(Network()),
    "flow, stable target": lambda: FlowMatching(Network(), FlowOptions(stable_target=True, times=TIMES)),
    "v-flux": lambda: VFluxMatching(Network(), times=TIMES),
    "v-flux, normalizer": lambda: VFluxMatching(Network(), times=TIMES, normalizer=LossNormalizer()),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_compiled_loss_module_has_the_same_gradients(kind: str) -> None:
    """With dropout both sides of a difference need one mask, although the compiler sees no generator."""
    module, x = MODULES[kind](), torch.randn(16, 2, dtype=F64)
    compiled = torch.compile(module, backend="aot_eager")
    for seed in map(torch.tensor, (3, 4)):
        found = []
        for called in (module, compiled):
            module.zero_grad()
            torch.manual_seed(5)
            called(x, seed=seed)[0].backward()
            found.append([parameter.grad for parameter in module.parameters()])
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["annealed", "flow", "v-flux"])
def test_a_compiled_loss_module_is_not_compiled_for_every_sigma_or_time(kind: str) -> None:
    module, x = MODULES[kind](), torch.randn(32, 2, dtype=F64)
    compiled = torch.compile(module, backend="aot_eager")
    compiled(x, seed=torch.tensor(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(1, 5):
            compiled(x, seed=torch.tensor(seed))


def test_compiled_step(backend: str) -> None:
    """A whole loss in one graph: torch.func's derivatives trace, autograd.grad does not."""
    field, x = smooth_field(2), torch.randn(16, 2, dtype=F64)

    def step(x: Tensor, seed: Tensor) -> Tensor:
        return flux_loss(field, x, 0.7, seed=seed, second_derivatives="forward_over_reverse")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for number in (1, 2):
        seed = torch.tensor(number)
        torch.testing.assert_close(compiled(x, seed), step(x, seed))


def test_compiled_steps_of_flows(backend: str) -> None:
    """Flow matching takes no derivative, and v-flux those that trace."""
    field, x = Network(), torch.randn(16, 2, dtype=F64)
    options, stable = FluxOptions(second_derivatives="forward_over_reverse"), FlowOptions(stable_target=True)
    steps = {
        "flow": lambda x, seed: conditional_flow_matching_loss(field, x, seed=seed),
        "stable": lambda x, seed: conditional_flow_matching_loss(field, x, stable, seed=seed),
        "v-flux": lambda x, seed: v_flux_loss(field, x, 0.5, options=options, seed=seed),
    }
    for step in steps.values():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for number in (1, 2):
            seed = torch.tensor(number)
            torch.testing.assert_close(compiled(x, seed), step(x, seed))


@pytest.mark.parametrize("method", ["double_backward", "finite_difference"])
def test_batch_norm_is_refused_in_a_compiled_loss(method: str) -> None:
    field = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    compiled = torch.compile(FluxMatching(field, 0.7, FluxOptions(second_derivatives=method)), backend="eager")
    with pytest.raises(ValueError, match=r"flux_matching_loss: field must treat each sample by itself.*BatchNorm1d"):
        compiled(torch.randn(8, 2), seed=torch.tensor(1))
