"""Plain calls of an op skip PyTorch's dispatcher: same results, and every special call still goes through it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fluxkernels as fk
from fluxkernels import checks, cpu, devices
from fluxkernels.ops import registration
from fluxkernels.ops.kde import kde_op
from tests.support.ops import OPS, Op, noises, tensors

BY_OP = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def inputs(dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = (), numbers: bool = True) -> dict[str, Any]:
    shapes = {"x": (5, 3), "xt": (4, 3), "refs": (7, 3), "field": (5, 3), "values": (4, 2)}
    points = {name: torch.randn(*batch, *shape, dtype=dtype) for name, shape in shapes.items()}
    number = (lambda *shape: 0.5) if numbers else (lambda *shape: torch.rand((*batch, *shape), dtype=dtype) + 0.1)
    return {
        **points,
        "per_group": number(),
        "per_query": number(5),
        "tau": number(),
        "h": number(),
        **{name: n.to(dtype) for name, n in noises(torch.randn(5, *batch, 5, 3)).items()},
    }


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that went through the dispatcher."""
    names: list[str] = []
    definition = type(kde_op.registered)
    call = definition.__call__

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self._name)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(definition, "__call__", record)
    return names


@contextmanager
def dispatcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send every call through the dispatcher."""
    with monkeypatch.context() as patch:
        patch.setattr(registration, "is_plain_call", lambda arguments: False)
        patch.setattr(checks, "is_eager", lambda: False)
        yield


@BY_OP
@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "tensors"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_same_bits(
    op: Op,
    dtype: torch.dtype,
    batch: tuple[int, ...],
    numbers: bool,
    dispatched: list[str],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = inputs(dtype, batch, numbers)
    for options in [{}, {"seed": 3}] if op.noise else [{}]:
        fast = tensors(op.call(given, **options), given["x"])
        assert not dispatched
        with dispatcher(monkeypatch):
            slow = tensors(op.call(given, **options), given["x"])
        assert dispatched
        dispatched.clear()
        for a, b in zip(fast, slow, strict=True):
            assert torch.equal(a, b)
            assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), False)


@BY_OP
def test_the_generators_numbers_are_the_same(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    if op.noise:
        arguments = op.given(inputs())
        torch.manual_seed(1)
        fast = tensors(op.function(**arguments), arguments.get("x"))
        torch.manual_seed(1)
        with dispatcher(monkeypatch):
            slow = tensors(op.function(**arguments), arguments.get("x"))
        assert all(map(torch.equal, fast, slow))


def with_derivatives(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().requires_grad_() if isinstance(v, Tensor) else v for k, v in given.items()}


@BY_OP
def test_plain_calls_with_gradients_off(op: Op, dispatched: list[str]) -> None:
    given = with_derivatives(inputs())
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            results = [*tensors(op.call(given), given["x"]), *tensors(op.call(inputs()), given["x"])]
        assert not any(r.requires_grad for r in results)
    assert not dispatched


def derivatives(op: Op, given: dict[str, Any], **options: Any) -> list[Tensor]:
    """First derivatives of an op in all of its arguments, and those of their squares."""
    given = with_derivatives(given)
    leaves = [v for v in given.values() if isinstance(v, Tensor)]
    results = [r for r in tensors(op.call(given, **options), given["x"]) if r.requires_grad]
    first = torch.autograd.grad(
        results, leaves, [torch.cos(r.detach()) for r in results], create_graph=True, allow_unused=True
    )
    total = torch.stack([g.square().sum() for g in first if g is not None]).sum()
    second = torch.autograd.grad(total, leaves, allow_unused=True)
    return [g for g in (*first, *second) if g is not None]


@BY_OP
@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "tensors"])
def test_derivatives_are_those_of_the_dispatcher(
    op: Op, numbers: bool, dispatched: list[str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(torch.float64, (2,), numbers)
    options: dict[str, Any] = {"seed": 3} if op.noise else {}
    fast = derivatives(op, given, **options)
    assert fast
    assert not dispatched
    with dispatcher(monkeypatch):
        slow = derivatives(op, given, **options)
    assert dispatched
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a, b)


def test_modes_and_hooks_of_autograd_see_a_plain_call(backend: str) -> None:
    x, refs = torch.randn(5, 2, requires_grad=True), torch.randn(4, 2)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        score = fk.kde_score(x, refs, 0.5)
    assert any(t.shape[-2:] == refs.shape for t in saved)
    (once,) = torch.autograd.grad(score.sum(), x, retain_graph=True)
    (batched,) = torch.autograd.grad(score, x, torch.ones(3, *score.shape), is_grads_batched=True)
    torch.testing.assert_close(batched, once.expand(3, -1, -1))
    checkpointed = torch.utils.checkpoint.checkpoint(lambda t: fk.kde_score(t, refs, 0.5), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(checkpointed.sum(), x)[0], once)


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "function mode": Functions,
    "default device": lambda: torch.device("cpu"),
    "dispatch mode": Ops,
    "fake mode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "profiler": lambda: profile(activities=[ProfilerActivity.CPU]),
}


@pytest.mark.parametrize("mode", MODES)
@BY_OP
def test_a_mode_sees_the_op(op: Op, mode: str, dispatched: list[str]) -> None:
    with MODES[mode]():
        op.call(inputs())
    assert dispatched


def test_modes_and_profiler_see_the_name_of_the_op() -> None:
    x = torch.randn(5, 2)
    with Ops() as ops:
        fk.kde_score(x, x, 0.5)
    assert "fluxkernels.kde.default" in ops.names
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        fk.kde_score(x, x, 0.5)
    assert "fluxkernels::kde" in {event.name for event in profiler.events()}


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing", ["real", "symbolic"])
@BY_OP
def test_a_traced_graph_holds_the_op(op: Op, tracing: str, pre_dispatch: bool, dispatched: list[str]) -> None:
    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return tensors(op.call(dict(zip(op.differentiable, values, strict=True))), values[0])

    values = op.values(inputs(numbers=False))
    graph = make_fx(call, tracing_mode=tracing, pre_dispatch=pre_dispatch)(*values)
    assert dispatched
    assert any("fluxkernels" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_holds_the_op() -> None:
    x, other = torch.randn(5, 2), torch.randn(5, 2)
    traced = torch.jit.trace(lambda z: fk.kde_score(z, z, 0.5), x, check_trace=False)
    assert torch.equal(traced(other), fk.kde_score(other, other, 0.5))


@BY_OP
def test_transforms_run_the_reference(op: Op, dispatched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_kernels", None)
    given = inputs()
    first = next(iter(op.arguments.values()))

    def call(x: Tensor) -> Tensor:
        return tensors(op.call({**given, first: x}), x)[0]

    torch.func.vmap(call)(torch.randn(2, 5, 3))
    torch.func.jvp(call, (given["x"],), (given["x"],))
    with forward_ad.dual_level():
        call(given["x"])
    assert not dispatched


class Subclass(Tensor):
    pass


def zero_tensor() -> Tensor:
    return torch._efficientzerotensor((5, 2))


SPECIAL: dict[str, Callable[[], Tensor]] = {
    "subclass": lambda: torch.randn(5, 2).as_subclass(Subclass),
    "negative view": lambda: torch.view_as_complex(torch.randn(5, 2, 2)).conj().imag,
    "zero tensor": zero_tensor,
    "fake": lambda: FakeTensorMode().from_tensor(torch.randn(5, 2)),
    "meta": lambda: torch.randn(5, 2, device="meta"),
    "functional": lambda: torch._to_functional_tensor(torch.randn(5, 2)),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_tensors_are_not_plain(kind: str) -> None:
    x = SPECIAL[kind]()
    assert not devices.is_plain(x)
    assert not devices.is_plain_call([x])
    assert devices.is_plain_call([torch.randn(5, 2), 3, None])


@pytest.mark.parametrize("kind", ["subclass", "negative view", "meta"])
def test_special_tensors_go_through_the_dispatcher(kind: str, dispatched: list[str]) -> None:
    x = SPECIAL[kind]()
    fk.kde_score(x, x, 0.5, backend="torch")
    assert dispatched


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts_of_points(layout: str, dispatched: list[str]) -> None:
    x = {
        "transposed": torch.randn(3, 5).T,
        "strided": torch.randn(10, 6)[::2, ::2],
        "expanded": torch.randn(1, 3).expand(5, 3),
    }[layout]
    assert torch.equal(fk.kde_score(x, x, 0.5), fk.kde_score(x.contiguous(), x.contiguous(), 0.5))
    assert not dispatched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_one_number_that_is_not_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    x = torch.tensor([limits.max, limits.min, limits.tiny, -0.0, limits.smallest_normal / 2] * 7, dtype=dtype)
    assert cpu.is_finite(x)
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        for k in range(len(x)):
            assert not cpu.is_finite(x.index_fill(0, torch.tensor(k), bad))


def test_compiled_calls_keep_the_op(dispatched: list[str]) -> None:
    x = torch.randn(5, 2)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda z: fk.kde_score(z, z, 0.5), backend=keep, fullgraph=True)
    assert torch.equal(compiled(x), fk.kde_score(x, x, 0.5))
    assert "fluxkernels" in graphs[0].code
