"""Random calls of the cpu backend's kernels, compared as `tests/support/fuzzing.py` describes.

    python -m tests.programs.fuzz --seconds 60 --seed 0

The output has the share of the entries that could be compared.
"""

import argparse
from typing import Any

from tests.support.fuzzing import run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone")
    options = parser.parse_args()
    cases: Any = [options.case] if options.case is not None else iter(range(1 << 62))
    report = run(options.seed, cases, seconds=options.seconds)
    print("\n".join(report.failures[:40]))
    print(
        f"{report.problems} problems, {report.calls} calls, {report.entries} entries, "
        f"{report.compared / max(1, report.entries):.0%} compared; worst error {report.worst:.2g} "
        f"roundings ({report.worst_of}); {len(report.failures)} failures"
    )
    raise SystemExit(bool(report.failures))


if __name__ == "__main__":
    main()
