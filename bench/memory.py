"""Peak memory of one call beyond its inputs, measured in a process of its own.

python -m bench.memory OP CASE WHO     prints it in bytes
"""

import subprocess
import sys
from pathlib import Path

from bench import peers
from bench.cases import CASES, Case


def peak_extra(op: str, case: Case, who: str) -> int:
    """Bytes that `who` takes for `op` on `case`: results, and everything it needs on the way to them."""
    command = [sys.executable, "-m", "bench.memory", op, case.name, who]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    return int(run.stdout.split()[-1])


def resident(key: str) -> int:
    """Bytes that /proc says: VmRSS is resident now, VmHWM its peak.

    The peak of `getrusage` would not do: a process starts with that of the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def _measure(op: str, case: Case, who: str) -> int:
    x = case.inputs().to(peers.dtype(op, who))
    function = peers.function(op, who)
    function(x[:1, :8], x[:1, :8], case.sigma2)
    # The peak so far may be above what is resident now: the difference is counted in, never out.
    before = resident("VmRSS")
    function(x, x, case.sigma2)
    return resident("VmHWM") - before


if __name__ == "__main__":
    op, name, who = sys.argv[1:]
    print(_measure(op, next(case for case in CASES[op] if case.name == name), who))
