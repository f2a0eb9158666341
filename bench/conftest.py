"""The origin of a run, written into its JSON for the report."""

from typing import Any

from bench.origin import Origin


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["origin"] = Origin.here().fields()
