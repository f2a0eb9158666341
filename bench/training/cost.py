"""Cost of a training step of Flux Matching beside one of score matching: time, peak memory, share of the KDE.

python -m bench.training.cost [--device cuda]     prints a table, and puts it into bench/results

Every step is one of `fluxmatching.Trainer`: minibatch, loss, backward pass, clipping, AdamW, moving average. All
methods take turns, with the same network, minibatches and precision. A compiled step is that of a Trainer with
`torch.compile(loss)`. A step in one CUDA graph has neither clipping nor moving average.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fluxkernels as fk
from bench import records
from bench.origin import Origin
from bench.timing import gpu_peak_memory, median_of_repeated, medians, resident_growth, run_module
from bench.training.problems import MIXTURE, images
from bench.training.results import begin, device_argument
from experiments.common.objectives import PlainAttention
from experiments.springs.simulator import trajectories
from fluxmatching import (
    DenoisingScoreMatching,
    EDMField,
    FluxOptions,
    LogNormalNoise,
    LossNormalizer,
    NoiseAnnealedFluxMatching,
    Trainer,
    TrainingOptions,
    UNet,
    UniformHorizon,
)
from fluxmatching.networks import Perceptron, TrajectoryTransformer


@dataclass(frozen=True)
class Setting:
    """A network and how it is trained.

    Attributes:
        key: one word for the command line.
        precision: as in `TrainingOptions`.
        size: height and width of the images; 1 for trajectories, 0 for points in the plane.
        width: channels of the UNet's first level, width of the transformer or perceptron.
        dropout: probability of dropout in the UNet.
        run: "eager", "compiled" or "graph" for one CUDA graph, all methods in the same way; other ways than the first
            are measured for the plain methods.
        paper: iterations per second in the paper's Table 1, (score matching, Flux Matching).
    """

    key: str
    name: str
    batch: int
    precision: str = "32-true"
    size: int = 1
    width: int = 128
    dropout: float = 0.1
    run: str = "eager"
    paper: tuple[float, float] | None = None

    @property
    def methods(self) -> list[str]:
        return list(METHODS)[: None if self.run == "eager" else 2]

    def data(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if self.size > 1:
            return images(count, generator, self.size)
        if self.size == 1:
            return trajectories(count, generator)
        return MIXTURE.data(count, generator)

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        if self.size > 1:
            return UNet(self.size, 3, width=self.width, dropout=self.dropout, norm_num_groups=min(32, self.width // 4))
        return TrajectoryTransformer(width=self.width) if self.size else Perceptron(2, self.width)

    def step(self, method: str, device: str) -> Callable[[], Any]:
        """Make a function that trains for one step."""
        data = self.data(512)
        loss = METHODS[method](EDMField(self.network(), data.std().item()), self.batch)
        if self.run == "graph":
            return GraphedStep(loss.to(device), data[: self.batch].to(device))
        if self.run == "compiled":
            torch.compiler.reset()
            # On a GPU the compiled pieces are captured in CUDA graphs.
            compiled: Any = torch.compile(loss, mode="reduce-overhead" if torch.device(device).type == "cuda" else None)
            loss = compiled
        options = TrainingOptions(10**9, self.batch, precision=self.precision, accelerator=device, progress=False)
        return Trainer(loss, data.to(device), options).step


class GraphedStep:
    """A training step, from the loss to the optimizer, captured in one CUDA graph and replayed with another seed."""

    def __init__(self, loss: nn.Module, x: Tensor) -> None:
        self.loss, self.x = loss, x
        self.seed = torch.zeros((), dtype=torch.int64, device=x.device)
        self.optimizer = torch.optim.AdamW(loss.parameters(), capturable=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and tuned before the capture, which cannot
            for _ in range(3):
                self._train()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._train()

    def _train(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        value, _ = self.loss(self.x, seed=self.seed)
        value.backward()
        self.optimizer.step()

    def __call__(self) -> None:
        self.seed += 1
        self.graph.replay()


def flux(field: EDMField, **options: Any) -> nn.Module:
    """Flux Matching with the paper's first horizon."""
    return NoiseAnnealedFluxMatching(field, options=FluxOptions(horizon=UniformHorizon(), **options))


def double_backward(field: EDMField) -> nn.Module:
    """The loss as published."""
    return PlainAttention(field, options=FluxOptions(horizon=UniformHorizon(), second_derivatives="double_backward"))


def score_matching(field: EDMField) -> nn.Module:
    return DenoisingScoreMatching(field, LogNormalNoise(), normalizer=LossNormalizer(), sigma_per_sample=False)


# The loss of a field for minibatches of that size.
METHODS: dict[str, Callable[[EDMField, int], nn.Module]] = {
    "score matching": lambda field, _: score_matching(field),
    "flux": lambda field, _: flux(field),
    "flux, in chunks of a quarter": lambda field, batch: flux(field, chunk_size=-(-batch // 4)),
    "flux, half of the ends": lambda field, _: flux(field, endpoint_fraction=0.5),
    "flux, double backward": lambda field, _: double_backward(field),
}
_POINTS, _UNET = "perceptron, 2 dimensions, batch 32", "UNet, 32 × 32, 32 channels, 2.2 M parameters, batch 8"
CPU = [
    Setting("perceptron", _POINTS, 32, size=0),
    Setting("perceptron-compiled", _POINTS + ", torch.compile", 32, size=0, run="compiled"),
    Setting("unet", _UNET, 8, size=32, width=32, dropout=0.0),
    Setting("springs", "springs transformer, 38 M parameters, batch 16", 16, width=512),
]
GPU = [
    Setting("cifar32", "CIFAR-10 UNet, 35.7 M, batch 32, bf16", 32, "bf16-mixed", 32, paper=(11.63, 4.01)),
    Setting("cifar128", "the same, batch 128", 128, "bf16-mixed", 32, paper=(11.63, 4.01)),
    Setting("celeba", "64 × 64 UNet, 35.7 M, batch 32, bf16", 32, "bf16-mixed", 64, paper=(7.20, 1.77)),
    Setting("cifar-compiled", "CIFAR-10 UNet, batch 128, bf16, torch.compile", 128, "bf16-mixed", 32, dropout=0.0,
            run="compiled"),
    Setting("perceptron", _POINTS, 32, size=0),
    Setting("perceptron-graph", _POINTS + ", one CUDA graph", 32, size=0, run="graph"),
]  # fmt: skip
SETTINGS = {setting.key: setting for setting in CPU + GPU}


def kde_seconds(x: Tensor) -> float:
    """Time of all that a step on the minibatch x needs of the density estimate."""
    points = x.flatten(1)

    def call() -> None:
        step = fk.flux_pass(points, points, 0.25, 1.0)
        step.transition_average(step.score_t)
        fk.residual_gradient(step.xt, step.xt, points, 0.25)

    return median_of_repeated(call)


def peak_memory(setting: Setting, method: str, device: str) -> int:
    """Bytes that training takes at most, parameters and optimizer included; on a CPU in a process of its own."""
    if torch.device(device).type == "cuda":
        gc.collect()  # the last trainer, which compiled code can hold in a cycle
        torch.cuda.empty_cache()
        step = setting.step(method, device)
        step()
        return gpu_peak_memory(step)
    return int(run_module("bench.training.cost", "--memory", setting.key, method).stdout.split()[-1])


def print_memory(setting: Setting, method: str) -> None:
    def train() -> None:
        step = setting.step(method, "cpu")
        step()
        step()

    print(resident_growth(train))


def measure(setting: Setting, device: str, repetitions: int) -> list[dict[str, Any]]:
    """A row per method; one that fails has its error's text instead of figures."""
    rows: list[dict[str, Any]] = [{"setting": asdict(setting), "method": method} for method in setting.methods]
    for row in rows:
        try:
            row["memory"] = peak_memory(setting, row["method"], device)
        except Exception as problem:  # out of memory, a compiler that fails, no diffusers: the row stays
            row["failed"] = f"{type(problem).__name__}: {problem}"[:300]
            print(row["method"], row["failed"])
    working = [row for row in rows if "failed" not in row]
    # Only now: trainers that stay would count in the others' memory.
    steps = [setting.step(row["method"], device) for row in working]
    for row, seconds in zip(working, medians(steps, repetitions), strict=True):
        row["seconds"] = seconds
    if working:
        rows[0]["kde"] = kde_seconds(setting.data(setting.batch).to(device))
    return rows


HEAD = (
    "| network | method | time | of score matching | peak memory | of score matching | KDE, of the step |\n"
    + "|---" * 7
    + "|"
)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of one setting's rows, the first of which is score matching."""
    base, lines = rows[0], []
    for row in rows:
        head = f"| {row['setting']['name']} | {row['method']} |"
        if "failed" in row:
            lines.append(f"{head} {row['failed'].split(':')[0]} | | | | |")
            continue
        paper = row["setting"]["paper"]
        published = f"; paper: {paper[row['method'] != 'score matching']:.3g}" if paper else ""
        each = f"{1e3 * row['seconds']:.3g} ms ({1 / row['seconds']:.3g} it/s{published})"
        times = memory = kde = "–"
        if row is not base and "seconds" in base:
            times = f"{row['seconds'] / base['seconds']:.2f} ×"
            memory = f"{row['memory'] / base['memory']:.2f} ×"
            kde = f"{base['kde'] / row['seconds']:.1%}"
        lines.append(f"{head} {each} | {times} | {row['memory'] / 1e9:.2f} GB | {memory} | {kde} |")
    return lines


SUMMARY = {
    "flux": "Flux Matching",
    "flux, half of the ends": "`endpoint_fraction=0.5`",
    "flux, double backward": "double backward, as in the paper",
}


def summary(results: dict[str, Any]) -> list[str]:
    """The page's table: time and memory over those of score matching, a line per network."""
    heads = ["network", "score matching", *SUMMARY.values()]
    lines = [
        f"*{Origin.of(results).dated()}*",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]
    for name in dict.fromkeys(row["setting"]["name"] for row in results["rows"]):
        by_method = {row["method"]: row for row in results["rows"] if row["setting"]["name"] == name}
        base = by_method["score matching"]
        if "failed" in base:
            lines.append(f"| {name} | {base['failed'].split(':')[0]} |" + " – |" * len(SUMMARY))
            continue
        cells = [name, records.duration(base["seconds"])]
        for method in SUMMARY:
            row = by_method.get(method, {"failed": "–"})
            cells.append(
                row["failed"].split(":")[0]
                if "failed" in row
                else f"{row['seconds'] / base['seconds']:.2f} ×, memory {row['memory'] / base['memory']:.2f} ×"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.training.cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--setting", choices=sorted(SETTINGS), help="one of them alone, printed and not kept")
    parser.add_argument("--repetitions", type=int, default=9, help="of every step; with fewer than 5 nothing is kept")
    parser.add_argument("--memory", nargs=2, metavar=("SETTING", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print_memory(SETTINGS[options.memory[0]], options.memory[1])
        return
    device = device_argument(parser, options.device)
    if options.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {options.repetitions}")
    chosen = [SETTINGS[options.setting]] if options.setting else GPU if device.type == "cuda" else CPU
    kept = options.setting is None and options.repetitions >= 5
    rows: list[dict[str, Any]] = []
    with begin("training", device, keep=kept) as write:
        write("# A training step beside one of score matching\n")
        write(HEAD)
        for setting in chosen:
            found = measure(setting, str(device), options.repetitions)
            rows += found
            write("\n".join(table(found)))
    if kept:
        kind, origin = "gpu" if device.type == "cuda" else "cpu", Origin.here(device)
        records.keep(f"training-{kind}", {**origin.fields(), "rows": rows}, origin.date)


if __name__ == "__main__":
    main()
