"""A causal field, trained by Flux Matching or by denoising score matching."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from experiments.common.objectives import averaged_field
from experiments.common.run import Run
from experiments.common.schedules import cosine_decay
from fluxmatching import (
    DenoisingScoreMatching,
    DSMOptions,
    FluxMatching,
    FluxOptions,
    Trainer,
    TrainingOptions,
    TruncatedExponentialHorizon,
)

OBJECTIVES = ("flux", "dsm")
EMA_DECAY = 0.998
# The loss decays about like e^{-τ} to e^{-2τ} (experiment "horizon"): this q follows it, the uniform one does not.
HORIZON_RATE = 1.0


class CausalField(nn.Module):
    """f(x) = -x / λ² + (g_1(x_1), g_2(x_1, x_2)), whose Jacobian is triangular: no gradient unless g_2 ignores x_1.

    The networks g end in bounded units, so far from the data the linear part pulls back from everywhere and the
    diffusion has a stationary distribution for any weights. Their last layers start at zero.

    Args:
        hidden: width of the two hidden layers of each network.
        variance: λ², variance of a coordinate of p_σ.
    """

    def __init__(self, hidden: int, variance: float) -> None:
        super().__init__()
        self.variance = variance
        self.networks = nn.ModuleList(_network(inputs, hidden) for inputs in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Compute f(x), `[..., 2]` to the same shape."""
        scaled = x / math.sqrt(self.variance)
        g = [network(scaled[..., : d + 1]) for d, network in enumerate(self.networks)]
        return torch.cat(g, dim=-1) - x / self.variance


def _network(inputs: int, hidden: int) -> nn.Sequential:
    last = nn.Linear(hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), last)


def make_field(run: Run, data: Tensor, sigma: float) -> CausalField:
    """Make an untrained field, the same for both objectives and for a resumed run.

    Args:
        run: settings, random numbers and device.
        data: training samples of p_data, `[n, 2]`.
        sigma: σ, so that the variance of p_σ is that of the data plus σ².
    """
    with run.drawing("weights"):
        field = CausalField(run.config.hidden, data.var(0).mean().item() + sigma**2)
    return field.to(run.device)


def make_loss(run: Run, objective: str, field: CausalField, sigma: float) -> nn.Module:
    """Make the loss module of an objective.

    Raises:
        ValueError: there is no objective of that name.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if objective == "dsm":
        return DenoisingScoreMatching(field, sigma, DSMOptions(backend=run.backend))
    horizon = TruncatedExponentialHorizon(HORIZON_RATE)
    return FluxMatching(field, sigma, FluxOptions(horizon=horizon, divergence="exact", backend=run.backend))


def make_trainer(run: Run, objective: str, data: Tensor, sigma: float) -> Trainer:
    """Make a trainer, which resumes from the last checkpoint in the folder of its objective.

    Args:
        run: settings, random numbers, backend, device and folder.
        objective: "flux" or "dsm".
        data: training samples of p_data, `[n, 2]`.
        sigma: σ.
    """
    config = run.config
    options = TrainingOptions(
        config.steps,
        config.batch,
        lr=config.learning_rate,
        optimizer="adam",
        ema=EMA_DECAY,
        clip=None,
        seed=run.generator("train", objective).initial_seed() >> 1,
        accelerator=str(run.device),
        progress=False,
    )
    return Trainer(
        make_loss(run, objective, make_field(run, data, sigma), sigma),
        data,
        options,
        folder=run.out / "models" / objective,
        lr_factor=cosine_decay(config.steps),
    )


def train(run: Run, objective: str, data: Tensor, sigma: float) -> nn.Module:
    """Train, or resume training, and return the averaged field. Arguments as in `make_trainer`."""
    config = run.config
    trainer = make_trainer(run, objective, data, sigma)
    logged = {row["step"] for row in run.rows("train") if row["objective"] == objective}
    with run.bar(config.steps, f"train {objective}") as bar:
        bar.update(trainer.iteration)
        while trainer.iteration < config.steps:
            steps = min(config.log_every, config.steps - trainer.iteration)
            mean = torch.stack([trainer.step() for _ in range(steps)]).double().mean().item()
            if trainer.iteration not in logged:
                run.log(kind="train", objective=objective, step=trainer.iteration, loss=mean)
            trainer.save()
            run.save_seconds()
            bar.update(steps)
            bar.set_postfix(loss=f"{mean:.3g}")
    return averaged_field(trainer).requires_grad_(False)
