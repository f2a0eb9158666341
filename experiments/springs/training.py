"""Training of the four models: Flux Matching and score matching, each with full and with causal attention."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from experiments.common.distances import wasserstein2
from experiments.common.networks import TrajectoryTransformer
from experiments.common.objectives import DSM, FLUX, HORIZONS, averaged_field, make_loss, stages
from experiments.common.registry import UsageError
from experiments.common.run import Run
from experiments.common.sampling import sample_reverse_ve
from experiments.springs.simulator import trajectories
from fluxmatching import EDMField, LogUniformNoise, Trainer, TrainingOptions

OBJECTIVES = (FLUX, DSM)
FULL, CAUSAL = MASKS = ("full", "causal")
MODELS = tuple(product(OBJECTIVES, MASKS))
SIZED = (0.1, 1.0, 10.0)  # noise levels at which the size of trained fields is measured
SHOWN = 64  # generated trajectories that a run keeps


def data(run: Run) -> Tensor:
    """The training trajectories, `[data, points, 4]`."""
    return simulate(run, run.config.data, "data")


def simulate(run: Run, count: int, key: str) -> Tensor:
    """Simulated trajectories at the time points that the config keeps; one key always gives the same ones."""
    return trajectories(count, run.generator(key))[:, :: run.config.every].contiguous().to(run.device)


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
    config, samples = run.config, data(run)
    noise = LogUniformNoise(config.sigma_min, config.sigma_max)
    with run.drawing("weights", seed):
        network = TrajectoryTransformer(
            samples.shape[1], width=config.width, blocks=config.blocks, heads=config.heads, causal=mask == CAUSAL
        )
        field, horizon = EDMField(network, samples.std().item()), HORIZONS[config.horizon](config.tau_max)
        loss = make_loss(objective, field, noise, horizon, backend=backend or run.backend)
    options = TrainingOptions(
        iterations, config.batch, lr=config.lr, optimizer="adam", warmup=config.warmup, ema=config.ema,
        seed=run.generator("training", seed).initial_seed() >> 1,
        accelerator=str(run.device), progress=run.progress and folder is not None,
    )  # fmt: skip
    return Trainer(loss, samples, options, folder=folder)


def train(run: Run, objective: str, mask: str, seed: int) -> None:
    """Train one model and evaluate it at every stage: log W2 to the training trajectories, keep samples for figures."""
    key = {"objective": objective, "mask": mask, "seed": seed}
    done = {row["iteration"] for row in run.rows("model") if {name: row[name] for name in key} == key}
    file = samples_file(run, objective, mask, seed)
    real = data(run)
    for iteration in stages(run.config):
        if iteration in done:
            continue
        trainer = make_trainer(run, objective, mask, seed, iterations=iteration, folder=file.parent)
        trainer.run()
        if trainer.iteration > iteration:
            raise UsageError(f"{file.parent} is trained beyond iteration {iteration}, which was not logged: delete it")
        found = sample(run, trainer, real, seed)
        torch.save(found[:SHOWN].cpu(), file)
        run.log(kind="model", **key, iteration=iteration, w2=wasserstein2(found, real))


def sample(run: Run, trainer: Trainer, real: Tensor, seed: int) -> Tensor:
    """Trajectories of the averaged field, from the same noise for all models and stages of a seed."""
    config, field = run.config, averaged_field(trainer)
    like = real[:1].expand(config.samples, -1, -1)
    generator = run.generator("sample", seed)
    return sample_reverse_ve(field, like, config.sampling_steps, config.sigma_min, config.sigma_max, generator)


def log_sizes(run: Run) -> None:
    """Log σ times the root mean square of every trained field under p_σ, as in `linear.size` (rows "field size")."""
    done = {tuple(row[name] for name in ("objective", "mask", "seed", "sigma")) for row in run.rows("field size")}
    x = data(run)
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


def floor(run: Run) -> float:
    """W2 to the training trajectories of as many new ones as are sampled: the value of a perfect model."""
    return wasserstein2(simulate(run, run.config.samples, "new"), data(run))
