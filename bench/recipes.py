"""The recipes beside dense implementations at their authors' shapes, and averages over more than fits.

python -m bench.recipes [--device cuda]    prints a table, and puts it into bench/results
python -m bench.recipes --streamed         10⁷ reference points from a file, piece by piece: time and memory
python -m bench.recipes --sharded          reference points of two processes: time, and bytes that travel
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

import fluxkernels as fk
from bench.records import duration
from bench.timing import in_turns, medians, resident_growth, run_module, timed
from bench.training.results import begin, device_argument
from fluxmatching.recipes import (
    drifting_field,
    flow_matching_target,
    kernel_stein_discrepancy,
    mean_shift,
    stable_target_field,
    svgd_step,
)
from tests.support import published

REPETITIONS = 5
BOUND = 1e-5  # of the relative error of ours
STREAMED_POINTS, STREAMED_DIMENSIONS, PIECE = 10_000_000, 16, 500_000
QUERIES, SHARDED_POINTS, SHARDED_DIMENSIONS = 256, 400_000, 64


@dataclass(frozen=True)
class Row:
    """A recipe and a dense implementation on the same tensors, of which the first is `[..., N, D]`."""

    name: str
    shapes: str
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    dense: Callable[..., Tensor]

    def on(self, device: torch.device) -> Row:
        return replace(self, inputs=tuple(t.to(device) for t in self.inputs))

    def error(self, function: Callable[..., Tensor]) -> float:
        """Relative error against the dense formula in float64, on the first groups."""
        few = [t[:4] if t.ndim > 2 else t for t in self.inputs]
        truth = self.dense(*(t.double() for t in few))
        return float((function(*few).double() - truth).norm() / truth.norm())


def dense_svgd(x: Tensor, score: Tensor, variance: float) -> Tensor:
    k = (-torch.cdist(x, x).square() / (2 * variance)).exp()
    return (k @ score + (k.sum(-1, keepdim=True) * x - k @ x) / variance) / x.shape[-2]


def dense_stein(x: Tensor, score: Tensor, variance: float) -> Tensor:
    N, D = x.shape
    squares, products = torch.cdist(x, x).square(), score @ x.T
    along = products.diagonal()
    between = along[:, None] - products - products.T + along[None]
    pairs = (-squares / (2 * variance)).exp() * (score @ score.T + (between + D - squares / variance) / variance)
    return (pairs.sum() - pairs.diagonal().sum()) / (N * (N - 1))


def dense_mean(x: Tensor, refs: Tensor, variance: Tensor | float) -> Tensor:
    return (-torch.cdist(x, refs).square() / (2 * variance)).softmax(-1) @ refs


def drifting(groups: int, count: int, D: int) -> Row:
    x = torch.randn(groups, count, D)
    bandwidth = math.sqrt(2 * D) / 10
    return Row(
        "drifting field",
        f"{groups} × {count}, D = {D}",
        (x, torch.randn(groups, count, D) + 0.3),
        lambda x, positives: drifting_field(x, positives, None, (bandwidth,)),
        lambda x, positives: published.drifting_field(x, positives, None, bandwidth),
    )


def rows() -> list[Row]:
    particles, samples, pixels = torch.randn(1000, 55), torch.randn(4096, 10), torch.rand(10_000, 5)
    images, level = torch.randn(4096, 3072), torch.full((128,), 30.0)
    t = torch.linspace(0.1, 0.9, 128)
    return [
        drifting(64, 64, 256),
        drifting(512, 64, 64),
        drifting(1, 2048, 2),
        drifting(1, 4096, 768),
        Row(
            "SVGD step",
            "1000, D = 55",
            (particles, -particles),
            lambda x, s: svgd_step(x, s, 7.0),
            lambda x, s: dense_svgd(x, s, 49.0),
        ),
        Row(
            "kernel Stein discrepancy",
            "4096, D = 10",
            (samples, -1.2 * samples),
            lambda x, s: kernel_stein_discrepancy(x, s, 3.0),
            lambda x, s: dense_stein(x, s, 9.0),
        ),
        Row(
            "mean shift, one step",
            "10000, D = 5",
            (pixels, pixels),
            lambda x, refs: mean_shift(x, refs, 0.2, max_steps=1)[0],
            lambda x, refs: dense_mean(x, refs, 0.04),
        ),
        Row(
            "stable target field",
            "128 of 4096, D = 3072",
            (images[:128] + 30 * torch.randn(128, 3072), images, level),
            lambda z, refs, sigma: stable_target_field(z, sigma, refs),
            lambda z, refs, sigma: dense_mean(z, refs, sigma[0].square()),
        ),
        Row(
            "flow matching target",
            "128 of 4096, D = 3072",
            (t[:, None] * images[:128] + (1 - t[:, None]) * torch.randn(128, 3072), images, t),
            lambda x, data, t: flow_matching_target(x, t, data),
            lambda x, data, t: (
                (dense_mean(x / t[:, None], data, ((1 - t) / t).square()[:, None]) - x) / (1 - t)[:, None]
            ),
        ),
    ]


HEAD = "| recipe | shape | ours | dense | dense / ours | error, ours | error, dense |\n" + 7 * "|---" + "|"


def measured(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the times and errors of each recipe; one that fails has its error's text instead."""
    torch.manual_seed(0)
    for row in rows():
        found: dict[str, Any] = {"name": row.name, "shapes": row.shapes}
        try:
            on_device = row.on(device)
            calls = [lambda row=on_device: row.ours(*row.inputs), lambda row=on_device: row.dense(*row.inputs)]
            found["ours"], found["dense"] = medians(calls, REPETITIONS)
            found["error"], found["dense_error"] = on_device.error(row.ours), on_device.error(row.dense)
        except Exception as error:  # out of memory, a lost card: the other rows stay
            found["failed"] = f"{type(error).__name__}: {error}"[:500]
        yield found


def problem(found: dict[str, Any]) -> str | None:
    """Why a row has no time of ours, or None."""
    if "failed" in found:
        return f"{found['name']}, {found['shapes']}: {found['failed']}"
    if not found["error"] < BOUND:  # NaN is above every bound
        return f"{found['name']}, {found['shapes']}: error {found['error']:.1e}, bound {BOUND:.0e}"
    return None


def line(found: dict[str, Any]) -> str:
    head = f"| {found['name']} | {found['shapes']} |"
    if problem(found):
        return f"{head} {found.get('failed', 'wrong').split(':')[0]} | – | – | – | – |"
    ours, dense = found["ours"], found["dense"]
    errors = f"{found['error']:.1e} | {found['dense_error']:.1e}"
    return f"{head} {duration(ours)} | {duration(dense)} | {dense / ours:.2f} | {errors} |"


def compare(device: torch.device) -> None:
    """Print and keep a table; a recipe that fails or is wrong ends the program, and the last table is kept."""
    with begin("recipes", device) as write:
        write("Dense: cdist, softmax and products in float32. Errors against the dense formula in float64.\n")
        write(HEAD)
        problems = []
        for found in measured(device):
            write(line(found))
            problems.append(problem(found))
        if any(problems):
            sys.exit("failed:\n" + "\n".join(filter(None, problems)))
        for option in ("--streamed", "--sharded") if device.type == "cpu" else ():
            write("\n" + run_module("bench.recipes", option).stdout.strip().splitlines()[-1])


def streamed() -> None:
    """Average over reference points in a file that is read piece by piece."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "points"
        generator = np.random.default_rng(0)
        # Not mapped into memory, which would count as memory of this process.
        with file.open("wb") as points:
            for _ in range(0, STREAMED_POINTS, PIECE):
                points.write(generator.standard_normal((PIECE, STREAMED_DIMENSIONS), dtype=np.float32).tobytes())
        x = torch.randn(QUERIES, STREAMED_DIMENSIONS, generator=torch.Generator().manual_seed(0))

        def average() -> tuple[Tensor, Tensor]:
            whole: list[tuple[Tensor, Tensor]] = []
            for start in range(0, STREAMED_POINTS, PIECE):
                piece = np.fromfile(
                    file, np.float32, PIECE * STREAMED_DIMENSIONS, offset=4 * STREAMED_DIMENSIONS * start
                )
                refs = torch.from_numpy(piece).view(PIECE, STREAMED_DIMENSIONS)
                whole = [fk.merge_averages([*whole, fk.kernel_average(x, refs, 1.6)])]
            return whole[0]

        seconds = 0.0

        def call() -> None:
            nonlocal seconds
            seconds = timed(average)[1]

        memory = resident_growth(call)
        size = 4 * STREAMED_POINTS * STREAMED_DIMENSIONS
        print(
            f"{STREAMED_POINTS} reference points in {STREAMED_DIMENSIONS} dimensions, {size >> 20} MiB in a file, for "
            f"{QUERIES} queries in pieces of {PIECE}: {duration(seconds)}, {memory / 2**20:.0f} MiB of memory."
        )


def sharded() -> None:
    """Time of `sharded_kernel_average` in one and two processes, one thread each."""
    times = {}
    for processes in (1, 2):
        arguments = ["--standalone", "--nproc-per-node", processes, "-m", "bench.recipes", "--rank"]
        times[processes] = float(run_module("torch.distributed.run", *arguments).stdout.split()[-1])
    sent = 4 * QUERIES * (1 + SHARDED_DIMENSIONS + 1)
    print(
        f"{SHARDED_POINTS} reference points in {SHARDED_DIMENSIONS} dimensions for {QUERIES} queries, one thread per "
        f"process: {duration(times[1])} in one, {duration(times[2])} in two, which exchange {sent >> 10} KiB; the "
        f"points of each are {2 * SHARDED_POINTS * SHARDED_DIMENSIONS >> 20} MiB."
    )


def rank() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    own = SHARDED_POINTS // dist.get_world_size()
    refs = torch.randn(own, SHARDED_DIMENSIONS, generator=torch.Generator().manual_seed(dist.get_rank()))
    x = torch.randn(QUERIES, SHARDED_DIMENSIONS, generator=torch.Generator().manual_seed(9))
    (seconds,) = in_turns([lambda: fk.sharded_kernel_average(x, refs, 6.4)], REPETITIONS)
    if dist.get_rank() == 0:
        print(sorted(seconds)[len(seconds) // 2], flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.recipes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="of the recipes; the two below run on the CPU")
    for option, call in (("--streamed", streamed), ("--sharded", sharded), ("--rank", rank)):
        shown = call.__doc__ or argparse.SUPPRESS  # a process of --sharded is started by it alone
        parser.add_argument(option, dest="call", action="store_const", const=call, help=shown)
    options = parser.parse_args()
    if options.call is None:
        compare(device_argument(parser, options.device))
    else:
        options.call()


if __name__ == "__main__":
    main()
