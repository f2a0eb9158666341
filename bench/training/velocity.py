"""Cost of `flux_velocity` at the paper's size: time of a step by backend, time of a fit, and peak memory.

python -m bench.training.velocity            about 12 minutes on two cores
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from scipy.spatial import cKDTree

from bench.timing import medians, resident, resident_growth, run_module, timed
from bench.training.results import begin, device_argument
from fluxkernels import backends
from fluxmatching import Trainer, TrainingOptions
from fluxmatching.velocity import SharedFlowOptions, SplicingField, VelocityOptions, flux_velocity
from fluxmatching.velocity.per_gene import SplicingLoss

if TYPE_CHECKING:
    from anndata import AnnData

GENES, BATCH, SIGMA = 2000, 256, math.sqrt(1e-3)
PANCREAS, LARGE = 3696, 100_000  # cells


def made_cells(cells: int, genes: int, seed: int = 0) -> AnnData:
    """Uniform numbers; spreads of genes are log-normal with the medians of the pancreas, 0.02 (u) and 0.14 (s)."""
    from anndata import AnnData

    generator = np.random.default_rng(seed)
    layers = {}
    for key, middle in (("Mu", 0.02), ("Ms", 0.14)):
        layers[key] = generator.random((cells, genes), dtype=np.float32)
        layers[key] *= generator.lognormal(np.log(12**0.5 * middle), 1.5, genes).astype(np.float32)
    return AnnData(layers=layers, shape=(cells, genes))


def step_seconds(device: torch.device, names: list[str], repetitions: int) -> dict[str, float]:
    """Median of a training step by backend, in one run and taking turns."""
    adata = made_cells(4 * BATCH, GENES)
    x = torch.from_numpy(np.stack([adata.layers["Mu"], adata.layers["Ms"]], -1)).to(device)
    options = TrainingOptions(
        10**6, BATCH, lr=1e-3, optimizer="adam", ema=0.0, clip=None, accelerator=str(device), progress=False
    )
    steps = [Trainer(SplicingLoss(SplicingField(GENES), SIGMA, name), x, options).step for name in names]
    return dict(zip(names, medians(steps, repetitions), strict=True))


def fit_seconds(device: torch.device, epochs: int) -> float:
    """Time of a whole fit at the size of the pancreas, from layers in main memory to layers in main memory."""
    adata = made_cells(PANCREAS, GENES)
    options = VelocityOptions(epochs=epochs, progress=False, device=device)
    return timed(lambda: flux_velocity(adata, "per_gene", options=options))[1]


def made_counts(cells: int, genes: int, seed: int = 0) -> AnnData:
    """Sparse counts of genes that rise and fall along a cycle, a tenth of them above 0, and 30 neighbors per cell."""
    from anndata import AnnData

    random = np.random.default_rng(seed)
    phase, offset = random.random(cells) * 2 * np.pi, random.random(genes) * 2 * np.pi
    layers = {}
    for key, level in (("spliced", 0.12), ("unspliced", 0.10)):
        lag = 0.4 * (key == "spliced")
        blocks = (
            sparse.csr_matrix(random.poisson(level * (1 + np.sin(part[:, None] - offset - lag))).astype(np.float32))
            for part in np.array_split(phase, max(1, cells // 2000))
        )
        layers[key] = sparse.vstack(list(blocks), format="csr")
    place = np.stack([np.cos(phase), np.sin(phase)], 1) + 0.1 * random.standard_normal((cells, 2))
    found = cKDTree(place).query(place, 31)[1][:, 1:]
    rows = np.repeat(np.arange(cells), 30)
    graph = sparse.csr_matrix((np.ones(rows.size, np.float32), (rows, found.ravel())), (cells, cells))
    adata = AnnData(layers=layers, obsp={"connectivities": graph}, shape=(cells, genes))
    adata.uns["neighbors"] = {"connectivities_key": "connectivities", "params": {"n_neighbors": 30}}
    return adata


def print_shared_memory(cells: int) -> None:
    """Print bytes of the counts, of the layer written, and those a fit adds at most, and its seconds."""
    options = SharedFlowOptions(keep_moments=False)
    flux_velocity(made_counts(500, 50), options=options)  # the libraries' own memory comes first
    adata = made_counts(cells, GENES)
    counts = sum(part.nbytes for layer in adata.layers.values() for part in (layer.data, layer.indices, layer.indptr))
    added, seconds = timed(lambda: resident_growth(lambda: flux_velocity(adata, options=options)))
    print(counts, adata.layers["velocity"].nbytes, added, seconds)


def memory(cells: int) -> tuple[int, int, float]:
    """Bytes that a fit of one epoch adds at most, the process's peak, and seconds; in a process of its own."""
    added, peak, seconds = run_module("bench.training.velocity", "--memory", cells).stdout.split()[-3:]
    return int(added), int(peak), float(seconds)


def print_memory(cells: int) -> None:
    options = VelocityOptions(epochs=1, progress=False)
    flux_velocity(made_cells(16, 8), "per_gene", options=options)  # the libraries' own memory comes first
    adata = made_cells(cells, GENES)
    added, seconds = timed(lambda: resident_growth(lambda: flux_velocity(adata, "per_gene", options=options)))
    print(added, resident("VmHWM"), seconds)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.training.velocity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5, help="of a step; with fewer than 5 nothing is kept")
    parser.add_argument("--epochs", type=int, default=100, help="of the whole fit")
    parser.add_argument("--memory", type=int, metavar="CELLS", help=argparse.SUPPRESS)
    parser.add_argument("--shared-memory", type=int, metavar="CELLS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print_memory(options.memory)
        return
    if options.shared_memory:
        print_shared_memory(options.shared_memory)
        return
    device = device_argument(parser, options.device)
    names = [b.name for b in backends().values() if not b.missing and (not b.devices or device.type in b.devices)]
    with begin("velocity", device, keep=options.repetitions >= 5 and options.epochs == 100) as write:
        write(f"# RNA velocity: {PANCREAS} cells x {GENES} genes, minibatches of {BATCH}\n")
        write("| backend | a training step | the torch backend takes |\n|---|---|---|")
        seconds = step_seconds(device, names, options.repetitions)
        for name, value in seconds.items():
            write(f"| {name} | {1e3 * value:.3g} ms | {seconds['torch'] / value:.1f} × as long |")
        write(f"\nA whole fit of {options.epochs} epochs: {fit_seconds(device, options.epochs):.0f} s.\n")
        if device.type == "cpu":
            write(
                "| cells | the two layers | the three written | more, at most | the process | an epoch |\n"
                + "|---" * 6
                + "|"
            )
            for cells in (PANCREAS, LARGE):
                added, peak, took = memory(cells)
                layer = 4 * cells * GENES
                sizes = " | ".join(
                    f"{bytes_ / 1e9:.3g} GB" for bytes_ in (2 * layer, 3 * layer, added - 3 * layer, peak)
                )
                write(f"| {cells} | {sizes} | {took:.0f} s |")
            write("\nOne shared flow, from sparse counts:\n")
            write("| cells | the counts | the layer written | more, at most | the fit |" + "\n" + "|---" * 5 + "|")
            for cells in (PANCREAS, LARGE):
                found = run_module("bench.training.velocity", "--shared-memory", cells).stdout.split()[-4:]
                counts, written, grown = (int(word) / 1e9 for word in found[:3])
                sizes = f"{counts:.3g} GB | {written:.3g} GB | {grown - written:.3g} GB"
                write(f"| {cells} | {sizes} | {float(found[3]):.0f} s |")


if __name__ == "__main__":
    main()
