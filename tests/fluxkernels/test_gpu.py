"""Tests that need a GPU: graphs, streams, devices, memory, and numbers equal to those of the CPU.

`make gpu` runs this file and tests/fluxkernels/test_triton.py, which runs the cases of all other tests natively there.
"""

import pytest
import torch
from torch import Tensor

import fluxkernels as fk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# (groups, points, dimensions): kernels of streaming/ and of gram/, and many reference points.
SHAPES = [(3, 100, 2), (1, 700, 7), (2, 65, 16), (2, 65, 17), (1, 128, 200), (1, 1100, 24)]


def points(groups: int, count: int, dimensions: int) -> Tensor:
    return torch.randn(groups, count, dimensions, generator=torch.Generator().manual_seed(0))


def whole_step(x: Tensor, sigma2: Tensor, seed: int | Tensor, backend: str | None = None) -> list[Tensor]:
    step = fk.flux_pass(x, x, sigma2, 1.0, seed=seed, backend=backend)
    return [step.x0, step.score0, step.xt, step.score_t, step.transition_average(step.score_t)]


def relative(got: Tensor, truth: Tensor) -> float:
    return float((got.cpu().double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_same_seed_same_step_as_on_the_cpu(shape: tuple[int, int, int]) -> None:
    x, sigma2 = points(*shape), torch.full((shape[0],), 0.3 * shape[2])
    assert fk.resolve_backend(None, "cuda") == "triton"
    for got, truth in zip(whole_step(x.cuda(), sigma2.cuda(), 7), whole_step(x, sigma2, 7, "torch"), strict=True):
        assert relative(got, truth) < 2e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_graph_replays_with_new_data_and_a_new_seed(shape: tuple[int, int, int]) -> None:
    x, sigma2 = points(*shape).cuda(), torch.full((shape[0],), 0.3 * shape[2], device="cuda")
    seed = torch.tensor(1, device="cuda")
    whole_step(x, sigma2, seed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = whole_step(x, sigma2, seed)
    for value in (2, 3):
        x.copy_(points(*shape).roll(value, 1) * value)
        seed.fill_(value)
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        for got, truth in zip(results, whole_step(x, sigma2, value), strict=True):
            assert torch.equal(got, truth)


def test_graph_draws_anew_without_a_seed() -> None:
    x, sigma2 = points(1, 64, 2).cuda(), torch.tensor(0.5, device="cuda")
    fk.langevin_chain(x, x, sigma2, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        xt = fk.langevin_chain(x, x, sigma2, 1.0)
    graph.replay()
    first = xt.clone()
    graph.replay()
    assert not torch.equal(first, xt)


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_the_same_from_run_to_run_and_on_another_stream(shape: tuple[int, int, int]) -> None:
    x, sigma2 = points(*shape).cuda(), torch.full((shape[0],), 0.3 * shape[2], device="cuda")
    first = whole_step(x, sigma2, 5)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = whole_step(x, sigma2, 5)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_device_that_is_not_the_current_one(shape: tuple[int, int, int]) -> None:
    x, sigma2 = points(*shape), torch.full((shape[0],), 0.3 * shape[2])
    first = whole_step(x.to("cuda:0"), sigma2.to("cuda:0"), 5)
    second = whole_step(x.to("cuda:1"), sigma2.to("cuda:1"), 5)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("D", [2, 40])
def test_torch_compile_sees_the_ops_and_their_derivatives(D: int) -> None:
    def loss(x: Tensor, refs: Tensor) -> Tensor:
        return fk.kde_score(x, refs, 0.5 * D).square().sum() + fk.langevin_chain(x, refs, 1.0 * D, 0.7, seed=3).sum()

    x = points(1, 50, D)[0].cuda().requires_grad_()
    refs = points(1, 60, D)[0].cuda()
    (expected,) = torch.autograd.grad(loss(x, refs), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, refs), x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_memory_of_the_grouped_pass_is_that_of_its_results() -> None:
    x = points(500, 256, 2).cuda()
    sigma2 = torch.full((500,), 0.2, device="cuda")
    whole_step(x, sigma2, 1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole_step(x, sigma2, 1)
    assert torch.cuda.max_memory_allocated() - before < 12 * x.numel() * x.element_size()


def test_memory_with_many_refs_stays_below_that_of_the_refs() -> None:
    refs = torch.randn(20_000, 1000, device="cuda")
    x = refs[:4096] + 1.0
    fk.kde_score(x[:64], refs, 1000.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fk.kde_score(x, refs, 1000.0)
    assert torch.cuda.max_memory_allocated() - before < 8 * refs.numel() * refs.element_size()


def test_bad_input_reaches_no_kernel() -> None:
    x = points(1, 8, 2)[0]
    with pytest.raises(fk.BackendError, match="takes tensors on cuda, got cpu"):
        fk.kde_score(x, x, 1.0, backend="triton")
    with pytest.raises(ValueError, match="must be on cuda"):
        fk.kde_score(x.cuda(), x, 1.0)
    with pytest.raises(ValueError, match="sigma2 must be a positive"):
        fk.kde_score(x.cuda(), x.cuda(), -1.0)
    with pytest.raises(TypeError, match="floating dtype"):
        fk.kde_score(x.cuda().long(), x.cuda().long(), 1.0)


def test_layouts_agree_whatever_the_tuning_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxkernels.triton_kernels import launch

    x, sigma2 = points(2, 300, 3), torch.full((2,), 0.4)
    truth = whole_step(x, sigma2, 9, "torch")
    monkeypatch.setattr(launch, "AUTOTUNE", False)
    for layout in launch.LAYOUTS:
        monkeypatch.setattr(launch, "layouts", lambda *_, layout=layout: [layout])
        for got, expected in zip(whole_step(x.cuda(), sigma2.cuda(), 9), truth, strict=True):
            assert relative(got, expected) < 2e-5
