"""Lines of the summary, read from the logged rows."""

from __future__ import annotations

import statistics

from experiments.common.objectives import DSM, OBJECTIVES
from experiments.common.results import Result, spread
from experiments.common.run import Run
from experiments.common.timing import step_results
from experiments.fast_mixing import mixture


def results(run: Run) -> list[Result]:
    """All lines of the summary."""
    return [*of_mixture(run), *of_images(run), *step_results(run, DSM)]


def of_mixture(run: Run) -> list[Result]:
    """Lines about the mixture: mixing, bias and proxy of every field, and its samples by number of steps."""
    config = run.config
    few = min(config.mixture_steps)
    at_few = {name: run.by_seed("steps", "w2", field=name, steps=few) for name in mixture.FIELDS}
    times = {name: run.by_seed("mixture", "time", field=name) for name in at_few}
    lines = [
        Result(
            f"mixture, {name}: autocorrelation time (σ²) / W2 of chains to p_σ / proxy",
            f"{spread(times[name], '.2f')} / {spread(run.by_seed('mixture', 'bias', field=name))} / "
            f"{spread(run.by_seed('mixture', 'ratio', field=name))}",
        )
        for name in at_few
    ]
    lines += [
        Result(
            f"mixture, {name}: W2 in {', '.join(map(str, config.mixture_steps))} steps",
            ", ".join(spread(run.by_seed("steps", "w2", field=name, steps=k)) for k in config.mixture_steps),
        )
        for name in at_few
    ]
    lines.append(Result("mixture: W2 of exact samples", f"{run.rows('mixture floor')[0]['w2']:.3f}"))
    by_objective = {o: statistics.mean(times[o]) for o in OBJECTIVES}
    lines.append(rising("mixture: autocorrelation times", by_objective, ".2f", ""))
    lines.append(proxy_order(run))
    w2 = {o: statistics.mean(at_few[o]) for o in OBJECTIVES}
    lines.append(rising(f"mixture: W2 in {few} steps", w2, ".3f", " (Fig. 6)"))
    return lines


def proxy_order(run: Run) -> Result:
    """A line that holds if the proxy orders the two known fields as their autocorrelation times do."""
    times, proxies = (
        {name: statistics.mean(run.by_seed("mixture", column, field=name)) for name in mixture.KNOWN}
        for column in ("time", "ratio")
    )
    return Result(
        "mixture, exact score / circulating: autocorrelation time; proxy",
        " / ".join(f"{value:.2f}" for value in times.values())
        + "; "
        + " / ".join(f"{value:.3f}" for value in proxies.values()),
        "criterion: the faster field has the smaller proxy",
        (times[mixture.CIRCULATING] < times[mixture.EXACT]) == (proxies[mixture.CIRCULATING] < proxies[mixture.EXACT]),
    )


def of_images(run: Run) -> list[Result]:
    """Lines about images: distances, and FID where it is computed, by number of steps."""
    config = run.config
    columns = [("distance", ".3f", "–"), *([("fid", ".2f", "Fig. 6")] if config.fid else [])]
    lines = [
        Result(
            f"images, {name}: {column if column == 'distance' else 'FID'} in {', '.join(map(str, config.steps))} steps",
            ", ".join(f"{distance(run, name, k, column):{digits}}" for k in config.steps),
            paper,
        )
        for column, digits, paper in columns
        for name in OBJECTIVES
    ]
    fewest = min(config.steps)
    found = {name: distance(run, name, fewest) for name in OBJECTIVES}
    return [*lines, rising(f"images: distance in {fewest} steps", found, ".3f", " (Fig. 6)")]


def distance(run: Run, name: str, num_steps: int, column: str = "distance") -> float:
    """Distance of the images that a field makes in that number of steps; the FID with column "fid"."""
    key = (name, num_steps)
    return float(next(row[column] for row in run.rows("pictures") if (row["field"], row["steps"]) == key))


def rising(quantity: str, values: dict[str, float], digits: str, source: str) -> Result:
    """A line that holds if fast flux is below flux, and flux below score matching."""
    fast, flux, dsm = (values[objective] for objective in OBJECTIVES)
    shown = " / ".join(f"{value:{digits}}" for value in (fast, flux, dsm))
    return Result(f"{quantity}, fast flux / flux / DSM", shown, f"criterion: rising{source}", fast < flux < dsm)
