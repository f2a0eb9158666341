"""Count the instructions per pair in the hot loops of streaming kernels; print one JSON line per loop and GPU.

    python -m tests.programs.budgets [PART PARTS]     every PARTS-th compilation, from PART on

It needs a process without TRITON_INTERPRET, which prevents compilation.
"""

import json
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from fluxkernels.triton_kernels import launch
from fluxkernels.triton_kernels.streaming import host as streaming
from tests.support.census import Launch, MachineCode, classes, in_float64, recorded

CAPABILITIES = (80, 89, 90, 100, 120)
# Groups, and queries and reference points of each.
GROUPS, POINTS = 2000, 256
Layout = tuple[int, int]


def launches(D: int, layout: Layout) -> list[Launch]:
    """Launches of the ops whose kernels have budgets: without derivatives in 16 dimensions."""
    with mock.patch.object(launch, "layouts", return_value=(layout,)), recorded() as found:
        x, per_query, per_group = torch.empty(GROUPS, POINTS, D), torch.empty(GROUPS, POINTS), torch.empty(GROUPS)
        seed = torch.empty((), dtype=torch.int64)
        ops: list[Callable[[], object]] = [
            lambda: streaming.kde(x, x, per_query),
            lambda: streaming.flux_pass(x, x, per_group, per_group, 4, None, seed),
            lambda: streaming.transition_average(x, x, x, x, per_group, per_group),
            lambda: streaming.transition_weights(x, x, x, per_group, per_group),
            lambda: streaming.residual_gradient(x, x, x, per_query),
            lambda: streaming.kde_backward(x, x, per_query, x, x, per_query),
        ]
        for op in ops if D == 2 else ops[:3]:
            op()
    return found


def cases() -> Iterator[tuple[Layout, Launch, int]]:
    """Yield (layout, launch, compute capability) of each compilation."""
    for D, layouts in ((2, launch.LAYOUTS[:2]), (16, launch.LAYOUTS[:1])):
        for layout in layouts:
            for each in launches(D, layout):
                if each.arguments["COLUMNS"] == layout[0]:  # not a kernel that takes fewer queries
                    for capability in CAPABILITIES:
                        yield layout, each, capability


def rows(layout: Layout, each: Launch, capability: int) -> Iterator[dict[str, object]]:
    """Yield the counts of each loop over whole tiles, which are those with vector loads."""
    code = MachineCode(each.compiled(capability))
    of_tiles = [loop for loop in code.loops if any(".128" in text for text in loop if "LDG" in text)]
    columns, lanes = layout
    threads = 32 * launch.warps(layout)
    rows = each.arguments["ROWS"]
    pairs = rows * (columns * lanes // threads)
    for index, loop in enumerate(of_tiles):
        counts = classes(loop)
        yield {
            "kernel": each.kernel.__name__,
            "D": each.arguments["D"],
            "layout": layout,
            "capability": capability,
            "loop": index,
            "pairs": pairs,
            "exponentials": counts["MUFU"],
            "per_pair": round(len(loop) / pairs, 2),
            "exchanges": sum(counts[name] for name in ("SHFL", "BAR", "STS", "LDS")),
            "spills": sum(counts[name] for name in ("STL", "LDL")),
            "float64": sum(map(in_float64, code.instructions)),
        }


def main() -> None:
    part, parts = map(int, sys.argv[1:] or (0, 1))
    for case in list(cases())[part::parts]:
        for row in rows(*case):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
