"""Bad input to every public function raises an error that names the argument, before any kernel runs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fluxkernels as fk
from fluxkernels import checks, devices, philox
from tests.support.ops import BY_NAME, NUM_STEPS, OPS, noises

# Every backend runs behind the same checks.
pytestmark = pytest.mark.usefixtures("backend")

X, REFS, XT = torch.randn(5, 2), torch.randn(7, 2), torch.randn(4, 2)
INPUTS: dict[str, Any] = {
    "x": X, "refs": REFS, "xt": XT, "values": torch.randn(4, 3), "field": torch.randn(5, 2),
    "per_query": 0.1, "per_group": 0.1, "tau": 0.5, "h": 0.5,
}  # fmt: skip
GOOD: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {op.name: (op.function, op.given(INPUTS)) for op in OPS}
# Weights, which are not rows of numbers, have tests of their own.
POINTS = [
    (f, a)
    for f, (_, arguments) in GOOD.items()
    for a, v in arguments.items()
    if isinstance(v, torch.Tensor) and a != "log_weights"
]
NUMBERS = [(f, a) for f, (_, arguments) in GOOD.items() for a, v in arguments.items() if isinstance(v, float)]
TIMES = [(f, a) for f, a in NUMBERS if a in ("tau", "h")]
NOISY = [op.name for op in OPS if op.noise]


def call(function: str, **changes: Any) -> Any:
    f, arguments = GOOD[function]
    return f(**{**arguments, **changes})


def message(error: type[Exception], function: str, **changes: Any) -> str:
    with pytest.raises(error) as caught:
        call(function, **changes)
    text = str(caught.value)
    assert text.startswith(function)
    return text


@pytest.mark.parametrize("function", GOOD)
def test_the_good_call_works(function: str) -> None:
    call(function)


@pytest.mark.parametrize(("function", "argument"), POINTS)
def test_points(function: str, argument: str) -> None:
    good = GOOD[function][1][argument]
    bad = [
        (TypeError, good.tolist(), "must be a torch.Tensor, got list"),
        (TypeError, good.numpy(), "got ndarray"),
        (TypeError, good.long(), "floating dtype, got torch.int64"),
        (ValueError, good[0], "shape"),
        (ValueError, good[:0], "must not be empty"),
        (ValueError, good[:, :0], "must not be empty"),
        (ValueError, good.index_fill(0, torch.tensor(1), torch.nan), "must be finite"),
        (ValueError, good.index_fill(0, torch.tensor(1), torch.inf), "must be finite"),
    ]
    for error, value, part in bad:
        text = message(error, function, **{argument: value})
        assert part in text
        assert argument in text


def quantized(t: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)


Convert = Callable[[torch.Tensor], torch.Tensor]
# What is no dense floating tensor, and the part of the message that names it.
UNUSUAL: dict[str, tuple[Convert, str]] = {
    "sparse": (lambda t: t.to_sparse(), "dense tensor, got layout sparse_coo; its to_dense() gives one"),
    "csr": (lambda t: t.to_sparse_csr(), "dense tensor, got layout sparse_csr"),
    "csc": (lambda t: t.to_sparse_csc(), "dense tensor, got layout sparse_csc"),
    "bsr": (lambda t: t.to_sparse_bsr((1, 1)), "dense tensor, got layout sparse_bsr"),
    "bsc": (lambda t: t.to_sparse_bsc((1, 1)), "dense tensor, got layout sparse_bsc"),
    "mkldnn": (lambda t: t.to_mkldnn(), "dense tensor, got layout _mkldnn; its to_dense() gives one"),
    "nested": (
        lambda t: torch.nested.nested_tensor([t, t[:1]]),
        "dense tensor, got a nested tensor; its unbind() gives dense ones",
    ),
    "jagged": (
        lambda t: torch.nested.nested_tensor([t, t[:1]], layout=torch.jagged),
        "dense tensor, got a nested tensor",
    ),
    "masked": (
        lambda t: torch.masked.masked_tensor(t, t == t),
        "dense tensor, got a masked tensor; its get_data() gives one",
    ),
    "quantized": (quantized, "floating dtype, got torch.quint8"),
    "complex": (lambda t: t.to(torch.complex64), "floating dtype, got torch.complex64"),
    "integer": (lambda t: t.long(), "floating dtype, got torch.int64"),
    "boolean": (lambda t: t > 0, "floating dtype, got torch.bool"),
    "eight bits": (lambda t: t.to(torch.float8_e4m3fn), "floating dtype, got torch.float8_e4m3fn"),
}
ALL_UNUSUAL = pytest.mark.parametrize(("convert", "part"), UNUSUAL.values(), ids=UNUSUAL)


@pytest.mark.filterwarnings("ignore")  # that sparse, nested and masked tensors are not final in PyTorch
@ALL_UNUSUAL
@pytest.mark.parametrize(("function", "argument"), POINTS)
def test_unusual_points(function: str, argument: str, convert: Convert, part: str) -> None:
    text = message(TypeError, function, **{argument: convert(GOOD[function][1][argument])})
    assert f"{argument} must " in text
    assert part in text


@pytest.mark.filterwarnings("ignore")
@ALL_UNUSUAL
@pytest.mark.parametrize("function", NOISY)
def test_unusual_noise(function: str, convert: Convert, part: str) -> None:
    text = message(TypeError, function, noise=convert(torch.randn(5, 2)))
    assert "noise must " in text
    assert part in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize(("function", "argument"), NUMBERS)
def test_unusual_numbers(function: str, argument: str, kind: str) -> None:
    convert, part = UNUSUAL[kind]
    text = message(TypeError, function, **{argument: convert(torch.full((1, 1), 0.5))})
    assert f"{argument} must " in text
    assert part.replace("floating dtype, got", "floating tensor, got dtype") in text


@pytest.mark.parametrize("seed", [torch.tensor(3).to_sparse(), torch.nested.nested_tensor([torch.tensor([3])])])
@pytest.mark.parametrize("function", NOISY)
def test_unusual_seeds(function: str, seed: torch.Tensor) -> None:
    assert "seed must be a dense tensor, got" in message(TypeError, function, seed=seed)


def test_negative_views() -> None:
    """PyTorch stores their numbers with the opposite sign."""
    x = torch.view_as_complex(torch.randn(5, 2, 2)).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(fk.kde_score(x, x, 0.1), fk.kde_score(x.clone(), x.clone(), 0.1))


@pytest.mark.parametrize(("function", "argument"), POINTS)
def test_mixed_dtypes_and_devices(function: str, argument: str) -> None:
    good = GOOD[function][1][argument]
    first = next(iter(GOOD[function][1]))
    if argument != first:
        assert argument in message(TypeError, function, **{argument: good.double()})
        assert argument in message(ValueError, function, **{argument: good.to("meta")})


@pytest.mark.parametrize(("function", "argument"), POINTS)
def test_last_dimensions_must_agree(function: str, argument: str) -> None:
    if argument != "values":  # which may be of any width
        wider = torch.cat([GOOD[function][1][argument]] * 2, dim=-1)
        text = message(ValueError, function, **{argument: wider})
        assert "[5, 4]" in text or "[7, 4]" in text or "[4, 4]" in text or "2, got shape" in text or "4, got" in text


@pytest.mark.parametrize("function", GOOD)
def test_leading_dimensions_must_broadcast(function: str) -> None:
    first = next(iter(GOOD[function][1]))
    x = GOOD[function][1][first].expand(3, 5, 2)
    changes = {first: x, "refs": REFS.expand(2, 7, 2)}
    assert "do not broadcast: " in message(ValueError, function, **changes)


@pytest.mark.parametrize(("function", "argument"), NUMBERS)
def test_numbers(function: str, argument: str) -> None:
    for error, value in [
        (ValueError, -1.0),
        (ValueError, float("nan")),
        (ValueError, float("inf")),
        (ValueError, torch.tensor(-1.0)),
        (ValueError, torch.tensor(float("nan"))),
        (TypeError, "0.1"),
        (TypeError, None),
        (TypeError, True),
        (TypeError, torch.tensor(1)),
        (ValueError, torch.ones(3)),
        (ValueError, torch.ones(2, 3, 5)),
    ]:
        assert argument in message(error, function, **{argument: value})


@pytest.mark.parametrize("function", GOOD)
def test_zero_bandwidth(function: str) -> None:
    for zero in (0.0, torch.tensor(0.0)):
        text = message(ValueError, function, sigma2=zero)
        assert "sigma2 must be a positive finite number, got 0.0" in text


@pytest.mark.parametrize(("function", "argument"), TIMES)
def test_numbers_beyond_float32(function: str, argument: str) -> None:
    assert "in torch.float32, got 1e+39" in message(ValueError, function, **{argument: 1e39})
    assert argument in message(ValueError, function, **{argument: torch.tensor(1e39, dtype=torch.float64)})


@pytest.mark.parametrize("function", GOOD)
def test_bandwidth_below_float32(function: str) -> None:
    assert "sigma2" in message(ValueError, function, sigma2=1e-50)
    assert "sigma2" in message(ValueError, function, sigma2=torch.tensor(1e-50, dtype=torch.float64))


@pytest.mark.parametrize(("function", "argument"), TIMES)
def test_zero_time_is_fine(function: str, argument: str) -> None:
    call(function, **{argument: 0.0})
    call(function, **{argument: torch.tensor(0.0)})


@pytest.mark.parametrize("function", NOISY)
def test_noise_and_seed(function: str) -> None:
    shape = noises(torch.randn(1 + NUM_STEPS, 5, 2))[BY_NAME[function].noise].shape
    call(function, noise=torch.randn(shape))
    assert "not both" in message(ValueError, function, noise=torch.randn(shape), seed=1)
    assert "noise must have shape" in message(ValueError, function, noise=torch.randn(*shape, 1))
    assert "noise" in message(TypeError, function, noise=torch.randn(shape).double())
    assert "noise" in message(ValueError, function, noise=torch.full(shape, torch.nan))
    assert "seed" in message(TypeError, function, seed=1.5)
    assert "seed" in message(TypeError, function, seed=True)
    assert "seed" in message(TypeError, function, seed=torch.tensor(1.0))
    assert "2^64" in message(ValueError, function, seed=2**64)


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, None])
def test_num_steps(num_steps: object) -> None:
    for function in (op.name for op in OPS if op.takes_num_steps):
        assert "num_steps must be a positive integer" in message(ValueError, function, num_steps=num_steps)


def test_values_need_a_row_for_each_end() -> None:
    assert "[4] + [V]" in message(ValueError, "transition_average", values=torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"values must have shape \[5\] \+ \[V\]"):
        call("flux_pass").transition_average(torch.randn(6, 1))


def test_field_has_the_shape_of_z() -> None:
    text = message(ValueError, "residual_gradient", field=torch.randn(4, 2))
    assert "field must have the shape of z, [5, 2], got [4, 2]" in text


def test_bandwidths_by_group_and_query() -> None:
    x, refs = torch.randn(3, 5, 2), torch.randn(3, 7, 2)
    per_group, per_query = torch.rand(3) + 0.1, torch.rand(3, 5) + 0.1
    by_group = fk.kde_score(x, refs, per_group)
    by_query = fk.kde_score(x, refs, per_query)
    for g in range(3):
        expected = fk.kde_score(x[g], refs[g], per_group[g].item())
        torch.testing.assert_close(by_group[g], expected)
        for n in range(5):
            one = fk.kde_score(x[g, n : n + 1], refs[g], per_query[g, n].item())
            torch.testing.assert_close(by_query[g, n], one[0])
    one_a_query = fk.kde_score(x[0], refs[0], per_query[0])
    torch.testing.assert_close(one_a_query, by_query[0])
    with pytest.raises(ValueError, match="tau must be a number or have one entry per group"):
        fk.langevin_chain(x, refs, 0.1, per_query)
    with pytest.raises(ValueError, match=r"one entry per group, shape \[\] or one per query, \[5\], got \[5, 1\]"):
        fk.kde_score(x[0], refs[0], per_query[0][:, None])


def test_several_leading_dimensions() -> None:
    x, refs = torch.randn(2, 1, 5, 3), torch.randn(4, 6, 3)
    sigma2 = torch.rand(2, 4) + 0.1
    s = fk.kde_score(x, refs, sigma2)
    assert s.shape == (2, 4, 5, 3)
    torch.testing.assert_close(s[1, 2], fk.kde_score(x[1, 0], refs[2], sigma2[1, 2]))


def test_numbers_of_other_libraries() -> None:
    expected = call("langevin_chain", sigma2=0.5, tau=1.0, seed=3)
    for number in (np.float32(0.5), np.float64(0.5), torch.nn.Parameter(torch.tensor(0.5))):
        torch.testing.assert_close(call("langevin_chain", sigma2=number, tau=1, seed=np.int64(3)), expected)


def test_large_finite_sums_are_not_mistaken_for_infinity() -> None:
    x = torch.full((3, 1), 3e38)
    assert fk.kde_mean(x, x, 1.0).isfinite().all()


class Copies(TorchDispatchMode):
    """Count the operations that copy a tensor to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = {t.device for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        if devices and isinstance(result, torch.Tensor) and result.device not in devices:
            self.count += 1
        return result


# Tensors without data stand for those of an accelerator.
ELSEWHERE = torch.device("meta")


def number_on(device: torch.device, name: str, value: Any) -> torch.Tensor:
    if name == "seed":
        return philox.as_seed(value, device, "f: seed")
    return checks.as_number_tensor("f", name, value, like=torch.empty(1, 1, device=device))


@pytest.mark.parametrize(("name", "value"), [("sigma2", 0.5), ("seed", 7)])
def test_numbers_reach_the_device_without_a_copy(name: str, value: float) -> None:
    """A copy from the CPU would wait until the device has finished."""
    dtype = torch.int64 if name == "seed" else torch.float32
    for given in (value, torch.tensor(value), torch.tensor(value, device=ELSEWHERE)):
        with Copies() as copies:
            got = number_on(ELSEWHERE, name, given)
        assert (got.device.type, got.dtype, got.shape, copies.count) == ("meta", dtype, (), 0)
    assert number_on(torch.device("cpu"), name, torch.tensor(value)) == value


def test_a_number_on_the_cpu_keeps_its_gradient() -> None:
    with Copies() as copies:
        got = number_on(ELSEWHERE, "sigma2", torch.tensor(0.5, requires_grad=True))
    assert got.requires_grad
    assert copies.count == 1


def test_a_number_on_the_cpu_is_checked_wherever_the_points_are() -> None:
    with pytest.raises(ValueError, match=r"f: sigma2 must be a positive finite number, got -1\.0"):
        number_on(ELSEWHERE, "sigma2", torch.tensor(-1.0))
    with pytest.raises(ValueError, match=r"got 0\.0"):
        number_on(ELSEWHERE, "sigma2", torch.tensor(1e-50, dtype=torch.float64).float())


@pytest.mark.parametrize(("name", "value"), [("sigma2", 0.5), ("tau", 0.5), ("seed", 7)])
def test_a_capture_takes_numbers_and_tensors_of_its_device(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "capturing", lambda: True)
    for given in (value, torch.tensor(value, device=ELSEWHERE)):
        assert number_on(ELSEWHERE, name, given).device == ELSEWHERE
    with pytest.raises(ValueError, match=rf"f: {name} must be on meta while a CUDA graph is captured, got .* on cpu"):
        number_on(ELSEWHERE, name, torch.tensor(value))


def test_ops_name_the_argument_that_a_capture_cannot_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "capturing", lambda: True)
    x = X.to(ELSEWHERE)
    on_cpu = torch.tensor(0.5)
    for argument, changes in {
        "sigma2": {"sigma2": on_cpu},
        "tau": {"tau": on_cpu},
        "seed": {"seed": torch.tensor(7)},
    }.items():
        given = {"sigma2": 0.5, "tau": 0.5, "seed": 7} | changes
        with pytest.raises(ValueError, match=f"flux_pass: {argument} must be on meta while"):
            fk.flux_pass(x, x, backend="torch", **given)


def test_values_on_a_gpu_are_never_read() -> None:
    with FakeTensorMode():
        t = torch.full((2, 2), torch.nan, device="cuda")
        assert not checks.can_check_values(t)
        checks.check_finite("f", x=t)
