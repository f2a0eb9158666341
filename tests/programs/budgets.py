"""Count the instructions per pair in the hot loops of streaming kernels; print one JSON line per loop.

    python -m tests.programs.budgets 90 [PART PARTS]     compiled for sm_90; every PARTS-th compilation, from PART on

It needs a process without TRITON_INTERPRET, which prevents compilation.
"""

import json
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from fluxkernels.triton_kernels import launch
from fluxkernels.triton_kernels.streaming import host as streaming
from tests.support.census import Launch, MachineCode, classes, in_float64, opcode, recorded

# Instructions per pair in each loop over tiles, by dimension and kernel.
SWEEP, SECOND_LOOP = 12.5, 20.0
MOVED_SWEEP = 13.0  # past the means of a transition
BUDGETS: dict[int, dict[str, tuple[float, ...]]] = {
    2: {
        "kde_kernel": (SWEEP,),
        "langevin_kernel": (SWEEP,),
        "transition_ends_kernel": (MOVED_SWEEP,),
        "transition_average_kernel": (14.5,),
        "transition_weights_kernel": (MOVED_SWEEP, SECOND_LOOP),
        "residual_kernel": (SWEEP, SECOND_LOOP),
        "kde_backward_queries_kernel": (SWEEP, SECOND_LOOP),
        "kde_backward_refs_kernel": (45.0,),
        "kernel_average_kernel": (SWEEP,),
        "kernel_average_backward_queries_kernel": (SWEEP, SECOND_LOOP),
        "kernel_average_backward_refs_kernel": (22.0,),
    },
    16: {
        "kde_kernel": (64.0,),
        "langevin_kernel": (70.0,),
        "transition_average_kernel": (90.0,),
        "kernel_average_kernel": (64.0,),
    },
}
# Instructions per pair of an average beyond those of a density estimate: with values, weights or exclusion of a query's
# own reference point; with a distance in place of its square.
MOST_MORE, OF_DISTANCE = 2.0, 1.0
# Groups, and queries and reference points of each.
GROUPS, POINTS = 2000, 256
Layout = tuple[int, int]


def launches(D: int, layout: Layout) -> list[Launch]:
    """Launches of all kernels that have a budget."""
    with mock.patch.object(launch, "layouts", return_value=(layout,)), recorded() as found:
        x, per_query, per_group = torch.empty(GROUPS, POINTS, D), torch.empty(GROUPS, POINTS), torch.empty(GROUPS)
        noise, per_ref = torch.empty(4, GROUPS, POINTS, D), torch.empty(GROUPS, 1, POINTS)
        ops: tuple[Callable[[], object], ...] = (
            lambda: streaming.kde(x, x, per_query),
            lambda: streaming.langevin_chain(x, x, per_group, per_group, 4, noise, None),
            lambda: streaming.transition_average(x, x, x, x, per_group, per_group),
            lambda: streaming.transition_weights(x, x, x, per_group, per_group),
            lambda: streaming.residual_gradient(x, x, x, per_query),
            lambda: streaming.kde_backward(x, x, per_query, x, x, per_query),
            lambda: streaming.kernel_average(x, x, per_query, None, None, False, "gaussian"),
            lambda: streaming.kernel_average(x, x, per_query, x, per_query, False, "gaussian"),
            lambda: streaming.kernel_average(x, x, per_query, None, None, True, "gaussian"),
            lambda: streaming.kernel_average(x, x, per_ref, None, None, False, "laplace"),
            lambda: streaming.kernel_average_backward(x, x, per_query, x, x, per_query, None, None, False, "gaussian"),
            lambda: streaming.kernel_average_backward(
                x[..., :0], x, per_query, x, x, per_query, x, per_query, False, "gaussian"
            ),
        )
        for op in ops:
            op()
    return [each for each in found if each.kernel.__name__ in BUDGETS[D]]


def cases(capability: int) -> list[Launch]:
    """Launches that are compiled for GPUs of a compute capability."""
    one_query, two_queries = launch.LAYOUTS[:2]
    paired = launches(2, two_queries) if capability == 90 else []
    return [*launches(2, one_query), *launches(16, one_query), *paired]


def rows(each: Launch, capability: int) -> Iterator[dict[str, object]]:
    """Yield the counts of each loop over tiles, which are the loops with vector loads."""
    code = MachineCode(each.compiled(capability))
    of_tiles = [loop for loop in code.loops if any("LDG" in text and ".128" in text for text in loop)]
    name, D = each.kernel.__name__, each.arguments["D"]
    columns, lanes = each.arguments["COLUMNS"], each.arguments["LANES"]
    pairs = each.arguments["ROWS"] * columns * lanes // (32 * each.options["num_warps"])
    more = 0.0
    if name.startswith("kernel_average"):
        more += MOST_MORE * any(each.arguments[option] for option in ("COUNT", "EXCLUDE", "WEIGHTED"))
        more += OF_DISTANCE * each.arguments["LAPLACE"]
    for budget, loop in zip(BUDGETS[D][name], of_tiles, strict=True):
        counts = classes(loop)
        yield {
            "kernel": name,
            "D": D,
            "layout": (columns, lanes),
            "budget": budget + more,
            "per_pair": round(len(loop) / pairs, 2),
            "pairs": pairs,
            "exponentials": sum(opcode(text).startswith("MUFU.EX2") for text in loop),
            "exchanges": sum(counts[name] for name in ("SHFL", "BAR", "STS", "LDS")),
            "spills": sum(counts[name] for name in ("STL", "LDL")),
            "float64": sum(map(in_float64, code.instructions)),
        }


def main() -> None:
    capability, part, parts = map(int, (*sys.argv[1:], 0, 1)[:3])
    for each in cases(capability)[part::parts]:
        for row in rows(each, capability):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
