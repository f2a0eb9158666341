"""Best rates of a GPU, measured: exponentials, multiply-adds, matrix products, memory."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from bench.tasks import KERNEL_AVERAGE, PASS, Task
from bench.timing import fastest_on_gpu
from bench.workloads import Workload
from tests.support.ops import NUM_STEPS

ROUNDS = 512
DIGIT_PRODUCTS = 13  # of a product of points in many dimensions


@triton.jit
def exponentials_kernel(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.arange(0, BLOCK).to(tl.float32) * -1e-3
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


@triton.jit
def multiply_adds_kernel(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.arange(0, BLOCK).to(tl.float32) * 1e-3
    a = x
    b = x + 1
    c = x + 2
    d = x + 3
    for _ in range(ROUNDS):
        a = a * 0.999 + 0.5
        b = b * 0.999 + 0.5
        c = c * 0.999 + 0.5
        d = d * 0.999 + 0.5
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), a + b + c + d)


def measure() -> dict[str, float]:
    """Best rates per second.

    `exponentials` and `multiply_adds` in float32, `product`, `product64` and `product_int8` for multiply-adds of a
    matrix product in float32, float64 and 8-bit integers, `bytes` read and written.
    """
    programs, block = 32 * torch.cuda.get_device_properties(0).multi_processor_count, 1024
    out = torch.empty(programs * block, device="cuda")

    def per_second(work: float, call: Callable[[], object]) -> float:
        return work / fastest_on_gpu(call)

    found = {
        "exponentials": per_second(
            ROUNDS * out.numel(), lambda: exponentials_kernel[(programs,)](out, ROUNDS=ROUNDS, BLOCK=block)
        ),
        "multiply_adds": per_second(
            4 * ROUNDS * out.numel(),
            lambda: multiply_adds_kernel[(programs,)](out, ROUNDS=ROUNDS, BLOCK=block, enable_fp_fusion=True),
        ),
    }
    n = 4096
    for name, dtype in (("product", torch.float32), ("product64", torch.float64)):
        a = torch.randn(n, n, device="cuda", dtype=dtype)
        found[name] = per_second(n**3, lambda a=a: a @ a)  # type: ignore[misc]
    digits = torch.ones(n, n, device="cuda", dtype=torch.int8)
    found["product_int8"] = per_second(n**3, lambda: torch._int_mm(digits, digits.mT))
    big = torch.randn(2**28, device="cuda")  # 1 GiB, far above any cache
    target = torch.empty_like(big)
    found["bytes"] = per_second(2 * big.numel() * big.element_size(), lambda: target.copy_(big))
    return found


def pairs(task: Task, workload: Workload) -> int:
    """Pairs of a query and a reference point that are evaluated; the pass has one evaluation for its transition too."""
    return (NUM_STEPS + 2 if task == PASS else 1) * workload.pairs


def model_seconds(rates: dict[str, float], task: Task, workload: Workload) -> float:
    """Least time of a task: exponentials and multiply-adds at these rates, or bytes if they take longer.

    The values of a pass's transition have D coordinates too, those of a kernel average two. Above 16 dimensions the
    multiply-adds are those of thirteen products of 8-bit digits for each product of points: a score has two, the pass
    the stacked product and three rebuilt points, and the transition's two.
    """
    D, queries, refs = workload.dimensions, workload.queries, workload.refs
    columns = 2 if task == KERNEL_AVERAGE else D
    if D <= 16:
        per_pair = 1 / rates["exponentials"] + (D + columns) / rates["multiply_adds"]
        arithmetic = pairs(task, workload) * per_pair
    else:
        products = (1 + NUM_STEPS) + refs / queries + 3 + 2 if task == PASS else 1 + columns / D
        arithmetic = products * workload.pairs * D / (rates["product_int8"] / DIGIT_PRODUCTS)
    # Queries and reference points read once, results written once: one array for the score, five for the pass.
    numbers = workload.groups * D * (queries * (6 if task == PASS else 2) + refs)
    return max(arithmetic, 4 * numbers / rates["bytes"])
