"""A causal field, trained by Flux Matching or by denoising score matching."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from experiments.common.run import Run
from fluxmatching import TruncatedExponentialHorizon, dsm_loss, flux_matching_loss

OBJECTIVES = ("flux", "dsm")
EMA_DECAY = 0.998
# The loss decays about like e^{-τ} to e^{-2τ} (experiment "horizon"): this q follows it, the uniform one does not.
HORIZON_RATE = 1.0


class CausalField(nn.Module):
    """f(x) = -x / λ² + (g_1(x_1), g_2(x_1, x_2)), whose Jacobian is triangular: no gradient unless g_2 ignores x_1.

    The networks g end in bounded units, so far from the data the linear part pulls back from everywhere and
    the diffusion has a stationary distribution whatever the weights. Their last layers start at zero.

    Args:
        hidden: width of the two hidden layers of each network.
        variance: λ², of a coordinate of p_σ.
    """

    def __init__(self, hidden: int, variance: float) -> None:
        super().__init__()
        self.variance = variance
        self.networks = nn.ModuleList(_network(inputs, hidden) for inputs in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """f(x), `[..., 2]` to the same shape."""
        scaled = x / math.sqrt(self.variance)
        g = [network(scaled[..., : d + 1]) for d, network in enumerate(self.networks)]
        return torch.cat(g, dim=-1) - x / self.variance


def _network(inputs: int, hidden: int) -> nn.Sequential:
    last = nn.Linear(hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), last)


class Trainer:
    """A field, its average over the steps, and everything else that a resumed training needs.

    Args:
        run: gives settings, random numbers, backend and device.
        objective: "flux" or "dsm".
        data: training samples of p_data, `[n, 2]`.
        kernel_variance: σ².
    """

    def __init__(self, run: Run, objective: str, data: Tensor, kernel_variance: float) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
        self.run, self.objective, self.data, self.kernel_variance = run, objective, data, kernel_variance
        with run.drawing("weights"):  # the same for both objectives, and for a resumed run
            field = CausalField(run.config.hidden, data.var(0).mean().item() + kernel_variance)
        self.field = field.to(run.device)
        self.average = AveragedModel(self.field, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self.optimiser = Adam(self.field.parameters(), lr=run.config.learning_rate)
        self.schedule = CosineAnnealingLR(self.optimiser, T_max=run.config.steps)
        self.horizon = TruncatedExponentialHorizon(HORIZON_RATE).to(run.device)
        self.step = 0

    def advance(self) -> float:
        """One optimiser step; returns the minibatch's mean loss."""
        generator = self.run.generator("train", self.objective, self.step)
        chosen = torch.randint(len(self.data), (self.run.config.batch,), generator=generator)
        x = self.data[chosen.to(self.data.device)]
        seed = int(torch.randint(2**62, (), generator=generator))
        if self.objective == "flux":
            loss = flux_matching_loss(
                self.field,
                x,
                self.kernel_variance,
                horizon=self.horizon,
                divergence="exact",
                seed=seed,
                backend=self.run.backend,
            ).mean()
        else:
            loss = dsm_loss(self.field, x, self.kernel_variance, seed=seed, backend=self.run.backend).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.average.update_parameters(self.field)
        self.step += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        """What `restore` takes. The random numbers depend on the step alone, so none are kept."""
        return {
            "step": self.step,
            "field": self.field.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step = state["step"]
        self.field.load_state_dict(state["field"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])


def train(run: Run, state: dict[str, Any], objective: str, data: Tensor, kernel_variance: float) -> nn.Module:
    """Train, or finish training, and return the averaged field.

    Args:
        run: where rows and checkpoints go.
        state: of the whole run; the entry `objective` is read and kept up to date.
        objective: "flux" or "dsm".
        data: training samples, `[n, 2]`.
        kernel_variance: σ².
    """
    trainer = Trainer(run, objective, data, kernel_variance)
    if objective in state:
        trainer.restore(state[objective])
    logged = {row["step"] for row in run.rows("train") if row["objective"] == objective}
    with run.bar(run.config.steps, f"train {objective}") as bar:
        bar.update(trainer.step)
        while trainer.step < run.config.steps:
            steps = min(run.config.log_every, run.config.steps - trainer.step)
            mean = sum(trainer.advance() for _ in range(steps)) / steps
            if trainer.step not in logged:
                run.log(kind="train", objective=objective, step=trainer.step, loss=mean)
            state[objective] = trainer.state()
            run.save_state(state)
            bar.update(steps)
            bar.set_postfix(loss=f"{mean:.3g}")
    return trainer.average.requires_grad_(False)
