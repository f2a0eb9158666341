"""CIFAR-10 and CelebA at 64 × 64 as bytes, from the files that their authors publish or from other copies."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.common.data import VARIABLE, data_folders
from experiments.common.registry import UsageError

PARTS, SUFFIXES = ("train", "test"), (".png", ".jpg", ".jpeg")
CELEBA = 202_599
CELEBA_TRAINING = 162_770  # images 1 to 162770 are the training part of CelebA's list_eval_partition.txt
CELEBA_CROP = 140  # pixels about the center of 178 × 218, then scaled to 64


@dataclass(frozen=True)
class Images:
    """One data set.

    Attributes:
        train, test: bytes `[n, 3, size, size]`.
        source: the files they come from, and what that means for comparisons.
    """

    train: Tensor
    test: Tensor
    source: str


def load(name: str, folders: Iterable[Path] | None = None) -> Images:
    """Load a data set by name from the first of its sources that exists.

    Args:
        name: "cifar10" (several sources, the authors' first), "cifar10_subset" (5438 of its images), "celeba64", or
            "shapes", which is drawn and needs no file.
        folders: folders to search; None for `data_folders()`.

    Raises:
        UsageError: no source exists, or its files are damaged; the text explains which file to put where.
    """
    if name == "shapes":
        return Images(
            shapes(1024, seed=0),
            shapes(256, seed=1),
            "drawn discs, 16 × 16, disc and background each of one random color",
        )
    if name not in SOURCES:
        raise UsageError(f"no data set {name!r}; there are {', '.join(SOURCES)}, shapes")
    folders = list(data_folders() if folders is None else folders)
    for path, read in SOURCES[name].items():
        for folder in folders:
            if (place := folder / path).exists():
                try:
                    return read(place)
                except Exception as error:  # whatever reading a damaged file raises
                    reason = f"{type(error).__name__}: {error}"
                    raise UsageError(f"{name}: {path} cannot be read ({reason})") from error
    places = " or ".join(SOURCES[name])
    raise UsageError(f"no files of {name}: put {places} into {Path('data')}/, or into a folder named by {VARIABLE}")


class _NumpyOnly(pickle.Unpickler):
    """Unpickler for text, lists and NumPy arrays, all that CIFAR-10 needs; any other object could run a program."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if arrays or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a batch of CIFAR-10 holds no {module}.{name}")


def _batch(file: io.BufferedIOBase | io.BytesIO) -> np.ndarray:
    return np.asarray(_NumpyOnly(file, encoding="bytes").load()[b"data"], np.uint8).reshape(-1, 3, 32, 32)


def _cifar10(open_batch: Callable[[str], Any]) -> Images:
    parts: list[np.ndarray] = []
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        with open_batch(name) as file:
            parts.append(_batch(file))
    return Images(
        torch.from_numpy(np.concatenate(parts[:5])), torch.from_numpy(parts[5]), "CIFAR-10 as its authors publish it"
    )


def _cifar10_folder(folder: Path) -> Images:
    return _cifar10(lambda name: (folder / name).open("rb"))


def _cifar10_archive(path: Path) -> Images:
    with tarfile.open(path) as archive:

        def open_batch(name: str) -> Any:
            file = archive.extractfile(f"cifar-10-batches-py/{name}")
            assert file is not None
            return file

        return _cifar10(open_batch)


def _pixels(file: Any, crop: int | None = None, size: int | None = None) -> np.ndarray:
    with Image.open(file) as image:
        image = image.convert("RGB")
        if crop is not None:
            left, top = (image.width - crop) // 2, (image.height - crop) // 2
            image = image.crop((left, top, left + crop, top + crop))
        if size is not None:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image, np.uint8).transpose(2, 0, 1)


def _stack(pixels: Iterable[np.ndarray]) -> Tensor:
    found = list(pixels)
    if not found or len({image.shape for image in found}) > 1:
        raise ValueError("there must be images, all of one size")
    return torch.from_numpy(np.stack(found))


def _class_folders(folder: Path) -> Images:
    """Read `train/<class>/*` and `test/<class>/*`."""
    with ThreadPoolExecutor() as pool:
        files = [sorted(f for f in (folder / part).glob("*/*") if f.suffix.lower() in SUFFIXES) for part in PARTS]
        train, test = (_stack(pool.map(_pixels, found)) for found in files)
    return Images(train, test, f"{len(train)} + {len(test)} image files of {folder.name}")


def _jpeg_archive(path: Path) -> Images:
    """Read class folders from a tar file, in file order: seeking in a compressed file would unpack it again."""
    files: dict[str, dict[str, bytes]] = {part: {} for part in PARTS}
    with tarfile.open(path) as archive:
        for member in archive:
            place = Path(member.name)
            if member.isfile() and place.suffix.lower() in SUFFIXES and (file := archive.extractfile(member)):
                files[place.parts[1]][member.name] = file.read()
    with ThreadPoolExecutor() as pool:
        train, test = (
            _stack(pool.map(lambda data: _pixels(io.BytesIO(data)), (part[name] for name in sorted(part))))
            for part in files.values()
        )
    return Images(train, test, "CIFAR-10 as JPEG, lossy: numbers are not comparable with those of the original")


def _subset(path: Path) -> Images:
    with np.load(path) as found:
        train, test = (torch.from_numpy(found[f"{part}_images"]) for part in ("train", "test"))
    return Images(train, test, f"{len(train)} + {len(test)} images of CIFAR-10, unaltered")


def _celeba64(folder: Path) -> Images:
    """Read `img_align_celeba/*.jpg`, decoded once: 2.5 GB of bytes are cached beside the folder for later runs."""
    cache = folder.with_name("celeba64.npy")
    if cache.exists():
        images = np.load(cache)
    else:
        files = sorted(folder.glob("*.jpg"))
        if len(files) != CELEBA:
            raise ValueError(f"CelebA has {CELEBA} images, {folder.name} {len(files)}")
        with ThreadPoolExecutor() as pool:
            images = _stack(pool.map(lambda file: _pixels(file, CELEBA_CROP, 64), files)).numpy()
        part = cache.with_suffix(".part")
        try:
            with part.open("wb") as file:
                np.save(file, images)
            part.replace(cache)
        except OSError as error:  # a read-only folder: the next run decodes again
            print(f"note: {cache.name} cannot be kept ({error.strerror})", file=sys.stderr)
    both = torch.from_numpy(images)
    return Images(both[:CELEBA_TRAINING], both[CELEBA_TRAINING:], "CelebA, aligned, center cropped, 64 × 64")


SOURCES: dict[str, dict[str, Callable[[Path], Images]]] = {
    "cifar10": {
        "cifar-10-batches-py": _cifar10_folder,
        "cifar10/cifar-10-batches-py": _cifar10_folder,
        "cifar-10-python.tar.gz": _cifar10_archive,
        "cifar10/cifar-10-python.tar.gz": _cifar10_archive,
        "cifar10/train": lambda place: _class_folders(place.parent),
        "cifar10/cifar10_jpeg_60000.tar.xz": _jpeg_archive,
        "cifar10/cifar10_lossless_subset.npz": _subset,
    },
    "cifar10_subset": {"cifar10/cifar10_lossless_subset.npz": _subset},
    "celeba64": {"img_align_celeba": _celeba64, "celeba/img_align_celeba": _celeba64},
}


def shapes(count: int, seed: int, size: int = 16) -> Tensor:
    """Images of one disc each with random place, radius, color and background: bytes `[count, 3, size, size]`."""
    generator = torch.Generator().manual_seed(seed)
    place = size * (0.25 + 0.5 * torch.rand(count, 2, 1, 1, generator=generator))
    radius = size * (0.1 + 0.15 * torch.rand(count, 1, 1, generator=generator))
    colors = torch.rand(2, count, 3, 1, 1, generator=generator)
    across = torch.arange(size) + 0.5
    distance = torch.hypot(across[:, None] - place[:, 0], across[None] - place[:, 1])
    inside = (radius - distance + 0.5).clamp(0, 1)[:, None]
    return (255 * (inside * colors[0] + (1 - inside) * colors[1])).round().to(torch.uint8)


class Flipped:
    """Images as numbers in [-1, 1], each sample mirrored left to right with probability ½ if `flips`.

    Mirroring draws from torch's generator, which `fluxmatching.Trainer` seeds in every iteration.
    """

    def __init__(self, images: Tensor, flips: bool, device: torch.device) -> None:
        self.images, self.flips, self.device = images, flips, device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor) -> Tensor:
        x = to_numbers(self.images[indices].to(self.device))
        if not self.flips:
            return x
        mirrored = torch.rand(len(x), 1, 1, 1).to(self.device) < 0.5
        return torch.where(mirrored, x.flip(-1), x)


def to_numbers(images: Tensor) -> Tensor:
    """Bytes as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(x: Tensor) -> Tensor:
    """Round to the nearest bytes; clip values out of range.

    Raises:
        ValueError: x is not finite; it would become arbitrary bytes.
    """
    if not x.isfinite().all():
        raise ValueError("to_bytes: x must be finite; the field or the sampler diverged")
    return (127.5 * (x + 1)).round().clamp(0, 255).to(torch.uint8)
