"""Tests that need a GPU: graphs, streams, devices, memory, and numbers equal to those of the CPU.

`make gpu` runs this file and tests/fluxkernels/test_triton.py, which runs the cases of all other tests natively there.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fluxkernels as fk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# (groups, points, dimensions): kernels of streaming/ and of gram/, and many reference points.
SHAPES = [(3, 100, 2), (1, 700, 7), (2, 65, 16), (2, 65, 17), (1, 128, 200), (1, 1100, 24)]


def points(groups: int, count: int, dimensions: int) -> Tensor:
    return torch.randn(groups, count, dimensions, generator=torch.Generator().manual_seed(0))


def whole_step(x: Tensor, sigma2: Tensor, seed: int | Tensor, backend: str | None = None) -> list[Tensor]:
    step = fk.flux_pass(x, x, sigma2, 1.0, seed=seed, backend=backend)
    return [step.x0, step.score0, step.xt, step.score_t, step.transition_average(step.score_t)]


def bytes_of_a_block() -> int:
    """Products, logits and words of the pairs that are held at once in many dimensions."""
    return 16 * int(importlib.import_module("fluxkernels.triton_kernels.fixed_point.host.limits").MOST_PAIRS)


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
    fk.warm_up(whole_step, x, sigma2, seed, derivatives=False)
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


def test_memory_with_many_refs_is_that_of_a_block_and_of_words() -> None:
    refs = torch.randn(20_000, 1000, device="cuda")
    x = refs[:4096] + 1.0
    fk.kde_score(x[:64], refs, 1000.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fk.kde_score(x, refs, 1000.0)
    # Words of the points are there by rows and by columns, and queries need as much as a tenth of them.
    bound = bytes_of_a_block() + 4 * refs.numel() * refs.element_size()
    assert torch.cuda.max_memory_allocated() - before < bound


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


def captured(call: Any, *arguments: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*arguments)
    return graph


@pytest.mark.parametrize("D", [3, 30])
def test_a_capture_after_warm_up_compiles_nothing(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step, and the derivatives that its op has a kernel for."""
    import triton

    def step(x: Tensor, refs: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(fk.kde_mean(x, refs, 0.5).sum(), x)
        return gradient

    x, refs = points(1, 77, D)[0].cuda().requires_grad_(), points(1, 93, D)[0].cuda()
    fk.warm_up(fk.kde_mean, x, refs, 0.5)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: compiled.append(fn.name))
    captured(step, x, refs).replay()
    torch.cuda.synchronize()
    assert compiled == []


@pytest.mark.parametrize("D", [4, 31])
def test_a_capture_refuses_a_kernel_that_never_ran_and_stays_valid(D: int) -> None:
    x, other = points(1, 59, D)[0].cuda(), points(1, 61, D)[0].cuda().double()
    out = torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        with pytest.raises(fk.BackendError, match="warm_up"):
            fk.kde_score(other, other, 0.7)
        out += 1
    graph.replay()
    assert out.item() == 1
    fk.warm_up(fk.kde_score, x, x, 0.7)
    captured(fk.kde_score, x, x, 0.7).replay()


@pytest.mark.parametrize("argument", ["sigma2", "tau", "seed"])
def test_a_capture_refuses_numbers_on_the_cpu(argument: str) -> None:
    x = points(1, 64, 2)[0].cuda()
    given: dict[str, Any] = {"sigma2": 0.5, "tau": 0.5, "seed": 7}
    fk.flux_pass(x, x, **given)
    captured(lambda: fk.flux_pass(x, x, **given)).replay()  # Python's numbers are filled in by kernels
    given[argument] = torch.tensor(given[argument])
    with pytest.raises(ValueError, match=f"flux_pass: {argument} must be on cuda:0 while a CUDA graph"):
        captured(lambda: fk.flux_pass(x, x, **given))


def test_numbers_on_the_cpu_do_not_make_the_host_wait() -> None:
    x = points(1, 64, 2)[0].cuda()
    sigma2, tau, seed = torch.tensor(0.5), torch.tensor(0.7, dtype=torch.float64), torch.tensor(7)
    expected = fk.langevin_chain(x, x, 0.5, 0.7, seed=7)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = fk.langevin_chain(x, x, sigma2, tau, seed=seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)


# Times of all layouts by key, and the chosen one, as one process finds them.
TUNING = """
import json, torch
import fluxkernels as fk
from fluxkernels.triton_kernels import launch
seconds, measured = {}, launch._seconds
def recorded(choices, run):
    found = measured(choices, run)
    seconds[len(seconds)] = dict(zip(map(str, choices), found))
    return found
launch._seconds = recorded
for groups, count, D in ((1, 256, 2), (1, 1024, 16), (64, 256, 2), (1, 4096, 7)):
    x = torch.randn(groups, count, D, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    fk.kde_score(x, x, 0.5)
    fk.langevin_chain(x, x, 0.5, 1.0, seed=1)
chosen = [str(choice) for choice in launch._chosen.values()]
print(json.dumps([list(seconds.values()), chosen]))
"""


def test_two_processes_choose_the_same_layouts(tmp_path: Path) -> None:
    """Or such as take the same time: the choice of one is within 5 % of the best that the other has measured."""
    found = []
    for name in ("first", "second"):
        environment = {**os.environ, "FLUXKERNELS_AUTOTUNE": "1", "FLUXKERNELS_CACHE": str(tmp_path / name)}
        done = subprocess.run(
            [sys.executable, "-c", TUNING], env=environment, capture_output=True, text=True, check=True, timeout=500
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (first_times, first), (second_times, second) = found
    assert len(first) == len(second) == len(first_times) > 4
    for choices, others in ((first, second_times), (second, first_times)):
        for choice, times in zip(choices, others, strict=True):
            assert times[choice] < 1.05 * min(times.values())


def test_memory_with_more_refs_than_a_block_holds() -> None:
    """140,000 reference points: of 4096 queries, a matrix of pairs would take 4 GiB."""
    refs = torch.randn(140_000, 24, device="cuda")
    x = refs[:4096] + 0.1
    fk.kde_score(x[:64], refs, 20.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fk.kde_score(x, refs, 20.0)
    # Words of the points are there by rows and by columns, 64 of them each.
    assert torch.cuda.max_memory_allocated() - before < bytes_of_a_block() + 4 * 140_000 * 64 * 4


def launches(call: Any) -> list[str]:
    """Names of the kernels that a call runs on the GPU."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    copies = ("Memcpy", "Memset")
    return [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(copies)
    ]


def test_the_image_pass_takes_few_launches() -> None:
    x = points(1, 128, 3072)[0].cuda()
    sigma2, tau, seed = (torch.tensor(value, device="cuda") for value in (300.0, 1.0, 7))
    names = launches(lambda: torch.ops.fluxkernels.flux_pass(
        x[None], x[None], sigma2[None], tau[None], 4, None, seed, "triton"
    ))  # fmt: skip
    assert 0 < len(names) <= 8, names


def test_a_pass_of_many_groups_takes_few_launches() -> None:
    x = points(2000, 256, 200).cuda()
    sigma2 = torch.full((2000,), 20.0, device="cuda")
    names = launches(lambda: fk.flux_pass(x, x, sigma2, 1.0, seed=7))
    assert 0 < len(names) <= 48, len(names)  # seven for each of six parts, and fills of scalars
