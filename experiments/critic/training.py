"""Training for equal CPU seconds: costs of a step, a small grid of settings, and curves of quality."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from experiments.common.run import Run
from experiments.critic.methods import (
    CONTROL,
    CRITICS,
    DSM,
    FEATURES,
    LEARNED,
    METHODS,
    Sizes,
    make_method,
)
from experiments.critic.problems import MIXTURE, SPRINGS, Problem, make_problem

AVERAGE = 0.99  # decay of the moving average of the weights
TUNING = 1 / 3  # of the budget of a training, for each setting
MARKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the budget
LRS = {MIXTURE: (1e-3, 3e-3), SPRINGS: (1e-2, 3e-2)}


@dataclass(frozen=True)
class Option:
    """Setting of a method besides its learning rate of the field.

    Attributes:
        text: in words.
        sizes: of its minibatches and networks.
        adaptations: steps of what it learns on the side, per step of the field.
        lr: learning rate of these.
    """

    text: str
    sizes: Sizes
    adaptations: int = 0
    lr: float = 0.0


def base_sizes(run: Run, name: str) -> Sizes:
    """Return the sizes of a problem."""
    config = run.config
    probes = 0 if name == MIXTURE else config.probes
    return Sizes(config.batch, width=config.width, depth=config.depth, probes=probes, backend=run.backend)


def options(run: Run, name: str, method: str) -> tuple[Option, ...]:
    """Return the two options of a method on a problem."""
    base = base_sizes(run, name)
    refs = run.config.refs
    if method in CRITICS:
        return Option("2 steps, 0.003", base, 2, 3e-3), Option("1 step, 0.01", base, 1, 1e-2)
    if method in (LEARNED, CONTROL):
        return Option("1 step, 0.003", base, 1, 3e-3), Option("1 step, 0.01", base, 1, 1e-2)
    if method == FEATURES and name == MIXTURE:
        return Option("64 cosines", base), Option("200 cosines", replace(base, features=200))
    if method == FEATURES:
        return Option("minibatch", base), Option("4 times the minibatch", replace(base, batch=4 * base.batch))
    if method == DSM and name == MIXTURE:
        return Option("minibatch", base), Option("4 times the minibatch", replace(base, batch=4 * base.batch))
    if name == MIXTURE:
        return Option("1 horizon", base), Option("8 horizons", replace(base, strata=8))
    return Option("minibatch", base), Option(f"{refs} reference points", replace(base, refs=refs))


class Training:
    """A field, its optimizer and its moving average, with the method that gives the gradient."""

    def __init__(self, problem: Problem, method: str, option: Option, lr: float) -> None:
        self.field = problem.make_field()
        self.method = make_method(method, problem, option.sizes, option.lr)
        self.optimizer = torch.optim.Adam(self.field.parameters(), lr)
        self.average = AveragedModel(self.field, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
        self.adaptations = option.adaptations

    def adapt(self, generator: torch.Generator) -> None:
        """Take the steps of what is learned on the side."""
        for _ in range(self.adaptations):
            self.method.adapt(self.field, generator)

    def step(self, generator: torch.Generator) -> None:
        """Take a step of the field."""
        loss = self.method.loss(self.field, generator)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.field)


def make_training(run: Run, problem: Problem, method: str, option: Option, lr: float, *key: int | str) -> Training:
    """Make a training whose initial weights follow from the key."""
    with run.drawing("weights", *key):
        return Training(problem, method, option, lr)


def measure_costs(run: Run, name: str, problem: Problem) -> None:
    """Log the CPU seconds of a step and of the adaptations, medians over rounds in which all methods take turns."""
    if any(row["problem"] == name for row in run.rows("cost")):
        return
    cases = [(method, k) for method in (*METHODS, CONTROL) for k in range(2)]
    trainings = {
        (method, k): make_training(run, problem, method, options(run, name, method)[k], 1e-3, "cost")
        for method, k in cases
    }
    times: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    generator = run.generator("cost", name)
    for _ in run.bar(range(run.config.rounds + 1), f"{name}: cost of a step"):
        for case, training in trainings.items():
            marks = [time.process_time()]
            for work in (training.adapt, training.step):
                work(generator)
                marks.append(time.process_time())
            times[case].append((marks[1] - marks[0], marks[2] - marks[1]))
    for (method, k), found in times.items():
        adapting, step = (statistics.median(column) for column in zip(*found[1:], strict=True))
        count = max(1, trainings[method, k].adaptations)
        run.log(kind="cost", problem=name, method=method, option=k, adapt=adapting / count, step=step)


def cost(run: Run, name: str, method: str, option: int) -> tuple[float, float]:
    """Return the CPU seconds of one adaptation and of one step of the field."""
    known = {"problem": name, "method": method, "option": option}
    (row,) = (row for row in run.rows("cost") if known.items() <= row.items())
    return row["adapt"], row["step"]


def num_steps(run: Run, name: str, method: str, option: int, seconds: float) -> int:
    """Return how many turns fit into some CPU seconds."""
    adapt, step = cost(run, name, method, option)
    return max(1, round(seconds / (options(run, name, method)[option].adaptations * adapt + step)))


def tune(run: Run, name: str, problem: Problem) -> None:
    """Log σ² J after a part of the budget for every setting; rows "tuning"."""
    done = {(row["method"], row["option"], row["lr"]) for row in run.rows("tuning") if row["problem"] == name}
    cases = [case for case in itertools.product(METHODS, range(2), LRS[name]) if case not in done]
    for method, k, lr in run.bar(cases, f"{name}: settings"):
        training = make_training(run, problem, method, options(run, name, method)[k], lr, "tuning", name)
        generator = run.generator("tuning", name)
        for _ in range(num_steps(run, name, method, k, run.config.seconds(name) * TUNING)):
            training.adapt(generator)
            training.step(generator)
        loss = quality(problem, training)["loss"]
        setting = options(run, name, method)[k].text
        run.log(kind="tuning", problem=name, method=method, option=k, setting=setting, lr=lr, loss=loss)


def best_setting(run: Run, name: str, method: str) -> tuple[int, float]:
    """Return option and learning rate with the least σ² J."""
    rows = [row for row in run.rows("tuning") if (row["problem"], row["method"]) == (name, method)]
    best = min(rows, key=lambda row: row["loss"])
    return best["option"], best["lr"]


def quality(problem: Problem, training: Training) -> dict[str, float]:
    """Return σ² J of the averaged field and the distance of its stationary law; infinite if it diverged."""
    field = training.average.module.eval()
    if not all(parameter.isfinite().all() for parameter in field.parameters()):
        return {"loss": math.inf, "distance": math.inf}
    with torch.no_grad():
        return {"loss": problem.exact_loss(field)[1], "distance": problem.distance(field)}


def train(run: Run, name: str, problem: Problem, method: str, seed: int) -> None:
    """Train once with the best setting: rows "curve" at parts of the budget, then one row "final"."""
    if run.by_seed("final", "seed", problem=name, method=method, seed=seed):
        return
    k, lr = best_setting(run, name, method)
    known = {"problem": name, "method": method, "seed": seed}
    training = make_training(run, problem, method, options(run, name, method)[k], lr, name, seed)
    logged = set(run.by_seed("curve", "part", **known))
    generator = run.generator("training", name, seed)
    budget = run.config.seconds(name)
    total, done = num_steps(run, name, method, k, budget), 0
    for part in (0.0, *MARKS):
        for _ in range(round(part * total) - done):
            training.adapt(generator)
            training.step(generator)
        done = round(part * total)
        if part not in logged:
            run.log(kind="curve", **known, part=part, seconds=part * budget, steps=done, **quality(problem, training))
    found = problem.sampled_distance(training.average.module.eval(), run.generator("chains", name, seed))
    run.log(kind="final", **known, option=k, lr=lr, w2=found, **quality(problem, training))


def study(run: Run, name: str) -> None:
    """Measure costs, choose settings and train every method on a problem."""
    config = run.config
    problem = make_problem(name, cells=config.cells, chains=config.chains, chain_steps=config.chain_steps)
    measure_costs(run, name, problem)
    tune(run, name, problem)
    cases = list(itertools.product(range(config.seeds), METHODS))
    for seed, method in run.bar(cases, f"{name}: trainings"):
        train(run, name, problem, method, seed)
