"""Training of the four models: Flux Matching and score matching, each with full and with causal attention."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common.clock import Clock
from experiments.common.distances import wasserstein2
from experiments.common.objectives import DSM, FLUX, HORIZONS, averaged_field, make_loss, stages
from experiments.common.registry import Paused, UsageError
from experiments.common.run import Run
from experiments.springs import sampling
from experiments.springs.fields import label_by_sigma, make_field
from experiments.springs.simulator import trajectories
from fluxmatching import LogUniformNoise, Trainer, TrainingOptions
from fluxmatching.networks import TrajectoryTransformer

OBJECTIVES = (FLUX, DSM)
FULL, CAUSAL = MASKS = ("full", "causal")
MODELS = tuple(product(OBJECTIVES, MASKS))
SIZED = (0.1, 1.0, 10.0)  # noise levels at which the size of trained fields is measured
SHOWN = 64  # generated trajectories that a run keeps


def data(run: Run) -> Tensor:
    """The training trajectories, `[data, points, 4]`."""
    return simulate(run, run.config.data, "data")


def fresh(run: Run) -> Tensor:
    """As many trajectories that no model is trained on."""
    return simulate(run, run.config.data, "fresh")


def simulate(run: Run, count: int, key: str) -> Tensor:
    """Simulated trajectories at the time points that the config keeps; one key always gives the same ones."""
    return trajectories(count, run.generator(key))[:, :: run.config.every].contiguous().to(run.device)


def units(run: Run) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[4]` of each coordinate that models are trained in; 0 and 1 unless standardized."""
    x = data(run).flatten(0, 1)
    return (x.mean(0), x.std(0)) if run.config.standardize else (torch.zeros_like(x[0]), torch.ones_like(x[0]))


def model_data(run: Run) -> Tensor:
    """The training trajectories in the units of the models."""
    mean, deviation = units(run)
    return (data(run) - mean) / deviation


def network_arguments(run: Run, mask: str) -> dict[str, Any]:
    """Arguments of the transformer with the preset's sizes."""
    config = run.config
    return {
        "length": data(run).shape[1],
        "width": config.width,
        "blocks": config.blocks,
        "heads": config.heads,
        "causal": mask == CAUSAL,
    }


def make_trainer(
    run: Run,
    objective: str,
    mask: str,
    seed: int,
    *,
    iterations: int,
    backend: str | None = None,
    folder: Path | None = None,
) -> Trainer:
    """A trainer that stops at `iterations`; models of one seed share initial weights, minibatches and noise levels."""
    config, samples = run.config, model_data(run)
    noise = LogUniformNoise(config.sigma_min, config.sigma_max)
    with run.drawing("weights", seed):
        network = TrajectoryTransformer(**network_arguments(run, mask))
        wrong = objective == DSM and config.dsm_label == "sigma2"
        field = make_field(network, samples.std().item(), input_scaling=config.input_scaling, wrong_label=wrong)
        loss = make_loss(
            objective, field, noise, HORIZONS[config.horizon](config.tau_max), backend=backend or run.backend,
            refs=samples[: config.refs] if config.refs else None,
        )  # fmt: skip
    options = TrainingOptions(
        iterations, config.batch, lr=config.lr, optimizer="adam", warmup=config.warmup, ema=config.ema,
        seed=run.generator("training", seed).initial_seed() >> 1,
        accelerator=str(run.device), progress=run.progress and folder is not None,
    )  # fmt: skip
    return Trainer(loss, samples, options, folder=folder)


def train(run: Run, objective: str, mask: str, seed: int, clock: Clock) -> None:
    """Train one model and evaluate it at every stage (rows "model"); at least one iteration, so that commands get on.

    Raises:
        Paused: the time is up.
    """
    key = {"objective": objective, "mask": mask, "seed": seed}
    done = {row["iteration"] for row in run.rows("model") if {name: row[name] for name in key} == key}
    folder, name = samples_file(run, objective, mask, seed).parent, f"{objective}, {mask}, seed {seed}"
    for iteration in stages(run.config):
        if iteration in done:
            continue
        trainer = make_trainer(run, objective, mask, seed, iterations=iteration, folder=folder)
        trainer.run(clock.left)
        if trainer.iteration > iteration:
            raise UsageError(f"{folder} is trained beyond iteration {iteration}, which was not logged: delete it")
        if trainer.iteration < iteration:
            raise Paused(f"{name} at iteration {trainer.iteration} of {run.config.iterations}")
        found = evaluate(run, averaged_field(trainer), objective, mask, seed)
        run.log(kind="model", **key, iteration=iteration, **found)


def evaluate(run: Run, field: nn.Module, objective: str, mask: str, seed: int) -> dict[str, float]:
    """W2 of samples to the training and to fresh trajectories; keep some for figures.

    A field that was trained with a wrong label is sampled with it too (column "w2_own_label").
    """
    real, row = data(run), {}
    own = sample(run, field, seed)
    if label_by_sigma(field):
        row["w2_own_label"] = wasserstein2(own, real)
        own = sample(run, field, seed)
    torch.save(own[:SHOWN].cpu(), samples_file(run, objective, mask, seed))
    return {"w2": wasserstein2(own, real), "w2_fresh": wasserstein2(own, fresh(run)), **row}


def sample(run: Run, field: nn.Module, seed: int) -> Tensor:
    """Trajectories of a field, from the same noise for all models and stages of a seed."""
    like = data(run)[:1].expand(run.config.samples, -1, -1)
    mean, deviation = units(run)
    return mean + deviation * sampling.sample(run.config, field, like, run.generator("sample", seed))


def log_sizes(run: Run) -> None:
    """Log σ times the root mean square of every trained field under p_σ, as in `linear.size` (rows "field size")."""
    done = {tuple(row[name] for name in ("objective", "mask", "seed", "sigma")) for row in run.rows("field size")}
    x = model_data(run)
    for seed in range(run.config.seeds):
        for objective, mask in MODELS:
            wanted = [sigma for sigma in SIZED if (objective, mask, seed, sigma) not in done]
            if not wanted:
                continue
            folder = samples_file(run, objective, mask, seed).parent
            trainer = make_trainer(run, objective, mask, seed, iterations=run.config.iterations, folder=folder)
            field = averaged_field(trainer)
            for sigma in wanted:
                noise = torch.randn(x.shape, generator=run.generator("size")).to(x)
                with torch.no_grad():
                    found = field(x + sigma * noise, torch.tensor(sigma).to(x))
                size = sigma * found.square().mean().sqrt().item()
                run.log(kind="field size", objective=objective, mask=mask, seed=seed, sigma=sigma, size=size)


def samples_file(run: Run, objective: str, mask: str, seed: int) -> Path:
    """File that keeps some generated trajectories of a model."""
    return run.out / "models" / f"{objective}-{mask}-{seed}" / "samples.pt"


def floor(run: Run) -> dict[str, float]:
    """W2 of as many trajectories as are sampled: new ones, the value of a perfect model, and training ones, repeated.

    A model that repeats training trajectories at random is nearer to them than a perfect one, and farther from fresh
    trajectories.
    """
    real, others, count = data(run), fresh(run), run.config.samples
    new = simulate(run, count, "new")
    repeated = real[torch.randint(len(real), (count,), generator=run.generator("repeated")).to(real.device)]
    return {
        "w2": wasserstein2(new, real),
        "w2_fresh": wasserstein2(new, others),
        "repeated": wasserstein2(repeated, real),
        "repeated_fresh": wasserstein2(repeated, others),
    }
