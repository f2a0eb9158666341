"""Measurements of a field: marginals, Euler steps, averages over p_t such as the kinetic energy, v-flux loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from experiments.common.distances import wasserstein2
from experiments.common.run import Run
from experiments.v_flux.mixture import MixtureFlow
from fluxmatching import FluxOptions, ODESolver, UniformTimes, integrate_flow, v_flux_loss

Field = Callable[[Tensor, Tensor], Tensor]
TIMES = (0.2, 0.4, 0.6, 0.8, 1.0)
SOLVER = ODESolver("rk4", num_steps=100)
GRID = [k / 20 for k in range(21)]  # times of averages over p_t, from which integrals over t are made
STRATA = 16  # times per evaluation of the loss


def starts(run: Run) -> Tensor:
    """Draw the points from which all fields start, N(0, I), `[samples, 2]`."""
    return torch.randn(run.config.samples, 2, generator=run.generator("start")).to(run.device)


def fresh(run: Run, flow: MixtureFlow, t: float) -> Tensor:
    """Draw the samples of p_t to which all fields are compared, `[samples, 2]`."""
    return flow.sample(t, run.config.samples, run.generator("fresh", f"{t}"))


def carry(field: Field, x: Tensor) -> Tensor:
    """Carry points from t = 0 to all of `TIMES`: `[N, 2]` to `[times, N, 2]`."""
    times = torch.tensor((0.0, *TIMES), dtype=torch.float64, device=x.device)
    return integrate_flow(field, x, times=times, solver=SOLVER)[1:]


def measure_floor(run: Run, flow: MixtureFlow) -> None:
    """Log missing rows "floor": W2 of independent samples of p_t to those that all fields are compared to."""
    done = {(row["t"], row["index"]) for row in run.rows("floor")}
    for t in TIMES:
        for index in range(run.config.floor_samples):
            if (t, index) not in done:
                other = flow.sample(t, run.config.samples, run.generator("floor", f"{t}", index))
                run.log(kind="floor", t=t, index=index, w2=wasserstein2(other, fresh(run, flow, t)))


def measure(run: Run, flow: MixtureFlow, name: str, field: Field) -> None:
    """Log missing rows of a field: "marginal", "euler", "average" and "loss"."""
    rows = [row for row in run.rows() if row.get("field") == name]
    logged = {(row["kind"], row.get("t"), row.get("steps")) for row in rows}
    x = starts(run)
    if wanted := [t for t in TIMES if ("marginal", t, None) not in logged]:
        found = dict(zip(TIMES, carry(field, x), strict=True))
        for t in wanted:
            run.log(kind="marginal", field=name, t=t, w2=wasserstein2(found[t], fresh(run, flow, t)))
    for steps in run.config.euler_steps:
        if ("euler", None, steps) not in logged:
            found_end = integrate_flow(field, x, solver=ODESolver("euler", num_steps=steps))
            run.log(kind="euler", field=name, steps=steps, w2=wasserstein2(found_end, fresh(run, flow, 1.0)))
    for t in GRID:
        if ("average", t, None) not in logged:
            run.log(kind="average", field=name, t=t, **averages(run, flow, field, t))
    if ("loss", None, None) not in logged:
        mean, error = held_out_loss(run, flow, field)
        run.log(kind="loss", field=name, mean=mean, error=error)


def averages(run: Run, flow: MixtureFlow, field: Field, t: float) -> dict[str, float]:
    """Average over exact samples of p_t: energy E|f|², and distances E|f - v|² to both exact fields."""
    x = flow.sample(t, run.config.points, run.generator("points", f"{t}"))
    times = torch.full((len(x),), t).to(x)
    with torch.no_grad():
        f = field(x, times)
        compared = {
            "energy": torch.zeros_like(x),
            "to_velocity": flow.velocity(x, times),
            "to_causal": flow.causal(x, times),
        }
        return {what: (f - other).double().square().sum(1).mean().item() for what, other in compared.items()}


def held_out_loss(run: Run, flow: MixtureFlow, field: Field) -> tuple[float, float]:
    """Average σ² ℓ/2, the squared error of the part of f that moves p_t, on the exact density, with standard error.

    The means of the mixture are the reference points of the density, exactly; see `mixture.ComponentPath`.
    """
    config, means = run.config, flow.means.float()
    options = FluxOptions(divergence="exact", strata=STRATA, backend=run.backend)
    found = []
    for index in range(config.loss_repeats):
        generator = run.generator("loss", index)
        uniform = (torch.arange(STRATA) + torch.rand(STRATA, generator=generator)) / STRATA
        t = UniformTimes(config.start, config.end).quantile(uniform.double()).to(means.device)
        component = torch.randint(len(means), (STRATA * config.loss_batch,), generator=generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.enable_grad():
            loss = v_flux_loss(field, means[component.to(means.device)], t, flow.path, options, refs=means, seed=seed)
        half = flow.path.coefficients(t).sigma.square() / 2
        found.append((loss.detach().double().unflatten(0, (STRATA, -1)) * half.unsqueeze(-1)).mean().item())
    return statistics.mean(found), statistics.stdev(found) / math.sqrt(len(found))
