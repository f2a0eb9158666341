"""Networks inside of a field: found, without parameter gradients at the end of a chain, refused with batch norm."""

from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fluxmatching import Draws, LossNormalizer
from fluxmatching.field_modules import _reachable_from, networks_of, parameters_at_rest
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
    assert len(list(_reachable_from(field))) <= 2000


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


def test_at_rest_saves_memory_and_ends_with_the_block() -> None:
    net, z = mlp(), torch.randn(100, 2, dtype=F64, requires_grad=True)
    net[0].weight.requires_grad_(False)

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda _: None):
            net(z)
        return sum(sizes)

    before = kept()
    with parameters_at_rest(net):
        assert not any(p.requires_grad for p in net.parameters())
        assert kept() < before
    assert kept() == before
    with pytest.raises(ZeroDivisionError), parameters_at_rest(net):
        _ = 1 / 0
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]


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
