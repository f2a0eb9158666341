"""Simulated cells whose velocity is known: switched genes, branching trees with counts, and a regulatory network.

All follow the splicing kinetics du/dt = α - β u, ds/dt = β u - γ s. The velocity returned is ds/dt of the expected
abundance, before noise and counting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

DURATION = 25.0  # length of the course of switched genes, in units in which rates are near 0.5
# Time at which a gene is switched off, as a fraction of the course: early enough for cells to decay again, or not.
COURSES = {"complete": (0.2, 0.6), "cut short": (0.6, 1.0)}
KINDS = ("tree", "branch rates", "flat", "cell cycle")  # of the genes of a tree
HILL = 4  # exponent of the regulation in the network
SHARE_SWITCHED = 0.5  # of the genes of a tree at each new branch
CYCLE = 8.0  # length of the cell cycle, in units of a branch of a tree, which is 4 to 7 long


@dataclass(frozen=True)
class SimulatedCells:
    """Simulated cells with their truth.

    Attributes:
        unspliced, spliced: what is observed: counts, or abundances with noise, `[cells, genes]`.
        expected_unspliced, expected_spliced: u and s, `[cells, genes]`.
        velocity: ds/dt in units of s per time, `[cells, genes]`.
        time: time since the start of each cell's course, `[cells]`.
        branch: name of each cell's branch, `[cells]`.
        ratio: γ/β, `[genes]`; NaN where it depends on the branch.
        kind: name of each gene's kind, `[genes]`.
        edges: (parent, child) of branches.
        counts: whether the observations are counts, which need size normalization.
    """

    unspliced: np.ndarray
    spliced: np.ndarray
    expected_unspliced: np.ndarray
    expected_spliced: np.ndarray
    velocity: np.ndarray
    time: np.ndarray
    branch: np.ndarray
    ratio: np.ndarray
    kind: np.ndarray
    edges: tuple[tuple[str, str], ...] = field(default=())
    counts: bool = False

    def to_anndata(self) -> AnnData:
        """Return the observations as layers, and the truth as `layers["true_velocity"]`, `var` and `obs`."""
        from anndata import AnnData

        layers = {"unspliced": self.unspliced, "spliced": self.spliced}
        adata = AnnData(self.spliced.astype(np.float32), layers={k: v.astype(np.float32) for k, v in layers.items()})
        adata.layers["true_velocity"] = self.velocity
        adata.var["true_ratio"], adata.var["kind"] = self.ratio, self.kind
        adata.obs["true_time"], adata.obs["clusters"] = self.time, self.branch
        return adata


def kinetics(
    time: np.ndarray, alpha: np.ndarray, beta: np.ndarray, gamma: np.ndarray, start: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Solve du/dt = α - β u, ds/dt = β u - γ s with constant rates, β ≠ γ.

        u(t) = α/β + (u0 - α/β) e^{-βt}
        s(t) = α/γ + m e^{-βt} + (s0 - α/γ - m) e^{-γt},   m = (β u0 - α)/(γ - β)

    Args:
        time: t, time with these rates.
        alpha, beta, gamma: rates.
        start: u0 and s0.

    Returns:
        u and s; all arguments broadcast.
    """
    u0, s0 = start
    by_splicing, by_degradation = np.exp(-beta * time), np.exp(-gamma * time)
    unspliced = alpha / beta + (u0 - alpha / beta) * by_splicing
    mixed = (beta * u0 - alpha) / (gamma - beta)
    spliced = alpha / gamma + mixed * by_splicing + (s0 - alpha / gamma - mixed) * by_degradation
    return unspliced, spliced


def simulate_switches(seed: int, course: str, noise: float, cells: int, genes: int) -> SimulatedCells:
    """Simulate genes that are switched on at time 0 and off later, by the rules of scVelo's simulation.

    Rates are log-normal (σ = 0.5 about α = 5, β = 0.5, γ = 0.3), times uniform on [0, `DURATION`], switching times
    uniform on the part of the course given by `COURSES`. Noise is normal, clipped at 0; its standard deviation is
    `noise` times a tenth of the gene's 99th percentile. Rules: `scvelo.datasets.simulation`, scVelo 0.3.4.

    Args:
        seed: determines all numbers.
        course: "complete" or "cut short".
        noise: noise level.
        cells, genes: size.
    """
    generator = np.random.default_rng(seed)
    alpha, beta, gamma = (np.exp(generator.normal(np.log(middle), 0.5, genes)) for middle in (5.0, 0.5, 0.3))
    switch = generator.uniform(*COURSES[course], genes) * DURATION
    time = np.sort(generator.uniform(0, DURATION, cells))
    zero = np.zeros(genes)
    risen = kinetics(switch, alpha, beta, gamma, (zero, zero))
    on = kinetics(time[:, None], alpha, beta, gamma, (zero, zero))
    off = kinetics(np.maximum(time[:, None] - switch, 0), zero, beta, gamma, risen)
    u, s = (np.where(time[:, None] < switch, *pair) for pair in zip(on, off, strict=True))
    noisy_u, noisy_s = (
        np.clip(x + generator.normal(size=x.shape) * noise / 10 * np.percentile(x, 99, axis=0), 0, None) for x in (u, s)
    )
    labels = np.array(["early", "middle", "late"])[np.minimum((3 * time / DURATION).astype(int), 2)]
    return SimulatedCells(
        noisy_u, noisy_s, u, s, beta * u - gamma * s, time, labels, gamma / beta, np.full(genes, "switch"),
        edges=(("early", "middle"), ("middle", "late")),
    )  # fmt: skip


@dataclass(frozen=True)
class Tree:
    """Branching tree with the kinetics of its genes.

    On each branch a gene has the transcription rate of the end of the branch before until its switching time, then its
    own. All genes begin at the steady state of the root's first rate.

    Attributes:
        parent: number of each branch's parent, -1 for the root, `[branches]`; parents come first.
        duration: length of each branch, `[branches]`.
        alpha: transcription rate after the switch, `[branches, genes]`.
        first_alpha: transcription rate at the start of the root, `[genes]`.
        switch: time of the switch within the branch, `[branches, genes]`.
        beta, gamma: rates of splicing and degradation, `[branches, genes]`.
    """

    parent: np.ndarray
    duration: np.ndarray
    alpha: np.ndarray
    first_alpha: np.ndarray
    switch: np.ndarray
    beta: np.ndarray
    gamma: np.ndarray

    def state(self, branch: int, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return u and s, each `[n, genes]`, at the times `[n]` after the start of a branch."""
        parent = self.parent[branch]
        if parent < 0:
            before, beta, gamma = self.first_alpha, self.beta[0], self.gamma[0]
            start = before / beta, before / gamma
        else:
            before = self.alpha[parent]
            u, s = self.state(parent, self.duration[parent : parent + 1])
            start = u[0], s[0]
        rates = self.beta[branch], self.gamma[branch]
        time, switch = time[:, None], self.switch[branch]
        at_switch = kinetics(switch, before, *rates, start)
        until = kinetics(np.minimum(time, switch), before, *rates, start)
        after = kinetics(np.maximum(time - switch, 0), self.alpha[branch], *rates, at_switch)
        return np.where(time < switch, until[0], after[0]), np.where(time < switch, until[1], after[1])

    def start(self, branch: int) -> float:
        """Return the time from the start of the root to that of a branch."""
        parent = self.parent[branch]
        return 0.0 if parent < 0 else self.start(parent) + float(self.duration[parent])


def grow_tree(generator: np.random.Generator, kind: np.ndarray, branch_points: int) -> Tree:
    """Draw a binary tree and its genes' rates.

    A branch point splits a leaf, chosen at random, in two. At a new branch half of the genes get a new transcription
    rate, off for a third of them; the others keep theirs. Genes of the kind "branch rates" also get new β and γ; "flat"
    genes never change.

    Args:
        generator: source of all numbers.
        kind: kind of each gene, one of `KINDS`, `[genes]`.
        branch_points: number of branch points.
    """
    parent = [-1]
    for _ in range(branch_points):
        leaves = [branch for branch in range(len(parent)) if branch not in parent]
        parent += [int(generator.choice(leaves))] * 2
    branches, genes = len(parent), len(kind)
    duration = generator.uniform(4, 7, branches)
    beta, gamma = (np.exp(generator.normal(np.log(middle), 0.4, (branches, genes))) for middle in (1.0, 0.5))
    same = kind != "branch rates"
    beta[:, same], gamma[:, same] = beta[0, same], gamma[0, same]
    first_alpha = np.exp(generator.normal(np.log(5), 1, genes)) * np.where(
        (kind == "tree") & (generator.random(genes) < 0.4), 0.02, 1
    )
    alpha = np.empty((branches, genes))
    for branch in range(branches):
        before = first_alpha if branch == 0 else alpha[parent[branch]]
        new = np.exp(generator.normal(np.log(5), 1, genes)) * np.where(generator.random(genes) < 1 / 3, 0.02, 1)
        switched = (generator.random(genes) < SHARE_SWITCHED) & (kind != "flat")
        alpha[branch] = np.where(switched, new, before)
    switch = generator.uniform(0, 0.6, (branches, genes)) * duration[:, None]
    return Tree(np.array(parent), duration, alpha, first_alpha, switch, beta, gamma)


def cell_cycle(
    phase: np.ndarray, level: np.ndarray, peak: np.ndarray, beta: np.ndarray, gamma: np.ndarray, period: float
) -> tuple[np.ndarray, np.ndarray]:
    """Solve the kinetics with α = level (1 + cos(φ - peak)), φ = ω t, after many periods.

        u = level (1/β + Re[e^{i(φ - peak)} / (β + iω)])
        s = level (1/γ + Re[β e^{i(φ - peak)} / ((β + iω)(γ + iω))])

    Args:
        phase: φ of each cell, `[cells]`.
        level, peak, beta, gamma: of each gene, `[genes]`.
        period: 2π/ω.

    Returns:
        u and s, `[cells, genes]`.
    """
    turn = 2j * np.pi / period
    wave = np.exp(1j * (phase[:, None] - peak))
    unspliced = level * (1 / beta + (wave / (beta + turn)).real)
    spliced = level * (1 / gamma + (beta * wave / ((beta + turn) * (gamma + turn))).real)
    return unspliced, spliced


def count(
    generator: np.random.Generator, expected: np.ndarray, depth: np.ndarray, dispersion: float = 0.0
) -> np.ndarray:
    """Draw counts with mean m = depth · expected and variance m + dispersion m²: Poisson, or negative binomial.

    Args:
        generator: source of all numbers.
        expected: mean at depth 1, `[cells, genes]`.
        depth: fraction of molecules that is counted, `[cells]`.
        dispersion: of the negative binomial; 0 for Poisson.
    """
    mean = depth[:, None] * expected
    if dispersion:
        mean = mean * generator.gamma(1 / dispersion, dispersion, mean.shape)
    return generator.poisson(mean).astype(float)


def simulate_tree(
    seed: int, cells: int, genes: int, *, branch_points: int = 2, capture: float = 0.15, dispersion: float = 0.0
) -> SimulatedCells:
    """Simulate counts of cells on a branching tree.

    Of the genes, 60 % follow the tree, 10 % also change β and γ at branches, 20 % are flat, and 10 % follow a cell
    cycle that is independent of the tree. Cells are uniform along all branches together.

    Args:
        seed: determines all numbers.
        cells, genes: size.
        branch_points: number of branch points.
        capture: median fraction of molecules that is counted; it is log-normal among cells (σ = 0.3).
        dispersion: variance of counts beyond Poisson, as in `count`.
    """
    generator = np.random.default_rng(seed)
    kind = generator.permutation(
        np.repeat(KINDS, np.diff(np.round(np.array([0, 0.6, 0.7, 0.9, 1]) * genes).astype(int)))
    )
    tree = grow_tree(generator, kind, branch_points)
    share = tree.duration / tree.duration.sum()
    branch = generator.choice(len(share), cells, p=share)
    within = generator.uniform(0, tree.duration[branch])
    u, s = np.empty((2, cells, genes))
    for number in range(len(share)):
        u[branch == number], s[branch == number] = tree.state(number, within[branch == number])
    cycling = kind == "cell cycle"
    peak, phase = generator.uniform(0, 2 * np.pi, cycling.sum()), generator.uniform(0, 2 * np.pi, cells)
    rates = tree.first_alpha[cycling], peak, tree.beta[0, cycling], tree.gamma[0, cycling]
    u[:, cycling], s[:, cycling] = cell_cycle(phase, *rates, CYCLE)
    velocity = tree.beta[branch] * u - tree.gamma[branch] * s
    depth = capture * np.exp(generator.normal(0, 0.3, cells))
    names = np.array([f"branch {number}" for number in range(len(share))])
    return SimulatedCells(
        count(generator, u, depth, dispersion), count(generator, s, depth, dispersion), u, s, velocity,
        within + np.array([tree.start(number) for number in branch]), names[branch],
        np.where(kind == "branch rates", np.nan, tree.gamma[0] / tree.beta[0]), kind,
        edges=tuple((str(names[above]), str(names[below])) for below, above in enumerate(tree.parent) if above >= 0),
        counts=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Regulatory network: α_g = basal_g + most_g times the product over its regulators j of Hill functions of s_j.

    An activator contributes x^h / (1 + x^h), a repressor 1 / (1 + x^h), with x = s_j / threshold_j and h = `HILL`.

    Attributes:
        sign: effect of gene j on gene g: 1, -1 or 0, `[genes, genes]`, g first.
        threshold: spliced abundance at which a regulator acts by half, `[genes]`.
        basal, most: transcription rates without activation and added by it, `[genes]`.
        beta, gamma: rates, `[genes]`.
    """

    sign: np.ndarray
    threshold: np.ndarray
    basal: np.ndarray
    most: np.ndarray
    beta: np.ndarray
    gamma: np.ndarray

    def transcription(self, s: np.ndarray) -> np.ndarray:
        """Return α at spliced abundances `[cells, genes]`."""
        regulators = np.flatnonzero(self.sign.any(0))
        power = (np.clip(s[:, regulators], 0, None) / self.threshold[regulators]) ** HILL
        effect = np.ones_like(s)
        for j, x in zip(regulators, power.T, strict=True):
            by_sign = {1: x / (1 + x), -1: 1 / (1 + x)}
            for sign, hill in by_sign.items():
                effect[:, self.sign[:, j] == sign] *= hill[:, None]
        return self.basal + self.most * effect

    def drift(self, state: np.ndarray) -> np.ndarray:
        """Return (du/dt, ds/dt) of (u, s), `[2, cells, genes]`."""
        u, s = state
        return np.stack([self.transcription(s) - self.beta * u, self.beta * u - self.gamma * s])


def draw_network(generator: np.random.Generator, genes: int) -> Network:
    """Draw a network of three regulators and their targets.

    Gene 0 is lost over time. It represses genes 1 and 2, which repress each other: cells take one of two fates.
    Every other gene has one or two of the three as regulators, activating or repressing.
    """
    sign = np.zeros((genes, genes), dtype=int)
    sign[1, 2] = sign[2, 1] = sign[1, 0] = sign[2, 0] = -1
    for target in range(3, genes):
        for regulator in generator.choice(3, generator.integers(1, 3), replace=False):
            sign[target, regulator] = generator.choice([-1, 1], p=[0.35, 0.65])
    beta, gamma = (np.exp(generator.normal(np.log(middle), 0.4, genes)) for middle in (1.0, 0.5))
    most = np.exp(generator.normal(np.log(5), 0.5, genes))
    basal = 0.02 * most
    beta[:3], gamma[:3], basal[:3] = 1.0, (0.25, 0.5, 0.5), 0.1
    most[:3] = 0.0, 4.0, 4.0
    threshold = np.full(genes, 2.5)
    return Network(sign, threshold, basal, most, beta, gamma)


def integrate(
    network: Network, start: np.ndarray, times: np.ndarray, step: float, noise: float, generator: np.random.Generator
) -> np.ndarray:
    """Return the state of cell i at `times[i]`, `[2, cells, genes]`: the Runge-Kutta method of order 4.

    With noise, every step adds `noise` √(step · state) times a normal number to u and s, kept above 0.

    Args:
        network: the network.
        start: u and s at time 0, `[2, cells, genes]`.
        times: `[cells]`; rounded up to whole steps.
        step: length of a step.
        noise: strength of the noise.
        generator: source of the noise.
    """
    state, steps = start.copy(), np.ceil(times / step - 1e-9).astype(int)
    for number in range(steps.max()):
        active = steps > number
        x = state[:, active]
        k1 = network.drift(x)
        k2 = network.drift(x + step / 2 * k1)
        k3 = network.drift(x + step / 2 * k2)
        k4 = network.drift(x + step * k3)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        if noise:
            x = np.clip(x + noise * np.sqrt(step * np.clip(x, 0, None)) * generator.normal(size=x.shape), 0, None)
        state[:, active] = x
    return state


def simulate_network(
    seed: int, cells: int, genes: int, *, noise: float = 0.1, capture: float = 0.3, duration: float = 20.0
) -> SimulatedCells:
    """Simulate counts of cells that a small regulatory network drives into one of two fates.

    Args:
        seed: determines all numbers.
        cells, genes: size; at least 3 genes.
        noise: strength of the noise of `integrate`.
        capture: as in `simulate_tree`.
        duration: times of cells are uniform on [0, duration].
    """
    generator = np.random.default_rng(seed)
    network = draw_network(generator, genes)
    settled = np.zeros((2, 1, genes))
    settled[:, :, 0] = 8.0
    alpha = network.transcription(settled[1])
    start = np.repeat(np.stack([alpha / network.beta, alpha / network.gamma]), cells, 1)
    start[:, :, :3] = np.array([[8 * 0.25, 0.25, 0.25], [8.0, 0.5, 0.5]])[:, None]
    start *= np.exp(generator.normal(0, 0.15, (1, cells, genes)))
    times = np.sort(generator.uniform(0, duration, cells))
    u, s = integrate(network, start, times, 0.05, noise, generator)
    depth = capture * np.exp(generator.normal(0, 0.3, cells))
    early = times < duration / 4
    labels = np.where(early, "early", np.where(s[:, 1] > s[:, 2], "fate 1", "fate 2"))
    velocity = network.beta * u - network.gamma * s
    return SimulatedCells(
        count(generator, u, depth), count(generator, s, depth), u, s, velocity, times, labels,
        network.gamma / network.beta, np.array(["regulator"] * 3 + ["target"] * (genes - 3)),
        edges=(("early", "fate 1"), ("early", "fate 2")), counts=True,
    )  # fmt: skip
