"""Writes into the JSON of a run what its report needs to know of the machine."""

from typing import Any

from bench import limits


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["fluxkernels"] = limits.machine()
