"""Run a module or file as one process of torchrun, and leave without taking the group of processes down.

torchrun --standalone --nproc-per-node 2 -m tests.programs.process (MODULE | FILE) [ARGUMENT ...]

A thread of gloo that releases the tensors of the last collective needs Python's lock, which the main thread holds while
it waits for that thread to end (PyTorch 2.13): now and then a program hangs or aborts after all of its work.
"""

import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from torch import distributed


def keep(*_: Any) -> None:
    """Keep the group, in place of destroy_process_group."""


def main() -> None:
    distributed.destroy_process_group = keep
    del sys.argv[0]
    code = 0
    try:
        if sys.argv[0].endswith(".py"):
            sys.path.insert(0, str(Path(sys.argv[0]).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
