"""Derivatives of every op with respect to every tensor it takes, registration, and torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fluxkernels as fk
from fluxkernels.ops.kde import kde_backward_op
from tests.support import ops
from tests.support.ops import BY_NAME, KERNELS, OPS, Op


def tensors(*, large: bool = False) -> dict[str, Tensor]:
    """float64 leaves for two groups; `large` has more dimensions than distances are formed in directly."""
    generator = torch.Generator().manual_seed(1)
    D = 18 if large else 2
    scale = 0.3 if large else 1.0

    def normal(*shape: int) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    def positive(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.4).requires_grad_()

    inputs = {
        "x": normal(2, 4, D),
        "xt": normal(2, 3, D),
        "refs": normal(2, 5, D),
        "field": normal(2, 4, D),
        "values": normal(2, 3, 2),
        "chain_noise": normal(3, 2, 4, D),
        "pass_noise": normal(4, 2, 4, D),
        "per_query": positive(2, 4),
        "per_group": positive(2),
        "tau": positive(2),
        "h": positive(2),
        "step_noise": normal(2, 4, D),
    }
    return ops.with_leaves(inputs)


def call_of(op: Op, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The op as a function of its differentiable inputs, and of a seed in place of the noise where one is given."""
    function, arguments = op.function, tuple(op.arguments)
    names = arguments if op.noise is None or "seed" in options else (*arguments, "noise")
    if op.takes_num_steps and "seed" not in options:
        options["num_steps"] = 3

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return ops.tensors(function(**dict(zip(names, values, strict=True)), **options), values[0])

    return call


CALLS: dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[str, ...]]] = {
    **{op.name: (call_of(op), op.differentiable) for op in OPS},
    "langevin_chain of a seed": (
        call_of(BY_NAME["langevin_chain"], seed=7),
        tuple(BY_NAME["langevin_chain"].arguments.values()),
    ),
}


@pytest.mark.parametrize("large", [False, True], ids=["D=2", "D=18"])
@pytest.mark.parametrize("name", CALLS)
def test_first_derivatives(name: str, large: bool, backend: str) -> None:
    call, arguments = CALLS[name]
    inputs = tuple(tensors(large=large)[a] for a in arguments)
    assert gradcheck(call, inputs, fast_mode=large)


@pytest.mark.parametrize("name", [op.name for op in OPS if op.twice_differentiable])
def test_second_derivatives(name: str, backend: str) -> None:
    call, arguments = CALLS[name]
    assert gradgradcheck(call, tuple(tensors()[a] for a in arguments))


def test_third_derivative_of_the_score(backend: str) -> None:
    """The published loss differentiates the KDE this often; autograd through plain PyTorch is the truth."""
    t = tensors()
    x, refs = t["x"], t["refs"].detach()

    def third(score: Callable[[Tensor], Tensor]) -> Tensor:
        value = score(x).sum()
        for _ in range(2):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = g.pow(3).sum()
        return torch.autograd.grad(value, x)[0]

    def plain(z: Tensor) -> Tensor:
        w = (-(z.unsqueeze(-2) - refs.unsqueeze(-3)).square().sum(-1) / 0.8).softmax(-1)
        return (w @ refs - z) / 0.4

    torch.testing.assert_close(third(lambda z: fk.kde_score(z, refs, 0.4)), third(plain), rtol=1e-10, atol=1e-10)


def test_reference_points_that_are_the_queries(backend: str) -> None:
    """kde_score(x, x): one tensor, two roles, both differentiated, once and twice."""
    x = tensors()["x"]
    assert gradcheck(lambda x: fk.kde_score(x, x, 0.5), (x,))
    assert gradgradcheck(lambda x: fk.kde_score(x, x, 0.5), (x,))


def test_one_tensor_in_two_roles_of_an_op(backend: str) -> None:
    """Below the public functions, where x and refs can be one object: recomputed derivatives count each role once."""
    t = tensors()
    v, g, sigma2 = torch.randn(2, 4, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64), t["per_query"]

    def cotangent(x: Tensor) -> Tensor:
        return kde_backward_op(v, v, g, x, x, sigma2.detach(), backend)[0]

    assert gradgradcheck(cotangent, (t["x"],))


def test_broadcast_inputs_sum_their_derivatives(backend: str) -> None:
    t = tensors()
    refs = t["refs"][0].detach().requires_grad_()
    sigma2 = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(fk.kde_score, (t["x"], refs, sigma2))


def test_time_zero_has_finite_derivatives(backend: str) -> None:
    t = tensors()
    tau = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    xt = fk.langevin_chain(t["x"], t["refs"], t["per_group"], tau, noise=t["chain_noise"], num_steps=3)
    torch.testing.assert_close(xt, t["x"], rtol=0, atol=1e-15)
    g_x, g_sigma2, g_tau = torch.autograd.grad(xt.sum(), (t["x"], t["per_group"], tau))
    torch.testing.assert_close(g_x, torch.ones_like(g_x))
    assert not g_sigma2.any()
    assert g_tau.isfinite().all()


def test_single_chain_is_the_pathwise_derivative(backend: str) -> None:
    """(∂x_τ/∂x0)ᵀ v against plain PyTorch through the chain of Eq. 8."""
    t = tensors()
    x, refs, noise = t["x"], t["refs"].detach(), t["chain_noise"].detach()
    s2, tau = 0.5, 1.3
    rho = torch.exp(torch.tensor(-tau / 3, dtype=torch.float64))
    y = x
    for xi in noise:
        w = (-(y.unsqueeze(-2) - refs.unsqueeze(-3)).square().sum(-1) / (2 * s2)).softmax(-1)
        y = rho * y + (1 - rho) * (w @ refs) + (s2 * (1 - rho**2)).sqrt() * xi
    v = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, v)
    (got,) = torch.autograd.grad(fk.langevin_chain(x, refs, s2, tau, noise=noise, num_steps=3), x, v)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def kernel_arguments() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every registered op with arguments."""
    t = tensors()
    shift = torch.randn_like(t["x"])
    cotangents = {"g_shift": shift, "g_mean": shift, "g_log_density": shift[..., 0].contiguous()}
    cotangents |= {"g_average": shift, "g_no_shift": shift.new_empty((2, 4, 0))}
    inputs = {**t, **cotangents, "shift": shift, "num_steps": 3, "seed": torch.tensor(3)}
    return {
        name: (kernel.registered, arguments)
        for kernel in KERNELS
        for name, arguments in kernel.variants(inputs).items()
    }


@pytest.mark.parametrize("name", kernel_arguments())
def test_registration(name: str, backend: str) -> None:
    op, arguments = kernel_arguments()[name]
    optional = [None] * (len(op._schema.arguments) - len(arguments) - 1)
    torch.library.opcheck(op, (*arguments, *optional, backend))


@pytest.mark.parametrize("name", CALLS)
def test_compiled_without_graph_breaks(name: str, backend: str) -> None:
    call, arguments = CALLS[name]
    inputs = [tensors()[a] for a in arguments]
    torch.compiler.reset()

    def loss(*args: Tensor) -> Tensor:
        return sum((r.square().sum() for r in call(*args)), torch.zeros(()))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_forward_mode_keeps_its_tangents(backend: str) -> None:
    t = {name: value.detach() for name, value in tensors().items()}
    torch.compiler.reset()

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda z: fk.kde_score(z, t["refs"], 0.5), (x,), (torch.ones_like(x),))[1]

    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t["x"]), tangent(t["x"]))
    assert tangent(t["x"]).any()


def test_compiled_numbers_may_change(backend: str) -> None:
    """σ² and τ as Python numbers become symbols at the second call."""
    t = {name: value.detach() for name, value in tensors().items()}
    torch.compiler.reset()

    def chain(x: Tensor, sigma2: float, tau: float) -> Tensor:
        return fk.langevin_chain(x, t["refs"], sigma2, tau, seed=1)

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    for sigma2, tau in ((0.5, 1.0), (0.6, 1.5), (0.7, 0.0)):
        torch.testing.assert_close(compiled(t["x"], sigma2, tau), chain(t["x"], sigma2, tau))


def test_compiled_by_inductor(backend: str) -> None:
    t = {name: value.detach() for name, value in tensors().items()}
    torch.compiler.reset()

    def call(x: Tensor, refs: Tensor) -> Tensor:
        return fk.flux_pass(2 * x, refs, 0.5, 1.0, seed=3).score_t.sin()

    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(t["x"], t["refs"]), call(t["x"], t["refs"]))


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_and_torch_func(name: str, backend: str) -> None:
    """Tangents, vector-Jacobian products and batches under torch.func: a registered op alone would drop tangents."""
    call, arguments = CALLS[name]
    inputs = tuple(tensors()[a].detach() for a in arguments)
    tangents = tuple(torch.randn_like(t) for t in inputs)

    def flat(*args: Tensor) -> Tensor:
        return torch.cat([r.flatten() for r in call(*args)])

    value, tangent = torch.func.jvp(flat, inputs, tangents)
    torch.testing.assert_close(value, flat(*inputs))
    step = 1e-6
    ahead, behind = (flat(*(t + s * step * v for t, v in zip(inputs, tangents, strict=True))) for s in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level():
        dual = flat(*(forward_ad.make_dual(t, v) for t, v in zip(inputs, tangents, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)
    _, pull = torch.func.vjp(flat, *inputs)
    cotangent = torch.randn_like(value)
    pulled = sum((g * v).sum() for g, v in zip(pull(cotangent), tangents, strict=True))
    torch.testing.assert_close(pulled, (cotangent * tangent).sum())


@pytest.mark.parametrize("large", [False, True], ids=["D=2", "D=18"])
def test_vmap_and_hessian(large: bool, backend: str) -> None:
    t = tensors(large=large)
    x, refs = t["x"][0].detach(), t["refs"][0].detach()
    one_by_one = torch.func.vmap(lambda z: fk.kde_score(z.unsqueeze(0), refs, 0.5)[0])(x)
    torch.testing.assert_close(one_by_one, fk.kde_score(x, refs, 0.5))
    hessian = torch.func.hessian(lambda z: fk.kde_log_density(z.unsqueeze(0), refs, 0.5)[0])(x[0])
    z = x[0].clone().requires_grad_()
    score = fk.kde_score(z.unsqueeze(0), refs, 0.5)[0]
    torch.testing.assert_close(hessian, torch.stack([torch.autograd.grad(s, z, retain_graph=True)[0] for s in score]))


@pytest.mark.parametrize("name", CALLS)
def test_autocast_stays_out(name: str, backend: str) -> None:
    call, arguments = CALLS[name]
    inputs = [tensors(large=True)[a].detach().float().requires_grad_() for a in arguments]

    def results() -> list[Tensor]:
        values = list(call(*inputs))
        return values + list(torch.autograd.grad(sum(v.square().sum() for v in values), inputs))

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)
