"""Environment variables of the project, and where Triton and this library keep files. Importable without Triton."""

import os
from pathlib import Path

# All variables with our prefixes. Tests compare this table with the source tree and with python_api/README.md.
VARIABLES = {
    "FLUXKERNELS_BACKEND": "backend of all ops that name none: torch, cpu or triton; unset: the device decides",
    "FLUXKERNELS_AUTOTUNE": "0: Triton kernels take the layout of a rule of thumb, and no other is tried",
    "FLUXKERNELS_CACHE": "folder of the layouts that were fastest on a card; default ~/.cache/fluxkernels",
    "FLUXKERNELS_CPU": "during installation: 0 leaves the compiled C++ out, require stops if it does not compile",
    "FLUXKERNELS_SANITIZE": "during installation: 1 compiles the C++ with address and undefined-behavior sanitizers",
    "FLUXKERNELS_TESTS": "complete: the tests run every Triton case without a GPU too",
    "FLUXMATCHING_DATA": "folder in which the experiments look for data sets",
    "FLUXMATCHING_EXAMPLES": "folder in which load_example looks for trained fields; unset: those of the package",
}

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs kernels on the CPU, one operation at a time
# "0" takes the layout that a rule of thumb prefers: others are not tried, and results are equal bit for bit on every
# GPU of the same model.
AUTOTUNE = os.environ.get("FLUXKERNELS_AUTOTUNE", "1") != "0"
CACHE = Path(os.environ.get("FLUXKERNELS_CACHE") or os.path.expanduser("~/.cache/fluxkernels"))


def variables_set() -> dict[str, str]:
    """Values of all variables that are set here and begin with our prefixes, known or not."""
    ours = ("FLUXKERNELS_", "FLUXMATCHING_")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(ours)}


def triton_cache() -> Path:
    """Folder of the kernels that Triton has compiled."""
    if folder := os.environ.get("TRITON_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache")
