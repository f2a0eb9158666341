"""Peak memory of one call beyond its inputs, measured in a process of its own.

python -m bench.memory OP CASE WHO DTYPE     prints it in bytes
"""

import resource
import subprocess
import sys
from pathlib import Path

import torch

from bench import peers
from bench.cases import FAMILIES, SCALING, Case

CASES = {case.name: case for case in (*FAMILIES, *(case for cases in SCALING.values() for case in cases))}
# What a process may take: a laptop's memory, less what else runs there.
LIMIT = 12 * 2**30
_OUT_OF_MEMORY = 3


class OutOfMemoryError(Exception):
    """A call asked for more than LIMIT."""


def peak_extra(op: str, case: Case, who: str, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that `who` takes for `op` on `case`: results, and everything it needs on the way to them.

    Raises:
        OutOfMemoryError: more than LIMIT.
        subprocess.CalledProcessError: it failed for another reason.
    """
    command = [sys.executable, "-m", "bench.memory", op, case.name, who, peers.name_of(dtype)]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if run.returncode == _OUT_OF_MEMORY:
        raise OutOfMemoryError(f"{who} takes more than {LIMIT / 2**30:.0f} GiB")
    run.check_returncode()
    return int(run.stdout.split()[-1])


def resident(key: str) -> int:
    """Bytes that /proc says: VmRSS is resident now, VmHWM its peak.

    The peak of `getrusage` would not do: a process starts with that of the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def _measure(op: str, case: Case, who: str, dtype: torch.dtype) -> int:
    x, refs = (points.to(dtype) for points in case.inputs())
    function = peers.function(op, who)
    function(x[:1, :8], refs[:1, :8], case.sigma2)
    # The peak so far may be above what is resident now: the difference is counted in, never out.
    before = resident("VmRSS")
    function(x, refs, case.sigma2)
    return resident("VmHWM") - before


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    op, name, who, precision = sys.argv[1:]
    try:
        print(_measure(op, CASES[name], who, getattr(torch, precision)))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        sys.exit(_OUT_OF_MEMORY)
