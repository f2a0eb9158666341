"""Derivatives of every op with respect to every tensor it takes, registration, and torch.compile: one list of calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fluxkernels as fk
from fluxkernels.ops import kde as kde_module
from fluxkernels.ops import langevin as langevin_module
from fluxkernels.ops import residual as residual_module
from fluxkernels.ops import transition as transition_module


def tensors(*, large: bool = False) -> dict[str, Tensor]:
    """float64 leaves for two groups; `large` has more dimensions than distances are formed in directly."""
    generator = torch.Generator().manual_seed(1)
    D = 18 if large else 2
    scale = 0.3 if large else 1.0

    def normal(*shape: int) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    def positive(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.4).requires_grad_()

    return {
        "x": normal(2, 4, D),
        "xt": normal(2, 3, D),
        "refs": normal(2, 5, D),
        "field": normal(2, 4, D),
        "values": normal(2, 3, 2),
        "noise": normal(3, 2, 4, D),
        "start_noise": normal(4, 2, 4, D),
        "per_query": positive(2, 4),
        "per_group": positive(2),
        "tau": positive(2),
    }


def flux_pass(x: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    p = fk.flux_pass(x, refs, sigma2, tau, noise=noise, steps=3)
    return p.x0, p.score0, p.xt, p.score_t, p.transition_average(x)


CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "kde_score": (fk.kde_score, ("x", "refs", "per_query")),
    "kde_mean": (fk.kde_mean, ("x", "refs", "per_query")),
    "kde_log_density": (fk.kde_log_density, ("x", "refs", "per_group")),
    "langevin_step": (
        lambda x, refs, s2, h, xi: fk.langevin_step(x, refs, s2, h, noise=xi[0]),
        ("x", "refs", "per_group", "tau", "noise"),
    ),
    "langevin_chain": (
        lambda x, refs, s2, tau, xi: fk.langevin_chain(x, refs, s2, tau, noise=xi, steps=3),
        ("x", "refs", "per_group", "tau", "noise"),
    ),
    "langevin_chain of a seed": (
        lambda x, refs, s2, tau: fk.langevin_chain(x, refs, s2, tau, seed=7),
        ("x", "refs", "per_group", "tau"),
    ),
    "transition_weights": (fk.transition_weights, ("x", "xt", "refs", "per_group", "tau")),
    "transition_average": (fk.transition_average, ("x", "xt", "values", "refs", "per_group", "tau")),
    "residual_gradient": (fk.residual_gradient, ("x", "field", "refs", "per_query")),
    "flux_pass": (flux_pass, ("x", "refs", "per_group", "tau", "start_noise")),
}


@pytest.mark.parametrize("large", [False, True], ids=["D=2", "D=18"])
@pytest.mark.parametrize("name", CALLS)
def test_first_derivatives(name: str, large: bool, backend: str) -> None:
    call, arguments = CALLS[name]
    inputs = tuple(tensors(large=large)[a] for a in arguments)
    assert gradcheck(call, inputs, fast_mode=large)


@pytest.mark.parametrize("name", ["kde_score", "kde_mean", "kde_log_density"])
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


def test_centres_that_are_the_queries(backend: str) -> None:
    """kde_score(x, x): one tensor, two roles, both differentiated, once and twice."""
    x = tensors()["x"]
    assert gradcheck(lambda x: fk.kde_score(x, x, 0.5), (x,))
    assert gradgradcheck(lambda x: fk.kde_score(x, x, 0.5), (x,))


def test_one_tensor_in_two_roles_of_an_op(backend: str) -> None:
    """Below the public functions, where x and refs can be one object: recomputed derivatives count each role once."""
    t = tensors()
    v, g, sigma2 = torch.randn(2, 4, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64), t["per_query"]

    def cotangent(x: Tensor) -> Tensor:
        return kde_module.kde_backward(v, v, g, x, x, sigma2.detach(), backend)[0]

    assert gradgradcheck(cotangent, (t["x"],))


def test_broadcast_inputs_sum_their_derivatives(backend: str) -> None:
    t = tensors()
    refs = t["refs"][0].detach().requires_grad_()
    sigma2 = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(fk.kde_score, (t["x"], refs, sigma2))


def test_time_zero_has_finite_derivatives(backend: str) -> None:
    t = tensors()
    tau = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    xt = fk.langevin_chain(t["x"], t["refs"], t["per_group"], tau, noise=t["noise"], steps=3)
    torch.testing.assert_close(xt, t["x"], rtol=0, atol=1e-15)
    g_x, g_sigma2, g_tau = torch.autograd.grad(xt.sum(), (t["x"], t["per_group"], tau))
    torch.testing.assert_close(g_x, torch.ones_like(g_x))
    assert not g_sigma2.any()
    assert g_tau.isfinite().all()


def test_single_chain_is_the_pathwise_derivative(backend: str) -> None:
    """(∂x_τ/∂x0)ᵀ v against plain PyTorch through the chain of Eq. 8."""
    t = tensors()
    x, refs, noise = t["x"], t["refs"].detach(), t["noise"].detach()
    s2, tau = 0.5, 1.3
    rho = torch.exp(torch.tensor(-tau / 3, dtype=torch.float64))
    y = x
    for xi in noise:
        w = (-(y.unsqueeze(-2) - refs.unsqueeze(-3)).square().sum(-1) / (2 * s2)).softmax(-1)
        y = rho * y + (1 - rho) * (w @ refs) + (s2 * (1 - rho**2)).sqrt() * xi
    v = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, v)
    (got,) = torch.autograd.grad(fk.langevin_chain(x, refs, s2, tau, noise=noise, steps=3), x, v)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def registered(backend: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every registered op with arguments."""
    t = tensors()
    x, refs, s2, tau = t["x"], t["refs"], t["per_group"], t["tau"]
    shift = torch.randn_like(x)
    time = (refs, s2, tau, 3)
    return {
        "kde": (kde_module.kde, (x, refs, t["per_query"], backend)),
        "kde_backward": (
            kde_module.kde_backward,
            (shift, shift, shift[..., 0].contiguous(), x, refs, t["per_query"], backend),
        ),
        "langevin_chain": (langevin_module.chain, (x, *time, t["noise"], None, backend)),
        "langevin_chain of a seed": (langevin_module.chain, (x, *time, None, torch.tensor(3), backend)),
        "flux_pass": (langevin_module.bundle, (x, *time, t["start_noise"], None, backend)),
        "flux_pass of a seed": (langevin_module.bundle, (x, *time, None, torch.tensor(3), backend)),
        "transition_weights": (transition_module.weights, (x, shift, t["xt"], s2, tau, backend)),
        "transition_average": (
            transition_module.weighted_sum,
            (x, shift, t["xt"], t["values"], s2, tau, backend),
        ),
        "residual_gradient": (residual_module.gradient, (x, t["field"], refs, t["per_query"], backend)),
    }


@pytest.mark.parametrize("name", registered("torch"))
def test_registration(name: str, backend: str) -> None:
    op, arguments = registered(backend)[name]
    torch.library.opcheck(op.registered, arguments)


@pytest.mark.parametrize("name", CALLS)
def test_compiled_without_graph_breaks(name: str, backend: str) -> None:
    call, arguments = CALLS[name]
    inputs = [tensors()[a] for a in arguments]
    torch.compiler.reset()

    def loss(*args: Tensor) -> Tensor:
        results = call(*args)
        return sum(
            (r.square().sum() for r in ([results] if isinstance(results, Tensor) else results)),
            torch.zeros(()),
        )

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
        results = call(*args)
        return torch.cat([r.flatten() for r in ([results] if isinstance(results, Tensor) else results)])

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
        values = call(*inputs)
        values = [values] if isinstance(values, Tensor) else list(values)
        return values + list(torch.autograd.grad(sum(v.square().sum() for v in values), inputs))

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)
