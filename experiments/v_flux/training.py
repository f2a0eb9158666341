"""Fields of one path of marginals, trained by v-Flux Matching and by conditional flow matching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.common.objectives import averaged_field
from experiments.common.rotation import quarter_turn
from experiments.common.run import Run
from experiments.common.schedules import cosine_decay
from fluxkernels import philox
from fluxmatching import (
    FlowMatching,
    FlowOptions,
    FluxOptions,
    LinearPath,
    LossNormalizer,
    Trainer,
    TrainingOptions,
    UniformTimes,
    VFluxMatching,
)
from fluxmatching.flows.times import Times
from fluxmatching.losses.draws import seeded_start
from fluxmatching.losses.modules import Logged, draw_from
from fluxmatching.networks import Perceptron


@dataclass(frozen=True)
class Variant:
    """Loss that trains a field, and the coordinates that it may depend on.

    Attributes:
        flux: v-Flux Matching; else conditional flow matching.
        least_energy: with the kinetic energy added to the loss.
        turning: starts with a rotation about the origin.
        causal: the velocity of the first coordinate depends on this coordinate and t alone.
    """

    flux: bool = True
    least_energy: bool = False
    turning: bool = False
    causal: bool = False


FLUX, TURNING, LEAST, CAUSAL = "v-flux", "v-flux, turning start", "v-flux, least energy", "v-flux, causal"
FLOW, FLOW_CAUSAL = "flow matching", "flow matching, causal"
VARIANTS = {
    FLUX: Variant(),
    TURNING: Variant(turning=True),
    LEAST: Variant(least_energy=True, turning=True),
    CAUSAL: Variant(causal=True),
    FLOW: Variant(flux=False),
    FLOW_CAUSAL: Variant(flux=False, causal=True),
}
FLUX_FIELDS = (FLUX, TURNING, LEAST, CAUSAL)


class FlowField(nn.Module):
    """f(x, t) = c(t) x + ω Jx + g(x, t), a network g beside the velocity of a normal distribution and a rotation.

    c(t) x carries N(0, I) to N(0, S I) along the linear path, c = (S t - (1-t)) / ((1-t)² + S t²). J is a quarter turn.

    Args:
        width: width of the hidden layers.
        variance: S, variance of a coordinate of the data.
        turn: ω.
        causal: whether g is (g_1(x_1, t), g_2(x_1, x_2, t)), two networks in place of one.

    Shape:
        x `[n, 2]`, t `[n]`; returns the shape of x.
    """

    def __init__(self, width: int, variance: float, *, turn: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.variance, self.turn = variance, turn
        self.network = Perceptron(2, width)
        self.first = Perceptron(1, width) if causal else None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        g = self.network(x, t)
        if self.first is not None:
            g = torch.cat([self.first(x[:, :1], t), g[:, 1:]], 1)
        linear = (self.variance * t - (1 - t)) / ((1 - t).square() + self.variance * t.square())
        f = linear.unsqueeze(-1) * x + g
        return f + self.turn * quarter_turn(x) if self.turn else f


class VelocityUnits(LossNormalizer):
    """Fixed scale 1/σ(t)² of the linear path, in place of a learned one.

    The gradient of ℓ σ² is that of the squared error of f's part that moves p_t (Eq. 58); its value is twice this
    error. The learned scale would follow the loss, which is nearly zero at small t from the start, and give these times
    nearly all the weight.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def log_scale(self, sigma: Tensor) -> Tensor:
        """Return -log σ(t)² for the ratio σ(t)/α(t), of which σ(t) is ratio/(1 + ratio)."""
        return -2 * (sigma / (1 + sigma)).log()


class LeastEnergyMatching(VFluxMatching):
    """v-Flux Matching with the kinetic energy added, ℓ σ² + λ |f|².

    At the minimum f = v/(1+λ), v the field of least energy of those that carry p_t, or shorter where ℓ underestimates
    the error.

    Args:
        field, options: as in `VFluxMatching`, whose path is linear.
        times, refs: likewise.
        energy_weight: λ.
    """

    def __init__(
        self, field: Callable[..., Tensor], options: FluxOptions, *, times: Times, refs: Tensor, energy_weight: float
    ) -> None:
        super().__init__(field, LinearPath(), options, times=times, normalizer=VelocityUnits(), refs=refs)
        self.energy_weight = energy_weight

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and what `VFluxMatching` logs, with "energy" added, the mean of |f|²."""
        loss, logged = super().forward(x, seed=seed)
        key = self.key(x, seed)
        t = draw_from(self.times, key, x, philox.TIME, len(x))
        energy = self.field(self.path.sample(seeded_start(x, key), x, t), t).square().sum(1).mean()
        loss = loss + self.energy_weight * energy
        return loss, {**logged, "loss": loss.detach(), "energy": energy.detach()}


def make_field(run: Run, name: str, variance: float) -> FlowField:
    """Make the untrained field of a variant; fields of one architecture start with the same weights."""
    variant = VARIANTS[name]
    turn = run.config.turn if variant.turning else 0.0
    with run.drawing("weights"):
        field = FlowField(run.config.width, variance, turn=turn, causal=variant.causal)
    return field.to(run.device)


def make_loss(run: Run, name: str, data: Tensor) -> nn.Module:
    """Make the loss module of a variant, whose reference points are all data."""
    config, variant = run.config, VARIANTS[name]
    field = make_field(run, name, data.var(0).mean().item())
    times = UniformTimes(config.start, config.end)
    if not variant.flux:
        return FlowMatching(field, FlowOptions(times=times, backend=run.backend))
    options = FluxOptions(divergence="exact", backend=run.backend)
    if variant.least_energy:
        return LeastEnergyMatching(field, options, times=times, refs=data, energy_weight=config.energy_weight)
    return VFluxMatching(field, LinearPath(), options, times=times, normalizer=VelocityUnits(), refs=data)


def make_trainer(run: Run, name: str, data: Tensor) -> Trainer:
    """Make a trainer, which resumes from the last checkpoint in the folder of its variant.

    Args:
        run: settings, random numbers, backend, device and folder.
        name: one of `VARIANTS`.
        data: training samples, `[n, 2]`.
    """
    config = run.config
    options = TrainingOptions(
        config.steps, config.batch, lr=config.lr, optimizer="adam", ema=config.ema,
        seed=run.generator("training").initial_seed() >> 1, accelerator=str(run.device), progress=run.progress,
    )  # fmt: skip
    return Trainer(
        make_loss(run, name, data),
        data,
        options,
        folder=run.out / "models" / name.replace(", ", "-").replace(" ", "-"),
        lr_factor=cosine_decay(config.steps),
    )


def train(run: Run, name: str, data: Tensor) -> nn.Module:
    """Train, or resume training, and return the averaged field. Arguments as in `make_trainer`."""
    trainer = make_trainer(run, name, data)
    trainer.run()
    run.save_seconds()
    return averaged_field(trainer).requires_grad_(False)
