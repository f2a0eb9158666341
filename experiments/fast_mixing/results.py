"""Lines of the summary, read from the logged rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from experiments.common.objectives import DSM, FLUX, OBJECTIVES
from experiments.common.results import Result, spread
from experiments.common.run import Run
from experiments.common.timing import step_results
from experiments.fast_mixing import mixture
from experiments.fast_mixing.problem import CIRCULATING, EXACT, KNOWN
from experiments.fast_mixing.steps import FIXED_ON_MIXTURE, TUNED


def results(run: Run) -> list[Result]:
    """Return all lines of the summary."""
    lines = [*few_steps(run), *proxies(run), *by_steps(run), *chains(run)]
    return [*lines, *of_images(run), *step_results(run, DSM)] if run.config.with_images else lines


def weights(run: Run) -> tuple[float, ...]:
    """Return the weights of the proxy with which fields of the mixture are trained."""
    found: tuple[float, ...] = run.config.mixture_mixing_weights if run.config.with_training else ()
    return found


def few_steps(run: Run) -> list[Result]:
    """Lines about the order of Fig. 6 on the mixture, with the paper's and with tuned steps."""
    lines = []
    for procedure in (*FIXED_ON_MIXTURE, TUNED):
        for k in run.config.tuned_steps:
            key = {"procedure": procedure, "steps": k}
            values = {
                name: statistics.mean(run.by_seed("steps", "distance", field=name, **key))
                for name in mixture.fields(run.config)
            }
            for weight in weights(run):
                fast = mixture.fast(weight)
                order = {fast: values[fast], FLUX: values[FLUX], DSM: values[DSM]}
                lines.append(rising(f"mixture, {procedure}, {k} steps: distance", order, ".3f", " (Fig. 6)"))
            others = [name for name in KNOWN if name != EXACT]
            best = min(others, key=values.__getitem__)
            lines.append(
                Result(
                    f"mixture, {procedure}, {k} steps: exact score / best of {', '.join(others)}",
                    f"{values[EXACT]:.3f} / {values[best]:.3f} ({best})",
                )
            )
    floor = spread(run.by_seed("mixture floor", "distance"))
    return [*lines, Result("mixture: distance of exact samples", floor)]


def proxies(run: Run) -> list[Result]:
    """Lines about both proxies at every noise level: that of the exact score, and the changes from it."""
    lines = []
    names = {"ours": "proxy of Eq. 44", "published": "published proxy"}
    sigmas = sorted({row["sigma"] for row in run.rows("proxy")})
    for column, title in names.items():
        for sigma in sigmas:
            base = run.by_seed("proxy", column, field=EXACT, sigma=sigma)
            for name in mixture.fields(run.config):
                found = run.by_seed("proxy", column, field=name, sigma=sigma)
                change = [value - start for value, start in zip(found, base, strict=True)]
                text = spread(base) if name == EXACT else f"{spread(change, '+.4f')} from the exact score"
                lines.append(Result(f"mixture, σ = {sigma:g}, {name}: {title}", text))
    return [*lines, *(proxy_order(run, column, title) for column, title in names.items())]


def proxy_order(run: Run, column: str, title: str) -> Result:
    """Return a line that holds if the proxy orders two known fields as their autocorrelation times do."""
    level = run.config.mixture_sigma
    pair = (EXACT, CIRCULATING)
    times = {name: statistics.mean(run.by_seed("mixture", "time", field=name)) for name in pair}
    found = {name: statistics.mean(run.by_seed("proxy", column, field=name, sigma=level)) for name in pair}
    return Result(
        f"mixture, {EXACT} / {CIRCULATING}: autocorrelation time; {title}",
        " / ".join(f"{value:.2f}" for value in times.values())
        + "; "
        + " / ".join(f"{value:.4f}" for value in found.values()),
        "criterion: the faster field has the smaller proxy",
        (times[CIRCULATING] < times[EXACT]) == (found[CIRCULATING] < found[EXACT]),
    )


def by_steps(run: Run) -> list[Result]:
    """Lines with the distances of every field by number of steps and procedure, and the steps that tuning chose."""
    config, lines = run.config, []
    for procedure in (*FIXED_ON_MIXTURE, TUNED):
        counts = config.tuned_steps if procedure == TUNED else config.mixture_steps
        for name in mixture.fields(config):
            rows = {k: {"field": name, "procedure": procedure, "steps": k} for k in counts}
            text = ", ".join(spread(run.by_seed("steps", "distance", **rows[k])) for k in counts)
            if procedure == TUNED:
                text += "; ratio, scale, spacing: " + ", ".join(
                    "/".join(f"{run.by_seed('steps', part, **rows[k])[0]:g}" for part in ("ratio", "scale", "spacing"))
                    for k in counts
                )
            lines.append(Result(f"mixture, {name}, {procedure}: distance in {', '.join(map(str, counts))} steps", text))
    return lines


def chains(run: Run) -> list[Result]:
    """Lines about Langevin chains: how fast every field mixes, and whether it preserves p_σ."""
    times = {name: run.by_seed("mixture", "time", field=name) for name in mixture.fields(run.config)}
    lines = [
        Result(
            f"mixture, {name}: autocorrelation time (σ²) / W2 of chains to p_σ",
            f"{spread(times[name], '.2f')} / {spread(run.by_seed('mixture', 'bias', field=name))}",
        )
        for name in times
    ]
    for weight in weights(run):
        order = {name: statistics.mean(times[name]) for name in (mixture.fast(weight), FLUX, DSM)}
        lines.append(rising("mixture: autocorrelation times", order, ".2f", ""))
    return lines


def of_images(run: Run) -> list[Result]:
    """Lines about images: distances, and FID where it is computed, by procedure and number of steps."""
    config, lines = run.config, []
    columns = [("distance", ".3f", "–"), *([("fid", ".2f", "Fig. 6")] if config.fid else [])]
    for procedure in config.procedures:
        for column, digits, paper in columns:
            what = column if column == "distance" else "FID"
            for name in OBJECTIVES:
                text = ", ".join(f"{distance(run, name, k, procedure, column):{digits}}" for k in config.steps)
                title = f"images, {name}, {procedure}: {what} in {', '.join(map(str, config.steps))} steps"
                lines.append(Result(title, text, paper))
        fewest = min(config.steps)
        found = {name: distance(run, name, fewest, procedure) for name in OBJECTIVES}
        lines.append(rising(f"images, {procedure}: distance in {fewest} steps", found, ".3f", " (Fig. 6)"))
    return lines


def distance(run: Run, name: str, num_steps: int, procedure: str, column: str = "distance") -> float:
    """Return the distance of a field's images by procedure and number of steps; the FID with column "fid"."""
    key = (name, num_steps, procedure)
    rows = run.rows("pictures")
    return float(next(row[column] for row in rows if (row["field"], row["steps"], row["procedure"]) == key))


def rising(quantity: str, values: Mapping[str, float], digits: str, source: str) -> Result:
    """Return a line that holds if the values rise: fast flux below flux, and flux below score matching."""
    shown = " / ".join(f"{value:{digits}}" for value in values.values())
    fast, flux, dsm = values.values()
    return Result(f"{quantity}, {' / '.join(values)}", shown, f"criterion: rising{source}", fast < flux < dsm)
