"""What a GPU could do at best, measured: exponentials, multiply-adds, matrix products, memory."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from bench.cases import STEPS

ROUNDS = 512


@triton.jit
def exponentials_kernel(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32) * -1e-3
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


@triton.jit
def multiply_adds_kernel(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
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


def measure(timed: Callable[[Callable[[], object]], list[float]]) -> dict[str, float]:
    """Best rates: `exponentials` and `multiply_adds` a second in float32, `product` and `product64` multiply-adds a
    second of a matrix product in float32 and float64, `bytes` a second, read and written."""
    programs, block = 32 * torch.cuda.get_device_properties(0).multi_processor_count, 1024
    out = torch.empty(programs * block, device="cuda")

    def per_second(work: float, call: Callable[[], object]) -> float:
        return work / min(timed(call))

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
    big = torch.randn(2**28, device="cuda")  # 1 GiB, far above any cache
    target = torch.empty_like(big)
    found["bytes"] = per_second(2 * big.numel() * big.element_size(), lambda: target.copy_(big))
    return found


def pairs(kind: str, groups: int, queries: int, centres: int) -> int:
    """Pairs of a query and a centre that a case evaluates; the pass has one evaluation for its transition too."""
    return (STEPS + 2 if kind == "pass" else 1) * groups * queries * centres


def model_seconds(
    rates: dict[str, float], kind: str, groups: int, queries: int, centres: int, dimensions: int
) -> float:
    """Least time of a case: its exponentials and multiply-adds at the rates above, or its bytes if they take longer.

    `kind` is "pass" (with the transition, whose values have D coordinates too) or "score". Above 16 dimensions the
    multiply-adds are those of float64 products: a score has two, the pass the stacked product and three rebuilt points,
    and the transition's two.
    """
    if dimensions <= 16:
        arithmetic = pairs(kind, groups, queries, centres) * (
            1 / rates["exponentials"] + 2 * dimensions / rates["multiply_adds"]
        )
    else:
        products = 2.0
        if kind == "pass":
            products = (1 + STEPS) + centres / queries + 3 + 2
        arithmetic = products * groups * queries * centres * dimensions / rates["product64"]
    # Queries and centres read once, results written once: one array for the score, five for the pass.
    numbers = groups * dimensions * (queries * (6 if kind == "pass" else 2) + centres)
    return max(arithmetic, 4 * numbers / rates["bytes"])
