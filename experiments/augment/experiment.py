"""A field added to a frozen score model so that its chains mix faster (Appendix C.4, Eq. 48)."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.augment import figures, measure, problems
from experiments.augment.results import results
from experiments.common.registry import Experiment, check_sizes
from experiments.common.results import Figure
from experiments.common.run import Run


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        seeds: number of trainings and sets of chains of every field.
        ranking_samples: samples of one evaluation of the autocorrelation loss in the ranking of known fields.
        proxies: minibatches over which the paper's proxy is averaged there.
        ranking_chains, ranking_steps, ranking_step_size: chains there; the step size in units of σ².
        data, batch, lr, ema: training with Adam; the learning rate falls to zero along a cosine.
        width: width of the networks.
        terms: antisymmetric matrices of an exact v in ten dimensions.
        exact_steps, steps: iterations for exact and for learned v on mixtures.
        score_steps, score_width: of the score model that is trained.
        flux_weight, defect_weight, law_weight: weights of the augmentation loss, the step defect, and the energy
            distance after four steps; that of the autocorrelation loss is 1.
        learned_on: mixtures on which a v is learned.
        evaluations, chains: length and number of the chains per schedule; at σ = 0.4 they are twice as long.
        thinning: schedules are tried that many apart in their list; 1 for all.
        bias: bias at which fields are compared on mixtures.
        gaussian_dim, condition: dimensions of the Gaussian, and the ratio of its largest to its smallest variance.
        gaussian_steps, gaussian_lr, gaussian_flux_weight, gaussian_defect_weight: training on it.
        gaussian_bias: bias at which fields are compared on it.
    """

    seeds: int = 3
    ranking_samples: int = 4096
    proxies: int = 10
    ranking_chains: int = 150
    ranking_steps: int = 6000
    ranking_step_size: float = 0.1
    data: int = 4096
    batch: int = 256
    lr: float = 3e-3
    ema: float = 0.98
    width: int = 64
    terms: int = 4
    exact_steps: int = 300
    steps: int = 400
    score_steps: int = 1500
    score_width: int = 64
    flux_weight: float = 10.0
    defect_weight: float = 1.0
    law_weight: float = 50.0
    learned_on: tuple[str, ...] = (problems.plane(problems.SIGMA), problems.WIDE)
    evaluations: int = 1000
    chains: int = 48
    thinning: int = 1
    bias: float = 0.03
    gaussian_dim: int = 16
    condition: float = 100.0
    gaussian_steps: int = 500
    gaussian_lr: float = 0.01
    gaussian_flux_weight: float = 10.0
    gaussian_defect_weight: float = 3.0
    gaussian_bias: float = 0.05

    def __post_init__(self) -> None:
        check_sizes(self, data=self.batch, batch=4, ema=0, gaussian_dim=2, chains=2, ranking_samples=256)
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema}")
        if unknown := set(self.learned_on) - set(problems.MIXTURES):
            raise ValueError(f"learned_on must hold names among {', '.join(problems.MIXTURES)}, got {min(unknown)!r}")


def main(run: Run) -> None:
    """Rank known fields, train and compare fields, draw the figures."""
    measure.rank(run)
    measure.compare(run)
    paths = {name: run.figure(name) for name in ("ranking", "costs")}
    figures.draw_ranking(run, paths["ranking"])
    figures.draw_costs(run, paths["costs"])
    run.summary(
        results(run),
        [
            Figure(paths["ranking"], "s + αJs: each number over that of the score. One that rewards mixing falls."),
            Figure(
                paths["costs"],
                "Evaluations per independent draw against bias: the best of all schedules tried, one line per seed.",
            ),
        ],
        ("No gain is claimed for sampling in few steps from noise, which this experiment does not measure.",),
    )


EXPERIMENT = Experiment(
    name="augment",
    title="A field added to a frozen score, for chains that mix faster",
    paper="C.4, Eq. 48",
    claim=(
        "A field v with ∇·(p v) = 0, trained on top of a frozen score with an estimate of the autocorrelation time as "
        "objective, lets Langevin chains make an independent draw in fewer evaluations at the same bias. Step sizes "
        "are tuned for each field."
    ),
    presets={
        "smoke": Config(
            seeds=1, ranking_samples=2048, proxies=1,
            ranking_chains=40, ranking_steps=2600, ranking_step_size=0.15, data=64, batch=32, width=8, terms=1,
            exact_steps=3, steps=3, score_steps=3, score_width=8, learned_on=(problems.WIDE,), evaluations=40, chains=8,
            gaussian_dim=3, gaussian_steps=3, thinning=20,
        ),
        "small": Config(),
        "paper": Config(
            seeds=5, ranking_samples=16_384, ranking_chains=1000, ranking_steps=20_000, data=16_384, batch=512,
            exact_steps=2000, steps=5000, score_steps=20_000, score_width=128, learned_on=problems.MIXTURES,
            evaluations=8000, chains=256, gaussian_steps=4000,
        ),
    },
    main=main,
)  # fmt: skip
