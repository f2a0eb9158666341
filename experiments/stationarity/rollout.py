"""Long unadjusted Langevin runs from a bad start, with histograms and the current along the path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.common.mixture import GaussianMixture
from experiments.common.run import Run
from experiments.stationarity.checks import Bins, CurrentEstimator, Field, total_variation
from fluxmatching import unadjusted_langevin


@dataclass(frozen=True)
class Rollout:
    """Histograms of all chains at the `times`, `[len(times), bins]`, and the current over the second half."""

    times: list[float]
    histograms: Tensor
    current: CurrentEstimator

    def at(self, time: float) -> Tensor:
        """Return the histogram nearest to `time`."""
        return self.histograms[min(range(len(self.times)), key=lambda k: abs(self.times[k] - time))]


def roll_out(
    run: Run,
    state: dict[str, Any],
    name: str,
    field: Field,
    mixture: GaussianMixture,
    bins: Bins,
    start: tuple[float, float],
) -> Rollout:
    """Run the dynamics of `field` with all chains at `start` first, or resume such a run.

    The run is divided into segments, each with its own random numbers. After each segment the total-variation
    distance to `mixture` is logged and a checkpoint is written.

    Args:
        run: the run, which takes rows and checkpoints.
        state: state of the whole run; the entry "rollout <name>" is read and updated.
        name: name of the field.
        field: f, `[N, 2]` to `[N, 2]`.
        mixture: the target.
        bins: bins of histograms and current.
        start: first point of all chains.
    """
    config = run.config
    key, target = f"rollout {name}", bins.probabilities(mixture).cpu()
    current = CurrentEstimator(bins, config.step_size, run.device)
    if key in state:
        saved = state[key]
        x, histograms = saved["x"].to(run.device), saved["histograms"]
        current.visits, current.moves = saved["visits"].to(run.device), saved["moves"].to(run.device)
    else:
        x = mixture.means.new_tensor(start).expand(config.chains, 2)
        histograms = bins.histogram(x).cpu().unsqueeze(0)
    logged = {row["time"] for row in run.rows("distance") if row["field"] == name}
    times = [k * config.segment * config.step_size for k in range(config.segments + 1)]

    for segment in run.bar(range(len(histograms) - 1, config.segments), f"run {name}"):
        generator = run.device_generator("rollout", name, segment)
        path = [x]
        unadjusted_langevin(
            field,
            x,
            step_size=config.step_size,
            num_steps=config.segment,
            generator=generator,
            callback=lambda _, state, path=path: path.append(state),  # type: ignore[misc]
        )
        if 2 * segment >= config.segments:
            for before, now, after in zip(path, path[1:], path[2:], strict=False):
                current.add(before, now, after)
        x = path[-1]
        histogram = bins.histogram(x).cpu()
        histograms = torch.cat([histograms, histogram.unsqueeze(0)])
        if times[segment + 1] not in logged:
            run.log(
                kind="distance",
                field=name,
                time=times[segment + 1],
                total_variation=total_variation(histogram, target),
            )
        state[key] = {
            "x": x,
            "histograms": histograms,
            "visits": current.visits,
            "moves": current.moves,
        }
        run.save_state(state)
    return Rollout(times, histograms, current)
