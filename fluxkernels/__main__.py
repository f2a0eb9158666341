"""`python -m fluxkernels`: versions, backends, known faults and a self-check; exit status 1 if a check fails."""

import argparse
import itertools
import json
import sys

from fluxkernels.doctor import Card, Report, examine
from fluxkernels.selfcheck import Check


def _heading(report: Report) -> list[str]:
    versions = report.versions
    names = ("fluxkernels", "torch", "Python", "NumPy", "Triton")
    first = ", ".join(f"{name} {versions[name] or 'not installed'}" for name in names)
    device = f"CUDA {versions['CUDA']}" if report.cards else "no CUDA device"
    return [
        first,
        f"{versions['platform']}, {report.threads} CPU threads, {device}",
        *(f"cuda:{index}: {_card(card)}" for index, card in enumerate(report.cards)),
        f"C++ compiler: {versions['compiler'] or 'not found'}",
    ]


def _card(card: Card) -> str:
    capability = ".".join(map(str, card.capability))
    return f"{card.name}, compute capability {capability}, {card.memory / 2**30:.0f} GiB"


def _backends(report: Report) -> list[str]:
    lines = ["", "Backends"]
    for row in report.backends:
        takes = f"{' and '.join(row.devices) or 'any'} tensors"
        state = "available" if row.available else f"missing: {row.missing}"
        lines.append(f"  {row.name:<8}{row.what:<40}{takes:<13} {state}")
        lines += [f"  {'':<8}but not on {reason}" for reason in row.refused]
    if report.instruction_set:
        lines.append(f"  cpu kernels: {report.instruction_set}")
    return lines + [f"  {kind} tensors run on: {chosen}" for kind, chosen in report.runs_on.items()]


def _group(name: str, checks: list[Check]) -> list[str]:
    """One line for the checks of a backend on a device in one dtype, and one per failure."""
    ran = [check for check in checks if not check.skipped]
    failed = [check for check in ran if not check.passed]
    seconds, bound = sum(check.seconds for check in checks), checks[0].bound
    worst = max((check.error for check in ran if check.error is not None), default=float("nan"))
    state = "FAILED" if failed else "OK"
    line = f"  {name:<28}{len(ran)} calls, largest error {worst:.0e}, bound {bound:.0e}   {state}   {seconds:.1f} s"
    if len(ran) < len(checks):
        line += f", {len(checks) - len(ran)} calls left out for lack of time"
    return [
        line,
        *(
            f"    {check.op}, {check.dimensions} dimensions: {check.problem or f'error {check.error:.1e}'}"
            for check in failed
        ),
    ]


def _checks(report: Report) -> list[str]:
    if report.checks is None:
        return []
    lines = ["", "Self-check: relative errors against float64 on the CPU"]
    for name, group in itertools.groupby(report.checks, lambda check: f"{check.backend} {check.device} {check.dtype}"):
        lines += _group(name, list(group))
    return lines


def _rest(report: Report) -> list[str]:
    notes = ["", "Notes", *(f"  {note}" for note in report.notes)] if report.notes else []
    variables = [f"  {name}={value}" for name, value in report.environment.items()] or ["  none is set"]
    caches = [f"  {folder}  ({what})" for what, folder in report.caches.items()]
    return [*notes, "", "Environment variables of this project", *variables, "", "Caches", *caches]


def as_text(report: Report) -> str:
    return "\n".join([*_heading(report), *_backends(report), *_checks(report), *_rest(report)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fluxkernels", description="Examine this installation.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-check", action="store_true", help="leave the self-check out, which takes some seconds")
    options = parser.parse_args(arguments)
    report = examine(check=not options.no_check)
    print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if options.json else as_text(report))
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
