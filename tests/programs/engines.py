"""Gradients of the losses under training engines against one process with the joint minibatch, as JSON lines.

torchrun --standalone --nproc-per-node 2 -m tests.programs.engines [ENGINE ...]
"""

import copy
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from fluxkernels import philox
from fluxmatching import (
    DenoisingScoreMatching,
    FlowMatching,
    FluxMatching,
    FluxOptions,
    LearnedHorizon,
    LogUniformNoise,
    LossNormalizer,
    NoiseAnnealedFluxMatching,
    UniformTimes,
    VFluxMatching,
    dsm_loss,
    flux_matching_loss,
    noise_annealed_flux_loss,
)
from fluxmatching.distributed import rank_seed
from fluxmatching.losses.modules import draw_from

SEED, SIGMA, SAMPLES = 3, 0.7, 8
NOISE = LogUniformNoise(0.3, 3.0)


class Network(nn.Module):
    """f(z), or f(z, σ), with two blocks that can be sharded by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 32), nn.Linear(32, 32)])
        self.last = nn.Linear(32, 2)

    def forward(self, z: Tensor, sigma: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            z = torch.tanh(block(z))
        return self.last(z) if sigma is None else self.last(z) / sigma.reshape(-1, 1)


@dataclass(frozen=True)
class Loss:
    """A loss module, and the same loss of one process.

    Attributes:
        make: (field, normalizer, options) -> the module.
        value: (field, normalizer, x, key, options) -> mean loss of one minibatch in one process.
    """

    make: Callable[[nn.Module, LossNormalizer, FluxOptions], nn.Module]
    value: Callable[[Any, LossNormalizer, Tensor, Tensor, FluxOptions], Tensor]


def annealed(field: Any, normalizer: LossNormalizer, x: Tensor, key: Tensor, options: FluxOptions) -> Tensor:
    sigma = draw_from(NOISE, key, x, philox.NOISE_LEVEL)
    return noise_annealed_flux_loss(field, x, sigma, normalizer, options, seed=key).mean()


def score_matching(field: Any, normalizer: LossNormalizer, x: Tensor, key: Tensor, options: FluxOptions) -> Tensor:
    return dsm_loss(field, x, SIGMA, seed=key).mean()


def along_a_path(field: Any, normalizer: LossNormalizer, options: FluxOptions) -> nn.Module:
    return VFluxMatching(field, options=options, times=UniformTimes(0.1, 0.9), normalizer=normalizer)


LOSSES = {
    "flux": Loss(
        lambda field, normalizer, options: FluxMatching(field, SIGMA, options),
        lambda field, normalizer, x, key, options: flux_matching_loss(field, x, SIGMA, options, seed=key).mean(),
    ),
    "annealed flux": Loss(
        lambda field, normalizer, options: NoiseAnnealedFluxMatching(field, NOISE, options, normalizer=normalizer),
        annealed,
    ),
    "v-flux": Loss(
        lambda field, normalizer, options: along_a_path(field, normalizer, options),
        lambda field, normalizer, x, key, options: along_a_path(field, normalizer, options)(x, seed=key)[0],
    ),
    "flow matching": Loss(
        lambda field, normalizer, options: FlowMatching(field),
        lambda field, normalizer, x, key, options: FlowMatching(field)(x, seed=key)[0],
    ),
    "score matching": Loss(lambda field, normalizer, options: DenoisingScoreMatching(field, SIGMA), score_matching),
}


FLOWS = ("v-flux", "flow matching")  # modules like the others, so with some engines only
NO_FLUX = ("flow matching", "score matching")  # nothing to gather, no second derivatives


def ddp(module: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(module, **options)


def sharded(module: nn.Module, nested: bool) -> nn.Module:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in [m for m in module.modules() if isinstance(m, nn.Linear)] if nested else []:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def with_fabric(module: nn.Module) -> nn.Module:
    fabric = Fabric(accelerator="cpu", devices=distributed.get_world_size(), strategy="ddp")
    fabric.launch()
    wrapped, _ = fabric.setup(module, SGD(module.parameters(), 0.1))
    return wrapped


ENGINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": ddp,
    "DDP(find_unused_parameters)": lambda module: ddp(module, find_unused_parameters=True),
    "DDP(static_graph)": lambda module: ddp(module, static_graph=True),
    "DDP(gradient_as_bucket_view)": lambda module: ddp(module, gradient_as_bucket_view=True),
    "DDP(torch.compile)": lambda module: ddp(torch.compile(module, backend="eager")),
    "FSDP2": lambda module: sharded(module, nested=False),
    "FSDP2, nested": lambda module: sharded(module, nested=True),
    "Fabric": with_fabric,
    "Accelerate": lambda module: Accelerator(cpu=True).prepare_model(module),
}


def gradient(module: nn.Module) -> Tensor:
    """Return the gradients of all parameters, whole ones of sharded parameters, zeros where there is none."""
    parts = []
    for p in module.parameters():
        g = torch.zeros_like(p) if p.grad is None else p.grad
        parts.append((g.full_tensor() if hasattr(g, "full_tensor") else g).flatten())
    return torch.cat(parts).detach()


def expected(loss: Loss, x: Tensor, gathered: bool, options: dict[str, Any]) -> list[Tensor]:
    """Return gradients of field and normalizer in one process: of the joint minibatch, or the mean over its parts."""
    field, normalizer = parts()
    key = torch.tensor(SEED)
    if gathered:
        value = loss.value(field, normalizer, x, key, FluxOptions(**options))
    else:
        minibatches = x.tensor_split(distributed.get_world_size())
        values = [
            loss.value(field, normalizer, part, rank_seed(key, rank), FluxOptions(**options))
            for rank, part in enumerate(minibatches)
        ]
        value = torch.stack(values).mean()
    value.backward()
    return [gradient(field), gradient(normalizer)]


def parts() -> tuple[Network, LossNormalizer]:
    torch.manual_seed(0)
    return Network(), LossNormalizer(8)


def report(what: str, **values: Any) -> None:
    if distributed.get_rank() == 0:
        print(json.dumps({"what": what, **values}) + "\n", end="", flush=True)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


def compare_modules(engines: list[str], x: Tensor, mine: Tensor) -> None:
    """Compare what engines make of the loss modules."""
    for engine in engines:
        for name, loss in LOSSES.items():
            if name in FLOWS and engine not in ("DDP", "FSDP2, nested", "Fabric"):
                continue
            for gathered in (True, False) if name not in NO_FLUX else (False,):
                for method in ("finite_difference", "double_backward"):
                    if method == "double_backward" and (engine != "DDP" or name in NO_FLUX):
                        continue
                    field, normalizer = parts()
                    options = {"second_derivatives": method}
                    module = loss.make(field, normalizer, FluxOptions(gather_across_ranks=gathered, **options))
                    wrapped = ENGINES[engine](module)
                    value, _ = wrapped(mine, seed=SEED)
                    value.backward()
                    wanted = expected(loss, x, gathered, options)
                    got = [gradient(field), gradient(normalizer)]
                    keys = {"engine": engine, "loss": name, "gathered": gathered, "method": method}
                    report("module", **keys, error=error(torch.cat(got), torch.cat(wanted)))


def compare_functions(engines: list[str], x: Tensor, mine: Tensor) -> None:
    """Compare the loss functions of a field that an engine has wrapped, given as it is and inside of a function."""
    for engine in engines:
        if "compile" in engine:
            continue
        for name in ("flux", "annealed flux"):
            for hidden in (False, True):
                field, normalizer = parts()
                wrapped = ENGINES[engine](field)
                called = (lambda *args: wrapped(*args)) if hidden else wrapped  # noqa: B023
                options = {"second_derivatives": "finite_difference"}
                keys = {"engine": engine, "loss": name, "hidden": hidden}
                try:
                    key = rank_seed(torch.tensor(SEED), distributed.get_rank())
                    LOSSES[name].value(called, normalizer, mine, key, FluxOptions(**options)).backward()
                except TypeError as problem:
                    report("function", **keys, refused=str(problem))
                    continue
                wanted = expected(LOSSES[name], x, False, options)[0]
                report("function", **keys, error=error(gradient(field), wanted))


def check_refusals(mine: Tensor) -> None:
    rank, joint = distributed.get_rank(), FluxOptions(gather_across_ranks=True)
    attempts: dict[str, Callable[[], Any]] = {
        "sigma": lambda: flux_matching_loss(
            Network(), mine, 0.1 + rank, FluxOptions(gather_across_ranks=True), seed=SEED
        ),
        "samples": lambda: flux_matching_loss(
            Network(), mine[rank:], SIGMA, FluxOptions(gather_across_ranks=True), seed=SEED
        ),
        "dtypes": lambda: flux_matching_loss(
            lambda z: -z, mine.double() if rank else mine, SIGMA, FluxOptions(gather_across_ranks=True), seed=SEED
        ),
        "seed": lambda: flux_matching_loss(Network(), mine, SIGMA, joint, seed=SEED + rank),
        "refs": lambda: flux_matching_loss(Network(), mine, SIGMA, joint, refs=torch.full((4, 2), 1.0 + rank)),
        "layout of refs": lambda: flux_matching_loss(Network(), mine, SIGMA, joint, refs=torch.ones(4 + rank, 2)),
        "double backward under FSDP": lambda: flux_matching_loss(
            sharded(Network(), nested=False), mine, SIGMA, FluxOptions(second_derivatives="double_backward")
        ),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            said = "nothing"
        except (ValueError, RuntimeError) as problem:
            said = f"{type(problem).__name__}: {problem}"
        every: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(every, said)
        report("refused", name=name, messages=every)


def check_options(x: Tensor, mine: Tensor) -> None:
    """Compare all options of the flux loss, gathered, in float64."""
    for options in (
        {}, {"second_derivatives": "finite_difference"}, {"estimator": "single_chain"}, {"endpoint_fraction": 0.3},
        {"chunk_size": 5}, {"divergence": "exact"}, {"endpoint_fraction": 0.01}, {"strata": 4},
    ):  # fmt: skip
        whole, part = parts()[0].double(), parts()[0].double()
        flux_matching_loss(whole, x.double(), SIGMA, FluxOptions(**options), seed=SEED).mean().backward()
        chosen = FluxOptions(gather_across_ranks=True, **options)
        module = ddp(FluxMatching(part, SIGMA, chosen))
        module(mine.double(), seed=SEED)[0].backward()
        report("option", options=str(options), error=error(gradient(part), gradient(whole)))
    for strata in (1, 4):  # each with its own noise level
        learned = [nn.ModuleList([*parts()[:1], LearnedHorizon(8)]).double() for _ in range(2)]
        for (field, horizon), samples, gather in zip(learned, (x, mine), (False, True), strict=True):
            options = FluxOptions(strata=strata, horizon=horizon, gather_across_ranks=gather)
            normalizer = parts()[1].double().requires_grad_(False)
            module = NoiseAnnealedFluxMatching(field, NOISE, options, normalizer=normalizer)
            called = ddp(module) if gather else module  # kept: its gradients are averaged as long as it exists
            called(samples.double(), seed=SEED)[0].backward()
        report("option", options=f"annealed, strata {strata}", error=error(gradient(learned[1]), gradient(learned[0])))


def check_numbers_without_a_seed(mine: Tensor) -> None:
    """Compare σ of processes that have seeded torch's generator alike."""
    torch.manual_seed(0)
    _, logged = NoiseAnnealedFluxMatching(Network(), NOISE)(mine)
    every = [torch.empty(()) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, logged["sigma"])
    report("without a seed", sigma=torch.stack(every).tolist())


def main() -> None:
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    x = torch.randn(SAMPLES * processes, 2, generator=torch.Generator().manual_seed(1))
    mine = copy.copy(x.tensor_split(processes)[rank])
    engines = sys.argv[1:] or list(ENGINES)
    compare_modules(engines, x, mine)
    compare_functions(engines, x, mine)
    check_options(x, mine)
    check_refusals(mine)
    check_numbers_without_a_seed(mine)
    distributed.barrier()  # meanwhile gloo's threads release the tensors of the last collective
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
