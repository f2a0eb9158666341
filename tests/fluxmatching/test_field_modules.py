"""Networks inside of a field: found, without parameter gradients at the end of a chain, refused with batch norm."""

import threading
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fluxmatching import Draws, LossNormalizer, ODESolver, log_likelihood
from fluxmatching.field_modules import DetachedParameters, networks_of, reachable_from
from fluxmatching.losses.second_derivatives import endpoint_gradient
from fluxmatching.randomness import SharedDropout
from tests.support.losses import annealed_loss, flux_loss, target_of

F64 = torch.float64


def mlp(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), *middle, nn.Tanh(), nn.Linear(16, 2)).double()


class Owner:
    def __init__(self) -> None:
        self.net = mlp()

    def field(self, z: Tensor) -> Tensor:
        return self.net(z)


GLOBAL = mlp()


class Wrapper:
    def __init__(self, net: nn.Module) -> None:
        self.parts = {"nets": [net]}

    def __call__(self, z: Tensor) -> Tensor:
        return self.parts["nets"][0](z)


def of_a_global(z: Tensor) -> Tensor:
    return GLOBAL(z)


def test_networks_are_found_in_globals_attributes_and_containers() -> None:
    """As in a script, where a field is a function of names at its top."""
    assert networks_of(of_a_global) == [GLOBAL]
    assert networks_of(lambda z: of_a_global(z)) == [GLOBAL]
    owner, net = Owner(), mlp()
    assert networks_of(owner.field) == [owner.net]
    assert networks_of(Wrapper(net)) == [net]
    assert networks_of(lambda z: (lambda y: GLOBAL(y))(z)) == [GLOBAL]
    assert networks_of(lambda z: z.GLOBAL) == []  # the name of an attribute is no global one
    wrapper = Wrapper(net)
    assert networks_of(lambda z, *, by=wrapper: by(z)) == [net]


def test_a_field_may_close_over_a_data_set() -> None:
    rows, net = [[float(i)] for i in range(100_000)], mlp()
    field = lambda z: net(z) + len(rows)  # noqa: E731
    assert networks_of(field) == [net]
    assert len(list(reachable_from(field))) <= 2000


def test_networks_are_found_where_callables_show_them() -> None:
    net, other = mlp(), mlp()
    assert networks_of(net) == [net]
    assert networks_of(lambda z: net(z)) == [net]
    assert networks_of(partial(lambda n, z: n(z), net)) == [net]
    assert networks_of(lambda z, n=net: n(z)) == [net]
    assert networks_of(net.forward) == [net]
    inner = lambda z: other(z)  # noqa: E731
    assert set(networks_of(lambda z: net(z) + inner(z))) == {net, other}
    assert networks_of(torch.sin) == []


@pytest.mark.parametrize("second_derivatives", ["double_backward", "forward_over_reverse", "finite_difference"])
def test_nothing_is_kept_for_gradients_of_parameters(second_derivatives: str) -> None:
    """The first layer's input is wanted for its weight's gradient alone, so no graph may hold it."""
    net, x = mlp(), torch.randn(8, 2, dtype=F64)
    wanted = []
    for p in net.parameters():
        p.register_hook(lambda g: wanted.append(g))
    target = target_of(net, x, 0.7, seed=1, second_derivatives=second_derivatives)
    assert wanted == []
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    target.loss(net).sum().backward()
    assert len(wanted) == 4


def test_detached_parameters_save_memory_until_the_block_ends() -> None:
    net, z = mlp(), torch.randn(100, 2, dtype=F64, requires_grad=True)

    def stored() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda _: None):
            net(z)
        return sum(sizes)

    before = stored()
    with DetachedParameters():
        assert stored() < before
        assert all(p.requires_grad for p in net.parameters())
    assert stored() == before
    with pytest.raises(ZeroDivisionError), DetachedParameters():
        _ = 1 / 0
    assert stored() == before


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 4),
        nn.LSTM(4, 4),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3, padding=1), nn.GroupNorm(1, 2)),
    ],
)
def test_no_kind_of_layer_reaches_its_parameters(layer: nn.Module) -> None:
    z = torch.randn(3, 5, 4).requires_grad_() if not isinstance(layer, nn.Sequential) else torch.randn(3, 4)
    z.requires_grad_()
    with DetachedParameters():
        out = layer(z)
    out = out[0] if isinstance(out, tuple) else out
    found: set[Any] = set()
    waiting = [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [other for other, _ in node.next_functions]
    assert [node.variable is z for node in found if hasattr(node, "variable")] == [True]


@pytest.mark.parametrize("second_derivatives", ["double_backward", "forward_over_reverse", "finite_difference"])
def test_batch_norm_is_refused_while_it_trains(second_derivatives: str) -> None:
    net, x = mlp(nn.BatchNorm1d(16)), torch.randn(8, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"each sample by itself, but its layer '1' is a BatchNorm1d in training mode"):
        flux_loss(net, x, 0.7, second_derivatives=second_derivatives)
    with pytest.raises(ValueError, match="BatchNorm1d in training mode"):
        annealed_loss(lambda z, s: net(z), x, 0.7, LossNormalizer(), second_derivatives=second_derivatives)
    assert flux_loss(net.eval(), x, 0.7, second_derivatives=second_derivatives).isfinite().all()
    assert flux_loss(mlp(nn.GroupNorm(4, 16)), x, 0.7, second_derivatives=second_derivatives).isfinite().all()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_compiled_network_is_never_differentiated_twice(frozen: bool) -> None:
    """PyTorch says so only while parameters need gradients; without, second derivatives would be missing."""
    net, x = mlp().requires_grad_(not frozen), torch.randn(8, 2, dtype=F64)
    in_place, compiled = mlp(), torch.compile(net, backend="aot_eager")
    in_place.compile(backend="aot_eager")
    function = torch.compile(lambda z: net(z), backend="aot_eager")
    expected = target_of(net, x, 0.7, seed=1).target
    for field in (compiled, in_place, function, lambda z: compiled(z), nn.Sequential(compiled)):
        with pytest.raises(
            RuntimeError,
            match=r"no double backward.*second_derivatives='finite_difference' needs first derivatives only",
        ):
            target_of(field, x, 0.7, seed=1)
        central = target_of(field, x, 0.7, seed=1, second_derivatives="finite_difference").target
        torch.testing.assert_close(central, expected, rtol=1e-3, atol=1e-4)


class Broken(nn.Module):
    """A network that torch.compile runs in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.net[:-1](z)
        for k in range(2):
            torch._dynamo.graph_break()
            hidden = hidden + 0.1 * k
            torch._dynamo.graph_break()
            hidden = hidden - 0.3
        return self.net[-1](hidden)


@pytest.mark.parametrize("whole", [False, True])
def test_a_network_compiled_in_pieces_computes_the_same(whole: bool) -> None:
    """From the first call on, by itself and inside of a loss that is compiled."""
    torch.compiler.reset()
    field, x = Broken(), torch.randn(8, 2, dtype=F64)

    def loss(field: nn.Module, x: Tensor) -> Tensor:
        return flux_loss(field, x, 0.7, seed=1, second_derivatives="finite_difference", backend="torch")

    expected = loss(field, x)
    called = torch.compile(loss, backend="eager") if whole else loss
    compiled = field if whole else torch.compile(field, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(called(compiled, x), expected, rtol=1e-12, atol=1e-13)
    torch.compiler.reset()


@pytest.mark.parametrize("second_derivatives", ["double_backward", "finite_difference"])
def test_activations_may_be_checkpointed(second_derivatives: str) -> None:
    """Computed a second time in the backward pass, with the dropout masks of the first."""
    net, x = mlp(nn.Dropout(0.5)), torch.randn(8, 2, dtype=F64)

    def checkpointed(z: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(net[:-1], z, use_reentrant=False)
        return net[-1](hidden)

    losses, gradients = [], []
    for field in (net, checkpointed):
        torch.manual_seed(3)
        loss = flux_loss(field, x, 0.7, seed=1, second_derivatives=second_derivatives)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.mean(), list(net.parameters())))
    assert torch.equal(*losses)
    torch.testing.assert_close(gradients[1], gradients[0])


class Watched(nn.Module):
    """A network that lets another thread look at everything of the user's while it is evaluated."""

    def __init__(self, look: Callable[[], None], dropout: float) -> None:
        super().__init__()
        self.net, self.look = mlp(nn.Dropout(dropout)), look

    def forward(self, z: Tensor, sigma: Tensor | None = None) -> Tensor:
        thread = threading.Thread(target=self.look)
        thread.start()
        thread.join()
        return self.net(z)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "call",
    [
        lambda field, x: flux_loss(field, x, 0.7, seed=1, second_derivatives="double_backward").mean(),
        lambda field, x: flux_loss(field, x, 0.7, seed=1, second_derivatives="finite_difference").mean(),
        lambda field, x: flux_loss(field, x, 0.7, seed=1, second_derivatives="forward_over_reverse").mean(),
        lambda field, x: log_likelihood(field, x, sigma_min=0.1, sigma_max=0.2, solver=ODESolver(rtol=0.1, atol=0.1)),
    ],
)
def test_another_thread_sees_nothing_change(call: Callable[..., Tensor], dropout: float) -> None:
    """Neither flags nor modes of the network; it can train it meanwhile, and its random numbers do not repeat."""
    seen: list[Tensor] = []

    def look() -> None:
        assert all(p.requires_grad for p in field.parameters())
        assert field.training
        assert torch.is_grad_enabled()
        found = torch.autograd.grad(field.net(torch.ones(1, 2, dtype=F64)).sum(), list(field.parameters()))
        assert all(gradient.abs().sum() > 0 for gradient in found[2:])
        seen.append(torch.rand(()))

    field = Watched(look, dropout)
    call(field, torch.randn(8, 2, dtype=F64))
    assert len(seen) >= 2
    assert len(torch.stack(seen).unique()) == len(seen)


class BesideAThread(nn.Module):
    """A compiled network, in whose first evaluations another thread draws random numbers."""

    def __init__(self, disturbed: int) -> None:
        super().__init__()
        self.net, self.disturbed = torch.compile(mlp(), backend="eager"), disturbed

    def forward(self, z: Tensor) -> Tensor:
        self.disturbed -= 1
        if self.disturbed >= 0:
            thread = threading.Thread(target=lambda: torch.rand(3))
            thread.start()
            thread.join()
        return self.net(z)


def test_random_numbers_of_another_thread_are_not_those_of_a_compiled_field() -> None:
    x = torch.randn(8, 2, dtype=F64)
    options: dict[str, Any] = {"seed": 1, "second_derivatives": "finite_difference"}
    expected = target_of(mlp(), x, 0.7, **options).target
    assert torch.equal(target_of(BesideAThread(2), x, 0.7, **options).target, expected)
    with pytest.raises(NotImplementedError, match="the field is compiled and draws random numbers"):
        target_of(BesideAThread(3), x, 0.7, **options)


def test_a_field_of_one_label_per_sample_is_explained() -> None:
    net, x, labels = mlp(), torch.randn(8, 2, dtype=F64), torch.randn(8, 1, dtype=F64)
    field = lambda z: net(z) * labels  # noqa: E731
    assert target_of(field, x, 0.7, second_derivatives="double_backward").target.isfinite().all()
    with pytest.raises(
        RuntimeError, match=r"takes 8 rows but not 16 \(The size of tensor a .*must be part of z, or use"
    ):
        target_of(field, x, 0.7, second_derivatives="finite_difference")
    with pytest.raises(RuntimeError, match=r"^The size of tensor a"):
        target_of(lambda z: net(z) * labels[:3], x, 0.7, second_derivatives="finite_difference")


def test_both_sides_of_a_difference_go_through_the_network_at_once() -> None:
    """Unless it draws random numbers, by a layer or by a function."""
    sizes: list[int] = []

    def counted(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return net(z)

    for middle, expected in (
        ([], [16]), ([nn.Dropout(0.5)], [8, 8]), ([nn.Dropout(0.0)], [16]), ([nn.Dropout(0.5).eval()], [16]),
        ([Noisy()], [16, 8, 8]),
    ):  # fmt: skip
        sizes.clear()
        net = mlp(*middle)
        target_of(counted, torch.randn(8, 2, dtype=F64), 0.7, seed=1, second_derivatives="finite_difference")
        assert sizes == expected, middle


class Noisy(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rand_like(z) + torch.nn.functional.dropout(z, 0.3)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.AlphaDropout(0.3), Noisy()])
def test_a_finite_difference_has_the_same_random_numbers_on_both_sides(layer: nn.Module) -> None:
    """The exact derivative with the same numbers; a difference of masks would be a thousand times larger."""
    net, x = mlp(layer), torch.randn(8, 2, dtype=F64)
    torch.manual_seed(3)
    if isinstance(layer, Noisy):  # the call for both sides at once has drawn before it is repeated
        layer(torch.empty(16, 16, dtype=F64))
    exact = target_of(net, x, 0.7, seed=1, second_derivatives="double_backward").target
    torch.manual_seed(3)
    difference = target_of(net, x, 0.7, seed=1, second_derivatives="finite_difference").target
    torch.testing.assert_close(difference, exact, rtol=1e-3, atol=1e-4)


class NoisyByItself(nn.Module):
    """A network that draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.generator, self.sizes = mlp(), torch.Generator(), []

    def forward(self, z: Tensor) -> Tensor:
        self.sizes.append(len(z))
        return self.net(z * (torch.rand(z.shape, generator=self.generator, dtype=z.dtype) < 0.5))


class NoisyByAGlobal(NoisyByItself):
    def forward(self, z: Tensor) -> Tensor:
        return self.net(z * torch.rand(z.shape, generator=GENERATOR, dtype=z.dtype))


GENERATOR = torch.Generator()


@pytest.mark.parametrize("held", ["by itself", "by a closure", "by a global name"])
def test_random_numbers_of_a_generator_of_its_own_are_noticed(held: str) -> None:
    net, x, inner, generator = NoisyByItself(), torch.randn(8, 2, dtype=F64), mlp(), torch.Generator()
    noisy = lambda z: inner(z * torch.rand(z.shape, generator=generator, dtype=z.dtype))  # noqa: E731
    field = {"by itself": net, "by a closure": noisy, "by a global name": nn.Sequential(NoisyByAGlobal())}[held]
    for own in (net.generator, generator, GENERATOR):
        own.manual_seed(3)
        torch.rand(16, 2, generator=own, dtype=F64)  # the call for both sides at once
    exact = target_of(field, x, 0.7, seed=1, second_derivatives="double_backward").target
    for own in (net.generator, generator, GENERATOR):
        own.manual_seed(3)
    difference = target_of(field, x, 0.7, seed=1, second_derivatives="finite_difference").target
    torch.testing.assert_close(difference, exact, rtol=1e-3, atol=1e-4)
    assert net.sizes == ([8, 16, 8, 8] if field is net else [])


@pytest.mark.parametrize("second_derivatives", ["double_backward", "forward_over_reverse", "finite_difference"])
def test_cached_parametrizations_are_refused(second_derivatives: str) -> None:
    net, x = mlp(), torch.randn(8, 2, dtype=F64)
    with nn.utils.parametrize.cached():
        assert flux_loss(net, x, 0.7, second_derivatives=second_derivatives).isfinite().all()
        nn.utils.parametrizations.weight_norm(net[0])
        with pytest.raises(RuntimeError, match=r"flux_matching_loss: .*parametrize\.cached\(\) must not be active"):
            flux_loss(net, x, 0.7, second_derivatives=second_derivatives)
        with pytest.raises(RuntimeError, match=r"log_likelihood: .*parametrize\.cached\(\) must not be active"):
            log_likelihood(lambda z, sigma: net(z), x)


def test_random_numbers_that_cannot_be_drawn_again_are_refused() -> None:
    net, x = mlp(nn.RReLU()), torch.randn(8, 2, dtype=F64)
    with pytest.raises(
        NotImplementedError, match=r"aten\.rrelu_with_noise.*'double_backward', put the field into eval"
    ):
        target_of(net, x, 0.7, second_derivatives="finite_difference")
    assert target_of(net.eval(), x, 0.7, second_derivatives="finite_difference").target.isfinite().all()


@pytest.mark.parametrize("second_derivatives", ["double_backward", "finite_difference"])
def test_dropout_of_all_samples_differs_from_call_to_call(second_derivatives: str) -> None:
    net, x = mlp(nn.Dropout(0.5)), torch.randn(8, 2, dtype=F64)
    first, second = (target_of(net, x, 0.7, seed=1, second_derivatives=second_derivatives).target for _ in range(2))
    assert not torch.equal(first, second)


class TestShareOfEndpoints:
    @pytest.mark.parametrize("estimator", ["cross_chain", "single_chain"])
    @pytest.mark.parametrize("grouped", [False, True])
    def test_mean_over_all_choices_is_the_whole(self, estimator: str, grouped: bool, backend: str) -> None:
        net = mlp()
        x = torch.randn(5, 3, 2, dtype=F64) if grouped else torch.randn(5, 2, dtype=F64)
        options = {"estimator": estimator, "grouped": grouped, "seed": 2}
        whole = target_of(net, x, 0.7, **options).target
        parts = [
            target_of(net, x, 0.7, draws=Draws(endpoints=torch.tensor(chosen)), **options).target
            for chosen in combinations(range(5), 2)
        ]
        torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-12, atol=1e-13)

    def test_only_they_go_through_the_field(self, backend: str) -> None:
        sizes: list[int] = []

        def field(z: Tensor) -> Tensor:
            sizes.append(len(z))
            return -z

        target_of(field, torch.randn(10, 2), 0.7, second_derivatives="double_backward", endpoint_fraction=0.25)
        assert sizes == [2]
        target_of(
            field, torch.randn(10, 2), 0.7, second_derivatives="double_backward", endpoint_fraction=1e-9, chunk_size=1
        )
        assert sizes[1:] == [1]

    def test_a_seed_fixes_the_choice(self, backend: str) -> None:
        net, x = mlp(), torch.randn(10, 2, dtype=F64)
        first, second, other = (target_of(net, x, 0.7, seed=s, endpoint_fraction=0.3).target for s in (1, 1, 2))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), True, "half"])
    def test_bad_share(self, share: object) -> None:
        with pytest.raises(ValueError, match=r"endpoint_fraction must lie in \(0, 1\], got"):
            flux_loss(lambda z: -z, torch.randn(4, 2), 0.7, endpoint_fraction=share)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("chosen", "error"),
        [
            ([0.5], TypeError),
            ([], TypeError),
            ([[0]], TypeError),
            ([4], ValueError),
            ([-1], ValueError),
            ([1, 1], ValueError),
        ],
    )
    def test_bad_choice(self, chosen: list[float], error: type[Exception]) -> None:
        with pytest.raises(error, match=r"draws\.endpoints must be"):
            flux_loss(lambda z: -z, torch.randn(4, 2), 0.7, draws=Draws(endpoints=torch.tensor(chosen)))


class DropoutAndOthers(nn.Module):
    """Layers of dropout, one of them twice, and other random numbers: noise, or ones that leave a layer out."""

    def __init__(self, other: str, dropout: float = 0.5) -> None:
        super().__init__()
        self.first, self.last, self.dropout, self.other = mlp(), mlp(), nn.Dropout(dropout), other
        self.inplace = nn.Dropout(0.2, inplace=True)

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.dropout(self.first(z))
        if self.other != "layers" or torch.rand(()) < 0.5:
            hidden = hidden + self.inplace(self.dropout(self.last(z)))
        return hidden + (0.1 * z * torch.rand_like(z) if self.other == "noise" else 0)


@pytest.mark.parametrize(("other", "dropout"), [("none", 0.5), ("noise", 0.5), ("layers", 0.5), ("none", 1.0)])
def test_dropout_beside_other_random_numbers(other: str, dropout: float) -> None:
    """A difference of unequal masks or numbers over a small step would be large."""
    torch.manual_seed(3)
    field, z = DropoutAndOthers(other, dropout), torch.randn(6, 2, dtype=F64)
    found = [
        endpoint_gradient(field, z, torch.zeros_like(z), torch.ones_like(z), method="finite_difference")[0]
        for _ in range(20)
    ]
    assert all(gradient.abs().max() < 20 for gradient in found)
    assert dropout == 1 or not torch.equal(found[0], found[1])


def test_shared_dropout_is_that_of_pytorch() -> None:
    x = torch.ones(1000, dtype=torch.bfloat16)
    for p in (0.1, 0.5, 1.0):
        shared = SharedDropout()
        torch.manual_seed(1)
        with shared.recorded():
            first = torch.nn.functional.dropout(x, p)
        with shared.replayed():
            second = torch.nn.functional.dropout(x.clone(), p, inplace=True)
        assert torch.equal(first, second)
        assert first.unique().tolist() == sorted({0.0, *([] if p == 1 else [float(x[0] * (1 / (1 - p)))])})
    with shared.replayed(), pytest.raises(RuntimeError, match="draws other masks"):
        torch.nn.functional.dropout(x[:10], 0.5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_a_scripted_network_is_a_field() -> None:
    network = torch.jit.script(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)))
    x = torch.randn(8, 2)
    flux_loss(network, x, 0.5, seed=0).mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
