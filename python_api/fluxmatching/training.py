"""One training loop for every field: moving average, warm-up, clipping, bfloat16, checkpoints, exact resume.

>>> import torch
>>> from fluxmatching import Trainer, TrainingOptions, flux_matching_loss
>>> field = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
>>> loss = lambda model, x, seed: flux_matching_loss(model, x, sigma2=0.1, seed=seed)
>>> trainer = Trainer(field, loss, torch.randn(1000, 2), TrainingOptions(iterations=3, progress=False))
>>> trainer.run()
>>> trainer.iteration
3
"""

from __future__ import annotations

import math
import operator
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fluxmatching.processes import average_gradients, check_shared, rank_and_size
from fluxmatching.training_log import Log

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
PRECISIONS = {"float32": None, "bf16": torch.bfloat16}
LAST, PREVIOUS = "last.pt", "previous.pt"
# Options that may differ between a checkpoint and the run that goes on from it: how long and how visibly.
FREE = ("iterations", "checkpoint_every", "log_every", "progress", "tensorboard")

# loss(model, minibatch, seed) -> one number a sample, as `flux_matching_loss` returns them, or those and a dictionary
# of what an error should say beside them, such as σ and τ. `seed` is an int64 tensor on the minibatch's device.
Loss = Callable[[nn.Module, Tensor, Tensor], "Tensor | tuple[Tensor, dict[str, Tensor]]"]


class Samples(Protocol):
    """Data that are no tensor: a number of samples, and those of given indices, `[n]` on the CPU."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor: ...


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which iteration and why."""


@dataclass(frozen=True)
class TrainingOptions:
    """What a training run is, beside its model, loss and data.

    Attributes:
        iterations: minibatches in all.
        batch_size: samples a minibatch and process, drawn without repetition; each pass over the data is shuffled anew.
        lr: learning rate after warm-up.
        optimizer: "adam" or "adamw".
        weight_decay: of the optimizer.
        warmup: iterations over which the learning rate rises linearly from 0.
        ema: decay of the moving average of the parameters, 0 ≤ ema < 1.
        clip: largest norm of the gradient, or None.
        precision: "float32", or "bf16" for autocast to bfloat16.
        seed: of minibatches, of the loss's random numbers and of dropout.
        checkpoint_every: iterations between checkpoints; the last iteration always makes one.
        log_every: iterations between lines of metrics.csv.
        progress: whether to show a bar with loss, iterations a second and memory.
        tensorboard: whether to write TensorBoard events beside metrics.csv.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    iterations: int
    batch_size: int = 256
    lr: float = 1e-3
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    warmup: int = 0
    ema: float = 0.999
    clip: float | None = 1.0
    precision: str = "float32"
    seed: int = 0
    checkpoint_every: int = 1000
    log_every: int = 50
    progress: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        # Python's own numbers, whatever NumPy's were given: a checkpoint holds no others.
        for name in ("iterations", "batch_size", "warmup", "seed", "checkpoint_every", "log_every"):
            self._convert(name, operator.index)
        for name in ("lr", "weight_decay", "ema", *(() if self.clip is None else ("clip",))):
            self._convert(name, float)
        for name in ("iterations", "batch_size", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainingOptions: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"TrainingOptions: {name} must be positive and finite, got {getattr(self, name)}")
        if not (self.warmup >= 0 and 0 <= self.weight_decay < float("inf")):
            raise ValueError(
                f"TrainingOptions: warmup and weight_decay must not be negative, got {self.warmup} and "
                f"{self.weight_decay}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"TrainingOptions: ema must lie in [0, 1), got {self.ema}")
        for name, choices in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if (got := getattr(self, name)) not in choices:
                takes = ", ".join(map(repr, choices))
                raise ValueError(f"TrainingOptions: {name} must be one of {takes}, got {got!r}")

    def _convert(self, name: str, kind: Callable[[Any], Any]) -> None:
        try:
            object.__setattr__(self, name, kind(getattr(self, name)))
        except (TypeError, ValueError):
            wanted = "a number" if kind is float else "a whole number"
            raise TypeError(f"TrainingOptions: {name} must be {wanted}, got {getattr(self, name)!r}") from None


class Trainer:
    """Trains a model; with a folder it goes on from the last checkpoint there, as if it had never stopped.

    Every iteration has its own seed, from which minibatch order, the loss's numbers and dropout follow. So a run that
    was interrupted and resumed equals one that was not, bit for bit on the same CPU.

    Where torch.distributed was started (torchrun), each process takes its part of a joint minibatch, gradients are
    averaged, and the first process writes the files, which all must see. One density estimate for all:
    `flux_matching_loss(gather=True)`. What all processes must share, such as σ there, is to be drawn from `seed`.

    Args:
        model: the field, or a module that holds it and all else that is learned.
        loss: loss(model, minibatch, seed) -> `[n]`, whose mean is minimised; or `[n]` and a dictionary of tensors, such
            as σ and τ, that the message says if the loss is not finite.
        data: `[samples, *event]`, on the device of the model or on the CPU; or any `Samples`.
        options: of the run.
        folder: for `last.pt`, the checkpoint before it `previous.pt`, and `metrics.csv`; None keeps nothing.

    Attributes:
        model: as given.
        average: the moving average of the model.
        iteration: how many are done.

    Raises:
        TypeError: a model that is no module, options of another kind.
        ValueError: nothing to train, fewer samples than a minibatch, or a checkpoint of another run or model.
        TrainingError: the loss or its gradient is not finite, or no checkpoint can be read. The last good checkpoint
            stays.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Tensor | Samples,
        options: TrainingOptions,
        *,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Trainer: model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(options, TrainingOptions):
            raise TypeError(f"Trainer: options must be TrainingOptions, got {type(options).__name__}")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"Trainer: model must have parameters that need a gradient, got {type(model).__name__}")
        self.rank, self.processes = rank_and_size()
        if len(data) < options.batch_size * self.processes:
            raise ValueError(
                f"Trainer: batch_size must be at most the {len(data)} samples"
                f"{f' over {self.processes} processes' if self.processes > 1 else ''}, got {options.batch_size}"
            )
        self.model, self.loss, self.data, self.options = model, loss, data, options
        self.folder = None if folder is None else Path(folder)
        self.device = next(model.parameters()).device
        for tensor in model.state_dict().values() if self.processes > 1 else ():
            torch.distributed.broadcast(tensor, 0)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=False)
        self.optimizer = OPTIMIZERS[options.optimizer](
            model.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        self.iteration = 0
        self.recent: list[float] = []  # losses since the last line of metrics.csv
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob("part-*.pt") if self.rank == 0 else ():  # of a process that was killed
                part.unlink()
            self._resume()
        if self.processes > 1:
            check_shared("Trainer", "the iteration of the checkpoint in folder", torch.tensor(self.iteration))

    def run(self, seconds: float = math.inf) -> None:
        """Train up to `options.iterations`, or as far as one comes in that time, but for at least one iteration.

        Either way the last thing is a checkpoint. Of several processes the first one's clock counts.
        """
        end = time.monotonic() + seconds
        with closing(Log(self)) as log:
            done = self.iteration >= self.options.iterations
            while not done:
                log.write(self.step())
                done = self.iteration == self.options.iterations or self._is_over(end)
                if (
                    self.folder is not None
                    and self.rank == 0
                    and (done or self.iteration % self.options.checkpoint_every == 0)
                ):
                    self.save()

    def _is_over(self, end: float) -> bool:
        if self.processes == 1 or end == math.inf:
            return time.monotonic() >= end
        over = torch.tensor(float(time.monotonic() >= end), device=self.device)
        torch.distributed.broadcast(over, 0)
        return bool(over)

    def step(self) -> float:
        """One minibatch; returns its mean loss."""
        options = self.options
        with self._own_random_numbers() as seed:
            x = self._minibatch()
            for group in self.optimizer.param_groups:
                group["lr"] = options.lr * min(1.0, (self.iteration + 1) / max(1, options.warmup))
            half = PRECISIONS[options.precision]
            with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
                values, details = self._losses(x, seed)
            value = values.mean()
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            if self.processes > 1:
                average_gradients(self.model.parameters())
            most = float("inf") if options.clip is None else options.clip
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), most)
            finite = torch.stack([value.detach(), norm]).isfinite()
            if not finite.all():
                found = {"loss": value, "norm of the gradient": norm, **details}
                said = ", ".join(
                    f"{name} {torch.as_tensor(v).detach().float().mean().item():.6g}" for name, v in found.items()
                )
                raise self._not_finite(f"the {'gradient' if finite[0] else 'loss'} is not finite ({said})")
            self.optimizer.step()
            self.average.update_parameters(self.model)
        self.iteration += 1
        return value.item()

    def _losses(self, x: Tensor, seed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each sample, and details. On a CPU the library's own losses refuse what is not finite."""
        try:
            result = self.loss(self.model, x, seed)
        except ValueError as error:
            if "must be finite" not in str(error):
                raise
            raise self._not_finite(str(error)) from error
        values, details = result if isinstance(result, tuple) else (result, {})
        if not isinstance(values, Tensor) or not isinstance(details, dict):
            raise TypeError(
                f"Trainer: loss must return a tensor with one number a sample, or that and a dictionary of details; "
                f"got {type(result).__name__}"
            )
        return values, details

    def _not_finite(self, what: str) -> TrainingError:
        kept = f", and the last good checkpoint is in {self.folder}" if self.folder else ""
        return TrainingError(f"iteration {self.iteration}: {what}; nothing of it entered the model{kept}")

    def save(self) -> None:
        """Write `last.pt`; the one before becomes `previous.pt`. Never leaves a file cut short under either name."""
        if self.folder is None:
            raise ValueError("Trainer: save needs the folder that Trainer(folder=...) was not given")
        part = self.folder / f"part-{os.getpid()}.pt"
        state = {
            "iteration": self.iteration,
            "options": asdict(self.options),
            "samples": len(self.data),
            "processes": self.processes,
            "recent": self.recent,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        last = self.folder / LAST
        if last.exists():
            last.replace(self.folder / PREVIOUS)
        part.replace(last)

    def _resume(self) -> None:
        assert self.folder is not None
        problems = []
        for name in (LAST, PREVIOUS):
            file = self.folder / name
            if not file.exists():
                continue
            try:
                state = _read(file, self.device)
            except Exception as error:  # whatever reading a damaged file raises
                problems.append(f"{name} ({type(error).__name__})")
                continue
            if problems:
                warnings.warn(f"Trainer: {problems[0]} in {self.folder} cannot be read; {name} is used", stacklevel=3)
            self._check_same_run(state, file)
            try:
                self.model.load_state_dict(state["model"])
                self.average.load_state_dict(state["average"])
                self.optimizer.load_state_dict(state["optimizer"])
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"Trainer: {file} is of another model: {error}") from error
            self.iteration, self.recent = state["iteration"], state["recent"]
            return
        if problems:
            raise TrainingError(f"no checkpoint in {self.folder} can be read: {', '.join(problems)}")

    def _check_same_run(self, state: dict[str, Any], file: Path) -> None:
        here = {
            "samples": len(self.data),
            "processes": self.processes,
            **{name: value for name, value in asdict(self.options).items() if name not in FREE},
        }
        there = {name: state[name] for name in ("samples", "processes")} | state["options"]
        changed = [
            f"{name} {there.get(name)!r} there, {value!r} here"
            for name, value in here.items()
            if there.get(name) != value
        ]
        if changed:
            raise ValueError(f"Trainer: {file} is of a run with other options: {'; '.join(changed)}")

    @contextmanager
    def _own_random_numbers(self) -> Iterator[Tensor]:
        """The iteration's seed; torch's generators are set by it within, and are afterwards as before."""
        seed = (self.options.seed * 0x9E3779B97F4A7C15 + self.iteration) % 2**63
        # Dropout's, another in each process and iteration; the loss's seed is that of all processes.
        own = (seed * self.processes + self.rank) % 2**63
        on_cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_cuda else []):
            torch.default_generator.manual_seed(own)
            if on_cuda:
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(own)
            elif self.device.type == "mps":
                torch.mps.manual_seed(own)
            yield torch.tensor(seed, device=self.device)

    def _minibatch(self) -> Tensor:
        """Samples of this iteration: a slice of a permutation that each pass over the data has of its own."""
        size = self.options.batch_size * self.processes
        batches = len(self.data) // size
        first = self.iteration % batches * size
        order = _order(len(self.data), (self.options.seed * 1_000_003 + self.iteration // batches) % 2**63)
        joint = order[first : first + size]
        chosen = joint.tensor_split(self.processes)[self.rank]
        x = self.data[chosen]
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Trainer: data must be a tensor, or give one for a tensor of indices; got {type(x).__name__} from "
                f"{type(self.data).__name__}"
            )
        return x.to(self.device, non_blocking=True)


def _read(file: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint whose contents are what was written; `torch.load` alone takes damaged numbers as they are."""
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise OSError(f"{damaged} is damaged")
    state = torch.load(file, map_location=device, weights_only=True)
    wanted = {"iteration", "options", "samples", "processes", "recent", "model", "average", "optimizer"}
    if not isinstance(state, dict) or not wanted <= set(state):
        raise KeyError("not a checkpoint of Trainer")
    return state


@lru_cache(maxsize=1)
def _order(samples: int, seed: int) -> Tensor:
    """Permutation of the samples, made once for all minibatches of a pass."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
