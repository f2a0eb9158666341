"""second_derivatives="closed_form": the field's own bracket against autograd's, and what is asked of such a field."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from fluxmatching import LossNormalizer
from tests.support.losses import annealed_loss, flux_loss, target_of

F64 = torch.float64


class Wave(nn.Module):
    """f(z) = sin(A z) on the last dimension, whose derivatives fit on a line each."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[0.7, -0.4], [1.1, 0.3]], dtype=F64))
        self.asked: list[tuple[int, bool]] = []

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.A.T).sin()

    def endpoint_gradient(self, z: Tensor, score: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
        self.asked.append((len(z), torch.is_grad_enabled()))
        phase = z @ self.A.T
        # The coefficient of cos(phase_i) in ∇·f is A_ii, in εᵀ J_f ε it is ε_i (A ε)_i.
        coefficient = self.A.diagonal() if probe is None else probe * (probe @ self.A.T)
        return (phase.cos() * score - phase.sin() * coefficient) @ self.A, phase.sin()


@pytest.mark.parametrize("estimator", ["cross_chain", "single_chain"])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
@pytest.mark.parametrize("grouped", [False, True])
def test_equals_autograd(estimator: str, divergence: str, grouped: bool, backend: str) -> None:
    field, x = Wave(), torch.randn(9, 3, 2, dtype=F64) if grouped else torch.randn(9, 2, dtype=F64)
    options: dict[str, Any] = {"estimator": estimator, "divergence": divergence, "grouped": grouped, "seed": 3}
    expected = target_of(field, x, 0.7, second_derivatives="double_backward", **options)
    for chunk, sizes in ((None, [9]), (4, [4, 4, 1]), (100, [9])):
        field.asked.clear()
        got = target_of(field, x, 0.7, second_derivatives="closed_form", chunk_size=chunk, **options)
        torch.testing.assert_close(got.target, expected.target, rtol=1e-12, atol=1e-13)
        assert field.asked == [(size, False) for size in sizes]
        assert not got.target.requires_grad


def test_parameters_get_the_same_gradient(backend: str) -> None:
    field, x = Wave(), torch.randn(8, 2, dtype=F64)
    gradients = [
        torch.autograd.grad(flux_loss(field, x, 0.7, seed=1, second_derivatives=method).mean(), field.A)[0]
        for method in ("double_backward", "closed_form")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_results_take_the_dtype_of_the_data(backend: str) -> None:
    class Wide(Wave):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z.double())

        def endpoint_gradient(self, z: Tensor, score: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
            return super().endpoint_gradient(z.double(), score.double(), None if probe is None else probe.double())

    target = target_of(Wide(), torch.randn(6, 2), 0.7, seed=1, second_derivatives="closed_form")
    assert target.target.dtype == torch.float32
    assert target.target.isfinite().all()


def test_needs_no_derivative_and_so_runs_in_inference_mode() -> None:
    field, x = Wave(), torch.randn(6, 2, dtype=F64)
    expected = target_of(field, x, 0.7, seed=1, second_derivatives="closed_form", backend="torch").target
    with torch.inference_mode():
        got = target_of(field, x, 0.7, seed=1, second_derivatives="closed_form", backend="torch").target
    assert torch.equal(got, expected)


def answering(answer: Callable[[Tensor], Any]) -> nn.Module:
    """A field whose method returns answer(z)."""

    class Answering(Wave):
        def endpoint_gradient(self, z: Tensor, score: Tensor, probe: Tensor | None) -> Any:
            return answer(z)

    return Answering()


@pytest.mark.parametrize(
    ("field", "error", "text"),
    [
        (
            lambda z: -z,
            TypeError,
            r"needs a field with the method endpoint_gradient\(z, score, probe\) .* function has none",
        ),
        (nn.Linear(2, 2), TypeError, "Linear has none"),
        (answering(lambda z: z), TypeError, r"must return two tensors \(gradient, f\), got tensor"),
        (answering(lambda z: (z, None)), TypeError, "must return two tensors"),
        (answering(lambda z: (z, z, z)), TypeError, "must return two tensors"),
        (answering(lambda z: (z[:, :1], z)), ValueError, r"return gradient in the shape of z, \[6, 2\], got \[6, 1\]"),
        (answering(lambda z: (z, z.mT)), ValueError, r"return f in the shape of z, \[6, 2\], got \[2, 6\]"),
    ],
)
def test_what_a_field_must_have(field: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        flux_loss(field, torch.randn(6, 2), 0.7, second_derivatives="closed_form", backend="torch")


def accelerated(net: nn.Module) -> nn.Module:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of a test before, whose precision it would keep
    prepared: nn.Module = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(net)
    AcceleratorState._reset_state(reset_partial_state=True)
    return prepared


@pytest.mark.parametrize(
    "wrapped", [lambda net: Fabric(accelerator="cpu", precision="bf16-mixed").setup_module(net), accelerated]
)
@pytest.mark.filterwarnings("ignore")
def test_a_network_in_half_precision_takes_the_larger_step_in_engines_too(wrapped: Callable[..., Any]) -> None:
    """As under autocast around the loss, to the last bit."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)), torch.randn(16, 2)
    options: dict[str, Any] = {"seed": 1, "second_derivatives": "finite_difference"}
    with torch.autocast("cpu", torch.bfloat16):
        expected = flux_loss(net, x, 0.7, **options)
    assert torch.equal(flux_loss(wrapped(net), x, 0.7, **options), expected)


def test_errors_of_the_field_come_through() -> None:
    def refuse(z: Tensor) -> Any:
        raise NotImplementedError("one probe only")

    with pytest.raises(NotImplementedError, match="one probe only"):
        flux_loss(answering(refuse), torch.randn(6, 2), 0.7, second_derivatives="closed_form", backend="torch")


def test_a_field_of_all_noise_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_annealed_flux_loss: second_derivatives='closed_form' is for fields"):
        annealed_loss(
            lambda z, sigma: -z,
            torch.randn(6, 2),
            0.7,
            LossNormalizer(),
            second_derivatives="closed_form",
            backend="torch",
        )


@pytest.mark.parametrize("method", ["double_backward", "finite_difference", "forward_over_reverse"])
def test_torch_func_grad_takes_forward_over_reverse(method: str) -> None:
    net, x = nn.Linear(2, 2, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    options: dict[str, Any] = {"seed": 1, "second_derivatives": method}

    def mean(parameters: dict[str, Tensor]) -> Tensor:
        return flux_loss(lambda z: torch.func.functional_call(net, parameters, (z,)), x, 0.7, **options).mean()

    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    if method != "forward_over_reverse":
        with pytest.raises(
            RuntimeError, match=f"'{method}' cannot be used inside a transform.*'forward_over_reverse' can"
        ):
            torch.func.grad(mean)(parameters)
        return
    flux_loss(net, x, 0.7, **options).mean().backward()
    torch.testing.assert_close(torch.func.grad(mean)(parameters)["weight"], net.weight.grad)
