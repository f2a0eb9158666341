"""Measurements: Langevin chains at noise levels, and samples from noise by every sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.augment import chains
from experiments.augment.chains import CONSTANT, Schedule, chebyshev, cyclic
from experiments.augment.training import energy_distance
from experiments.augment_images.fields import MixtureScore
from experiments.augment_images.law import EVENT, NOISE, ImageLaw, make_law
from experiments.augment_images.training import KINDS, PIPELINE, make_field, train_pipeline
from experiments.common.run import Run
from fluxmatching import (
    ODESolver,
    edm_heun,
    exponential_schedule,
    karras_schedule,
    predictor_corrector,
    probability_flow,
    reverse_ve,
    unadjusted_langevin,
)
from fluxmatching.fields import Field, NoisyField

TRUTH, OF_DIFFUSERS, DRAWS = "exact score", "DDPM of diffusers", "exact draws"
FIELDS = (TRUTH, *KINDS)
SIGMA_MIN, SIGMA_MAX = 0.1, 80.0
REFERENCE_STEP = 0.4  # constant step size, in units of the variance of a component, of the autocorrelation times


@dataclass(frozen=True)
class Sampling:
    """One task of a sampler.

    Attributes:
        field: f(z, σ).
        x: images of noise at σ = 80.
        steps: number of noise levels.
        generator: of the noise.
    """

    field: NoisyField
    x: Tensor
    steps: int
    generator: torch.Generator


def at_level(field: NoisyField, sigma: Tensor) -> Field:
    """Return the field at one noise level."""
    return lambda z: field(z, sigma)


def annealed_langevin(task: Sampling) -> Tensor:
    """Run eight Langevin steps at each of a fourth as many noise levels."""
    x = task.x
    for sigma in exponential_schedule(max(1, task.steps // 4), SIGMA_MIN, SIGMA_MAX).float():
        size = 0.2 * (sigma**2).item()
        field = at_level(task.field, sigma)
        x = unadjusted_langevin(field, x, step_size=size, num_steps=8, generator=task.generator)
    return x


def levels(task: Sampling) -> Tensor:
    """Return the noise levels of the stochastic samplers."""
    return exponential_schedule(task.steps, SIGMA_MIN, SIGMA_MAX)


SAMPLERS: dict[str, Callable[[Sampling], Tensor]] = {
    "Langevin, annealed": annealed_langevin,
    "reverse SDE": lambda task: reverse_ve(task.field, task.x, levels(task), generator=task.generator),
    "predictor-corrector": lambda task: predictor_corrector(task.field, task.x, levels(task), generator=task.generator),
    "ODE, Heun": lambda task: edm_heun(task.field, task.x, karras_schedule(task.steps // 2, SIGMA_MIN, SIGMA_MAX)[:-1]),
    "ODE, adaptive": lambda task: probability_flow(
        task.field, task.x, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, solver=ODESolver(rtol=1e-2, atol=1e-2)
    ),
}


class Counted(nn.Module):
    """A field that counts its evaluations."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.evaluations = field, 0

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        self.evaluations += 1
        found: Tensor = self.field(z, sigma)
        return found


def schedules() -> list[Schedule]:
    """Return the schedules of step sizes, the same for every field."""
    constant = [Schedule(CONSTANT, (h,)) for h in (0.2, REFERENCE_STEP, 0.7, 1.0)]
    falling = [cyclic(1.8, 0.1, 8), *(cyclic(*ends, 4) for ends in ((1.0, 0.1), (1.8, 0.1), (1.8, 0.2)))]
    return [*constant, *falling, chebyshev(0.15, 20.0, 4)]


def measure(run: Run) -> None:
    """Log what is missing: rows "cost" and "sample", and a row "measured" per field and seed."""
    done = {(row["field"], row["seed"]) for row in run.rows("measured")}
    wanted = [(seed, kind) for seed in range(run.config.seeds) for kind in FIELDS]
    law = make_law()
    for seed, kind in run.bar(wanted, "measure"):
        if (kind, seed) in done:
            continue
        field = MixtureScore(law.templates, NOISE) if kind == TRUTH else make_field(run, law, kind, seed)
        with torch.no_grad():
            measure_chains(run, law, field, kind, seed)
            measure_samplers(run, law, field, kind, seed)
        run.log(kind="measured", field=kind, seed=seed)


def place(sigma: float) -> str:
    """Return the name of the problem of chains at a noise level."""
    return f"σ = {sigma:g}"


def measure_chains(run: Run, law: ImageLaw, field: NoisyField, kind: str, seed: int) -> None:
    """Log the cost of Langevin chains with every schedule, at every noise level that is not logged yet."""
    done = {(row["problem"], row["sizes"]) for row in run.rows("cost") if (row["field"], row["seed"]) == (kind, seed)}
    for sigma in run.config.sigmas:
        costs = chains.measure_mixture(
            flat(at_level(field, torch.tensor(sigma))),
            law.problem(sigma),
            schedules(),
            run.config.evaluations,
            run.config.chains,
            run.generator("chains", place(sigma), seed).initial_seed(),
            within=(law.mixture(sigma), law.basis),
        )
        for schedule, cost in costs.items():
            sizes = " ".join(f"{size:.3g}" for size in schedule.sizes)
            if (place(sigma), sizes) not in done:
                run.log(
                    kind="cost", problem=place(sigma), field=kind, seed=seed, schedule=schedule.kind, sizes=sizes,
                    evaluations=cost.evaluations, bias=cost.bias,
                )  # fmt: skip


def flat(field: Field) -> Field:
    """Return a field of images as one of vectors."""
    return lambda x: field(x.unflatten(1, EVENT)).flatten(1)


def measure_samplers(run: Run, law: ImageLaw, field: nn.Module, kind: str, seed: int) -> None:
    """Log how far samples from noise are from the law, for every sampler that is not logged yet."""
    done = {(row["sampler"], row["field"]) for row in run.rows("sample") if row["seed"] == seed}
    count = run.config.samples

    def log(name: str, which: str, images: Tensor, evaluations: int) -> None:
        if (name, which) not in done:
            run.log(
                kind="sample", sampler=name, field=which, seed=seed, evaluations=evaluations,
                **distances(law, images, run.generator("truth", seed)),
            )  # fmt: skip

    for name, sampler in SAMPLERS.items():
        start = SIGMA_MAX * torch.randn(count, *EVENT, generator=run.generator("start", seed))
        counted = Counted(field)
        images = sampler(Sampling(counted, start, run.config.sampling_steps, run.generator(name, seed)))
        log(name, kind, images, counted.evaluations)
    if kind == TRUTH:
        log(DRAWS, TRUTH, law.sample(count, SIGMA_MIN, run.generator("draws", seed)), 0)
    if kind == PIPELINE:
        images, steps = sample_by_diffusers(run, law, count, seed)
        log(OF_DIFFUSERS, PIPELINE, images, steps)


def sample_by_diffusers(run: Run, law: ImageLaw, count: int, seed: int) -> tuple[Tensor, int]:
    """Draw images by the saved scheduler itself, to which noise of σ = 0.1 is added; returns them and the steps."""
    from diffusers import DDPMScheduler, UNet2DModel

    folder, steps = train_pipeline(run, law, seed), 2 * run.config.sampling_steps
    unet, scheduler = (
        part.from_pretrained(folder / name, local_files_only=True)
        for part, name in ((UNet2DModel, "unet"), (DDPMScheduler, "scheduler"))
    )
    generator = run.generator("diffusers", seed)
    x = torch.randn(count, *EVENT, generator=generator)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x, generator=generator).prev_sample
    return x + SIGMA_MIN * torch.randn(x.shape, generator=generator), steps


def distances(law: ImageLaw, images: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Return distances of images from p_σ at σ = 0.1.

    "shares" is half the sum of the errors of the shares of the templates, "energy" the energy distance from as many
    exact draws in units of a component's standard deviation, "width" see `ImageLaw.width`.
    """
    truth = law.sample(len(images), SIGMA_MIN, generator)
    unit = law.mixture(SIGMA_MIN).variance ** 0.5
    return {
        "shares": (law.shares(images) - 1 / len(law.templates)).abs().sum().item() / 2,
        "energy": energy_distance(images.flatten(1), truth.flatten(1)).item() / unit,
        "width": law.width(images, SIGMA_MIN),
    }
