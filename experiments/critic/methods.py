"""Estimators of the gradient of σ² J, each with what it learns on the side."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from experiments.critic.critic import BY_PARTS, FORMS, NOISE, SCORE, Critic, critic_loss, draw_directions, paired_loss
from experiments.critic.problems import Problem, noised
from fluxkernels import kde_score
from fluxmatching import CosineFeatures, DSMOptions, FluxOptions, dsm_loss, flux_target, quadratic_flux_loss
from fluxmatching.fields import Field
from fluxmatching.losses.dual import dual_flux_loss

CROSS, SINGLE, DSM, FEATURES = "cross-chain", "single-chain", "DSM", "dual, features"
LEARNED, CONTROL = "learned q", "q as control variate"
CRITICS = {f"critic, {form}": form for form in FORMS}
CRITIC, CRITIC_NOISE, CRITIC_SCORE = CRITICS
FOLLOWERS = (*CRITICS, LEARNED)  # estimators in which a network stands for the gradient part of f - s
METHODS = (CROSS, SINGLE, FEATURES, *FOLLOWERS, DSM)


@dataclass(frozen=True)
class Sizes:
    """Sizes that all methods share.

    Attributes:
        batch: samples per step.
        strata: horizons per minibatch.
        refs: reference points of the density estimate where none are exact; 0 for the minibatch itself.
        width, depth: hidden layers of the critic and of the learned q.
        probes: random directions of the critic's loss; 0 for all axes.
        features: cosines of the dual with features.
        larger: samples of the control variate per sample of the minibatch.
        backend: backend of the ops.
    """

    batch: int = 256
    strata: int = 1
    refs: int = 0
    width: int = 64
    depth: int = 2
    probes: int = 0
    features: int = 64
    larger: int = 4
    backend: str | None = None


class Method(Protocol):
    """Estimator of the gradient."""

    def adapt(self, field: Field, generator: torch.Generator) -> None:
        """Take one step of what is learned on the side; the field is fixed."""

    def loss(self, field: Field, generator: torch.Generator) -> Tensor:
        """Return a number `[]` whose gradient in the parameters of the field estimates that of σ² J."""


class Chains:
    """Flux loss by cross-chain or single-chain estimates."""

    def __init__(self, problem: Problem, sizes: Sizes, estimator: str) -> None:
        self.problem, self.sizes = problem, sizes
        self.options = FluxOptions(estimator=estimator.replace("-", "_"), strata=sizes.strata, backend=sizes.backend)

    def adapt(self, field: Field, generator: torch.Generator) -> None:
        pass

    def target(self, field: Field, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return points and -σ² q̂ there, which estimates the gradient part of f - s, `[N, D]` each."""
        problem = self.problem
        x = problem.clean(self.sizes.batch, generator)
        refs = reference_points(problem, self.sizes, x, generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        found = flux_target(field, x, problem.sigma, self.options, refs=refs, seed=seed)
        return found.x0, -(problem.sigma**2) * found.target

    def loss(self, field: Field, generator: torch.Generator) -> Tensor:
        return self.problem.sigma**2 * paired_loss(field, *self.target(field, generator))


def reference_points(problem: Problem, sizes: Sizes, x: Tensor, generator: torch.Generator) -> Tensor:
    """Return exact reference points if the problem has them, else the minibatch x and more samples up to `refs`."""
    if problem.refs is not None:
        return problem.refs
    return torch.cat([x, problem.clean(max(0, sizes.refs - len(x)), generator)])


class Denoising:
    """Score matching with the noise itself as target."""

    def __init__(self, problem: Problem, sizes: Sizes) -> None:
        self.problem, self.sizes = problem, sizes

    def adapt(self, field: Field, generator: torch.Generator) -> None:
        pass

    def loss(self, field: Field, generator: torch.Generator) -> Tensor:
        x = self.problem.clean(self.sizes.batch, generator)
        refs = reference_points(self.problem, self.sizes, x, generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        options = DSMOptions(backend=self.sizes.backend)
        return dsm_loss(field, x, self.problem.sigma, options, refs=refs, seed=seed).mean()


class Dual:
    """Dual with fixed test functions: cosines in the plane, all quadratic functions for Gaussians."""

    def __init__(self, problem: Problem, sizes: Sizes) -> None:
        self.problem, self.sizes = problem, sizes
        generator = torch.Generator().manual_seed(0)
        self.cosines = None
        if problem.refs is not None:
            self.others, _ = noised(problem, 4 * sizes.features, generator)
            self.cosines = CosineFeatures.draw(self.others, sizes.features)

    def adapt(self, field: Field, generator: torch.Generator) -> None:
        pass

    def loss(self, field: Field, generator: torch.Generator) -> Tensor:
        x, _ = noised(self.problem, self.sizes.batch, generator)
        unit = self.problem.sigma**2
        if self.cosines is None:
            return unit * quadratic_flux_loss(field, x)[0]
        return unit * dual_flux_loss(field, x, self.cosines, refs=self.others).mean()


class Learning:
    """A network v on the side that stands for the gradient part of f - s.

    Args:
        problem, sizes: what is to be estimated, and how large.
        network: the network.
        lr: its learning rate.
    """

    def __init__(self, problem: Problem, sizes: Sizes, network: nn.Module, lr: float) -> None:
        self.problem, self.sizes, self.network, self.lr = problem, sizes, network, lr
        self.optimizer = torch.optim.Adam(network.parameters(), lr)

    def duplicate(self) -> Learning:
        """Return a copy that learns on without changing this one."""
        other = copy.copy(self)
        other.network = copy.deepcopy(self.network)
        other.optimizer = torch.optim.Adam(other.network.parameters(), self.lr)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other

    def descend(self, loss: Tensor) -> None:
        """Take a step of the network."""
        self.optimizer.zero_grad()
        (self.problem.sigma**2 * loss).backward()
        self.optimizer.step()

    def values(self, x: Tensor) -> Tensor:
        """Return v, `[n, D]`, detached."""
        raise NotImplementedError

    def adapt(self, field: Field, generator: torch.Generator) -> None:
        raise NotImplementedError

    def loss(self, field: Field, generator: torch.Generator) -> Tensor:
        x, _ = noised(self.problem, self.sizes.batch, generator)
        return self.problem.sigma**2 * paired_loss(field, x, self.values(x))


class CriticMethod(Learning):
    """v = ∇φ with a critic φ, in one of `FORMS`."""

    def __init__(self, problem: Problem, sizes: Sizes, form: str, lr: float) -> None:
        super().__init__(problem, sizes, Critic(problem.dim, sizes.width, sizes.depth, problem.spread), lr)
        self.form = form

    def adapt(self, field: Field, generator: torch.Generator) -> None:
        assert isinstance(self.network, Critic)
        x, drift = self.drift(field, generator)
        directions = draw_directions(x, self.sizes.probes, generator)
        self.descend(critic_loss(self.network, x, drift, directions, by_parts=self.form == BY_PARTS))

    def drift(self, field: Field, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return points and the vectors that the critic's loss needs there, `[N, D]` each."""
        problem, n = self.problem, self.sizes.batch
        noise = torch.randn(n, problem.dim, generator=generator)
        clean = problem.clean(n, generator)
        x = clean + problem.sigma * noise
        with torch.no_grad():
            f = field(x)
            if self.form == NOISE:
                return x, f + noise / problem.sigma
            if self.form == SCORE:
                refs = reference_points(problem, self.sizes, clean, generator)
                return x, f - kde_score(x, refs, problem.sigma**2, backend=self.sizes.backend)
        return x, f

    def values(self, x: Tensor) -> Tensor:
        assert isinstance(self.network, Critic)
        return self.network.gradient(x)


class LearnedTarget(Learning):
    """v = a perceptron that is fitted to -σ² q̂ of the cross-chain estimator."""

    def __init__(self, problem: Problem, sizes: Sizes, lr: float) -> None:
        widths = [problem.dim] + [sizes.width] * sizes.depth
        hidden = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.SiLU())]
        super().__init__(problem, sizes, nn.Sequential(*hidden, nn.Linear(sizes.width, problem.dim)), lr)
        self.chains = Chains(problem, sizes, CROSS)

    def values(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._scaled(x)

    def _scaled(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.network(x / self.problem.spread)
        return scaled / self.problem.sigma

    def adapt(self, field: Field, generator: torch.Generator) -> None:
        self.fit(*self.chains.target(field, generator))

    def fit(self, x: Tensor, wanted: Tensor) -> None:
        """Take a step of the regression on -σ² q̂ at x."""
        self.descend((self._scaled(x) - wanted).square().sum(1).mean())


class ControlVariate:
    """Cross-chain estimate with a learned q as control variate: q̂ - v on the minibatch, v on a larger sample.

    Args:
        learned: has v, which is fitted to the targets of the last minibatch.
    """

    def __init__(self, learned: LearnedTarget) -> None:
        self.learned = learned
        self.last: tuple[Tensor, Tensor] | None = None

    def adapt(self, field: Field, generator: torch.Generator) -> None:
        if self.last is not None:
            self.learned.fit(*self.last)

    def loss(self, field: Field, generator: torch.Generator) -> Tensor:
        learned, problem = self.learned, self.learned.problem
        self.last = x, wanted = learned.chains.target(field, generator)
        more, _ = noised(problem, learned.sizes.larger * len(x), generator)
        loss = paired_loss(field, x, wanted - learned.values(x)) + paired_loss(field, more, learned.values(more))
        return problem.sigma**2 * loss


def make_method(name: str, problem: Problem, sizes: Sizes, lr: float) -> Method:
    """Make one of `METHODS`, or `CONTROL`, with weights from torch's generator.

    Args:
        name: its name.
        problem, sizes: what is to be estimated, and how large.
        lr: learning rate of what it learns on the side.
    """
    if name in (CROSS, SINGLE):
        return Chains(problem, sizes, name)
    if name == DSM:
        return Denoising(problem, sizes)
    if name == FEATURES:
        return Dual(problem, sizes)
    if name == LEARNED:
        return LearnedTarget(problem, sizes, lr)
    if name == CONTROL:
        return ControlVariate(LearnedTarget(problem, sizes, lr))
    return CriticMethod(problem, sizes, CRITICS[name], lr)
