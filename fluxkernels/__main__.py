"""`python -m fluxkernels`: version, devices and backends of this machine, and the backend that runs."""

import platform
import warnings

import torch

import fluxkernels
from fluxkernels import cpu


def main() -> None:
    print(f"fluxkernels {fluxkernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    device = f"CUDA: {', '.join(names)}" if names else "no CUDA device"
    print(f"{torch.get_num_threads()} CPU threads, {device}\n")
    for backend in fluxkernels.backends().values():
        takes = " and ".join(backend.devices) or "any"
        state = "available" if backend.available else f"missing: {backend.missing}"
        print(f"  {backend.name:<8}{backend.what:<40}{takes + ' tensors':<14}{state}")
        for reason in backend.refused:
            print(f"  {'':<8}but not on {reason}")
    if cpu.missing() is None:
        print(f"\ncpu kernels: {cpu.describe()}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("cpu", "cuda"):
            try:
                chosen = fluxkernels.resolve_backend(None, kind)
            except (ValueError, fluxkernels.BackendError) as error:  # the environment names a backend that cannot run
                chosen = f"none, {error}"
            print(f"\n{kind} tensors run on: {chosen}", end="")
    print()


if __name__ == "__main__":
    main()
