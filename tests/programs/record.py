"""Recorder of results with fixed seeds, for changes that must not move a single bit.

    python -m tests.programs.record before.pt                         on the code before the change
    python -m tests.programs.record after.pt --against before.pt      on the code after it

Records every op with its derivatives, losses with the gradients of a network, samplers, likelihoods, a short training
and a velocity fit, in float32 and float64 on the `torch` and `cpu` backends. Compare recordings of one machine only.
"""

import argparse
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fluxkernels as fk
import fluxmatching as fm
from fluxmatching.losses.second_derivatives import METHODS
from fluxmatching.velocity import VelocityOptions, flux_velocity
from tests.support.ops import OPS, noises, tensors

Records = Iterator[tuple[str, list[Tensor]]]
AUTOGRAD = METHODS[:3]  # without "closed_form", which needs a field of its own


class Network(nn.Module):
    """f(z) with a skip connection, or f(z, σ)."""

    def __init__(self, D: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D + 1, 16), nn.Tanh(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, D))
        self.to(dtype)

    def forward(self, z: Tensor, sigma: Tensor | float = 1.0) -> Tensor:
        level = torch.as_tensor(sigma).to(z).expand(len(z)).reshape(-1, *(1 for _ in z.shape[1:]))
        condition = level.log().expand(*z.shape[:-1], 1)
        return self.net(torch.cat([z, condition], -1)) - z / (1 + level**2)


def with_gradients(loss: Tensor, *modules: nn.Module) -> list[Tensor]:
    parameters = [p for module in modules for p in module.parameters()]
    gradients = torch.autograd.grad(loss.mean(), parameters, allow_unused=True)
    return [loss, *(torch.zeros(()) if g is None else g for g in gradients)]


def ops(backend: str, dtype: torch.dtype) -> Records:
    for D in (1, 2, 3, 20, 200):
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        per_group = torch.tensor([0.25, 0.5], dtype=dtype) * D
        inputs = {
            "x": normal(2, 33, D), "refs": normal(2, 65, D), "xt": normal(2, 21, D), "field": normal(2, 33, D),
            "values": normal(2, 21, 3), "per_query": per_group[:, None].expand(2, 33), "per_group": per_group,
            "tau": torch.tensor([0.5, 1.25], dtype=dtype), "h": torch.tensor([0.125, 0.25], dtype=dtype),
            **noises(normal(5, 2, 33, D)),
        }  # fmt: skip
        for op in OPS:
            leaves = {name: inputs[name].clone().requires_grad_() for name in op.differentiable}
            ends = inputs["x"] if op.name == "flux_pass" else None
            results = tensors(op.call(inputs | leaves, backend=backend), ends)
            cotangents = [
                torch.cos(torch.arange(r.numel(), dtype=torch.float64)).to(r).reshape(r.shape) for r in results
            ]
            gradients = torch.autograd.grad(results, list(leaves.values()), cotangents, allow_unused=True)
            yield f"{op.name} D={D}", [*results, *(g for g in gradients if g is not None)]
            if op.noise:
                yield f"{op.name} D={D} of a seed", list(tensors(op.call(inputs, seed=3, backend=backend), ends))


def losses(backend: str, dtype: torch.dtype) -> Records:
    generator = torch.Generator().manual_seed(6)
    x, refs = (torch.randn(n, 3, generator=generator, dtype=torch.float64).to(dtype) for n in (32, 64))
    net, normalizer = Network(3, dtype), fm.LossNormalizer(8)
    variants: list[dict[str, Any]] = [
        {"estimator": e, "second_derivatives": m, "divergence": d}
        for e in ("cross_chain", "single_chain")
        for m in AUTOGRAD
        for d in ("hutchinson", "exact")
    ]
    variants += [{"chunk_size": 5}, {"endpoint_fraction": 0.5}, {"num_steps": 2}]
    variants += [{"horizon": fm.UniformHorizon()}, {"horizon": fm.LearnedHorizon(8)}]
    for number, variant in enumerate(variants):
        options = fm.FluxOptions(backend=backend, **variant)
        for seed in (7, None):
            torch.manual_seed(11)
            loss = fm.flux_matching_loss(net, x, math.sqrt(0.1), options, refs=refs, seed=seed)
            yield f"flux {number} {seed}", with_gradients(loss, net)
            loss = fm.noise_annealed_flux_loss(net, x, 0.75, normalizer, options, seed=seed)
            yield f"annealed {number} {seed}", with_gradients(loss, net, normalizer)
    grouped = torch.randn(16, 5, 3, generator=generator, dtype=torch.float64).to(dtype)
    for divergence in ("hutchinson", "exact"):
        options = fm.FluxOptions(grouped=True, divergence=divergence, backend=backend)
        yield f"grouped {divergence}", with_gradients(fm.flux_matching_loss(net, grouped, 0.5, options, seed=1), net)
    for form in ("x0", "eps"):
        for stable in (True, False):
            dsm = fm.DSMOptions(form=form, stable=stable, backend=backend)
            yield f"dsm {form} {stable}", with_gradients(fm.dsm_loss(net, x, 0.5, dsm, refs=refs, seed=3), net)
    yield "mixing", with_gradients(fm.mixing_loss(net, x, 0.75, normalizer, seed=3), net, normalizer)


def samplers(backend: str, dtype: torch.dtype) -> Records:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(8)

    net, x = Network(3, dtype), 4 * torch.randn(16, 3, generator=generator(), dtype=torch.float64).to(dtype)
    levels, steps = fm.exponential_schedule(8, 0.05, 4.0), fm.karras_schedule(8, 0.05, 4.0)
    ends: dict[str, Any] = {"sigma_min": 0.05, "sigma_max": 4.0, "solver": fm.ODESolver(rtol=1e-3, atol=1e-3)}
    with fk.use_backend(backend):
        yield "langevin", [fm.unadjusted_langevin(net, x, step_size=0.01, num_steps=7, generator=generator())]
        yield "reverse_ve", [fm.reverse_ve(net, x, levels, generator=generator())]
        yield "predictor_corrector", [fm.predictor_corrector(net, x, levels, generator=generator())]
        yield "edm_heun", [fm.edm_heun(net, x, steps)]
        yield "probability_flow", [fm.probability_flow(net, x, **ends)]
        yield "log_likelihood", [fm.log_likelihood(net, x, generator=generator(), **ends)]


def training(backend: str, dtype: torch.dtype) -> Records:
    data = torch.randn(100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    options = fm.FluxOptions(backend=backend)
    settings = fm.TrainingOptions(iterations=20, batch_size=16, warmup=5, accelerator="cpu", progress=False)
    trainer = fm.Trainer(fm.FluxMatching(Network(3, dtype), 0.25, options), data, settings)
    trainer.run()
    yield "training", [*trainer.loss.parameters(), *trainer.average.module.parameters()]


def velocity(backend: str, dtype: torch.dtype) -> Records:
    import anndata

    numbers = np.random.default_rng(0).gamma(2, 1, (2, 60, 7)).astype(np.float32)
    for preset in ("paper", "circulating"):
        adata = anndata.AnnData(np.zeros((60, 7), np.float32), layers=dict(zip(("Mu", "Ms"), numbers, strict=True)))
        options = VelocityOptions.from_preset(
            preset, iterations=6, batch_size=32, device="cpu", backend=backend, progress=False
        )
        flux_velocity(adata, "per_gene", options=options)
        yield f"velocity {preset}", [torch.from_numpy(layer) for layer in adata.layers.values()]


def record() -> dict[str, list[Tensor]]:
    found = {}
    for backend in ("cpu", "torch"):
        for dtype in (torch.float32, torch.float64):
            for part in (ops, losses, samplers, training, velocity):
                if part is velocity and dtype == torch.float64:
                    continue  # it computes in float32
                for name, values in part(backend, dtype):
                    found[f"{backend} {dtype}: {name}"] = [value.detach().clone() for value in values]
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(one, other, strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.programs.record", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="where the recording goes")
    parser.add_argument("--against", help="an earlier recording; exit status 1 unless it is equal bit for bit")
    options = parser.parse_args()
    found = record()
    torch.save(found, options.file)
    print(f"{len(found)} records, {sum(map(len, found.values()))} tensors in {options.file}")
    if options.against is None:
        return 0
    earlier = torch.load(options.against)
    differing = [name for name in {**earlier, **found} if not same(earlier.get(name, []), found.get(name, []))]
    print(*(f"differs: {name}" for name in differing), f"{len(differing)} differ", sep="\n")
    return int(bool(differing))


if __name__ == "__main__":
    raise SystemExit(main())
