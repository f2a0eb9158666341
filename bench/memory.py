"""Peak memory of one call beyond its inputs, measured in a process of its own.

python -m bench.memory TASK WORKLOAD IMPLEMENTATION DTYPE     prints it in bytes
"""

import resource
import subprocess
import sys

import torch

from bench import baselines
from bench.tasks import TASKS, Task
from bench.timing import resident_growth, run_module
from bench.workloads import FAMILIES, SCALING, Workload

WORKLOADS = {workload.name: workload for workload in (*FAMILIES, *(w for row in SCALING.values() for w in row))}
# Memory of a process: that of a laptop, less the share of what else runs there.
LIMIT = 12 * 2**30
_OUT_OF_MEMORY = 3


class OutOfMemoryError(Exception):
    """A call asked for more than LIMIT."""


def peak_extra(task: Task, workload: Workload, implementation: str, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that a task takes: results, and everything that it needs on the way to them.

    Raises:
        OutOfMemoryError: more than LIMIT.
        subprocess.CalledProcessError: it failed for another reason.
    """
    arguments = (task.name, workload.name, implementation, baselines.name_of(dtype))
    run = run_module("bench.memory", *arguments, check=False, stderr=subprocess.PIPE)
    if run.returncode == _OUT_OF_MEMORY:
        raise OutOfMemoryError(f"{implementation} takes more than {LIMIT / 2**30:.0f} GiB")
    run.check_returncode()
    return int(run.stdout.split()[-1])


def _measure(task: Task, workload: Workload, implementation: str, dtype: torch.dtype) -> int:
    x, refs = (points.to(dtype) for points in workload.inputs())
    function = baselines.function(task, implementation)
    function(x[:1, :8], refs[:1, :8], workload.sigma2)
    return resident_growth(lambda: function(x, refs, workload.sigma2))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    task_name, workload_name, implementation, precision = sys.argv[1:]
    try:
        print(_measure(TASKS[task_name], WORKLOADS[workload_name], implementation, getattr(torch, precision)))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        sys.exit(_OUT_OF_MEMORY)
