"""Training loop for every field: moving average, warm-up, clipping, bfloat16, checkpoints, exact resume.

>>> import torch
>>> from fluxmatching import Trainer, TrainingOptions, flux_matching_loss
>>> field = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
>>> loss = lambda model, x, seed: flux_matching_loss(model, x, sigma=0.3, seed=seed)
>>> trainer = Trainer(field, loss, torch.randn(1000, 2), TrainingOptions(iterations=3, progress=False))
>>> trainer.run()
>>> trainer.iteration
3
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fluxmatching.distributed import average_gradients, check_shared, rank_and_size
from fluxmatching.training.checkpoint import (
    State,
    TrainingError,
    read_newest_checkpoint,
    remove_partial_checkpoints,
    write_checkpoint,
)
from fluxmatching.training.log import Log
from fluxmatching.training.options import MAY_CHANGE_ON_RESUME, OPTIMIZERS, PRECISIONS, TrainingOptions

# loss(model, minibatch, seed) -> losses `[n]` or their mean, or that and a dictionary of what an error message should
# show, such as σ and τ. `seed` is an int64 tensor on the minibatch's device.
Loss = Callable[[nn.Module, Tensor, Tensor], "Tensor | tuple[Tensor, dict[str, Tensor]]"]


class Samples(Protocol):
    """Data other than a tensor: a number of samples, and access to samples by indices `[n]` on the CPU."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor: ...


class Trainer:
    """Trainer of a model. With a folder, it resumes from the last checkpoint there.

    Every iteration has its own seed, which determines minibatch order, the random numbers of the loss and dropout. A
    run that was interrupted and resumed therefore equals one that was not, bit for bit on the same CPU.

    After `torch.distributed.init_process_group`, as under torchrun, each process takes its part of a joint minibatch,
    gradients are averaged, and the first process writes the files, which all processes must see.
    `FluxOptions(gather_across_ranks=True)` makes one density estimate for all. Draw what all processes must share, such
    as σ, from `seed`.

    Args:
        model: the field, or a module that holds the field and everything else that is learned.
        loss: loss(model, minibatch, seed) -> `[n]`, whose mean is minimized, or that mean; or either with a dictionary
            of tensors, such as σ and τ, which the error message shows if the loss is not finite.
        data: `[samples, *event]`, on the device of the model or on the CPU; or any `Samples`.
        options: settings of the run.
        folder: for `last.pt`, the checkpoint before it `previous.pt`, `metrics.csv` and TensorBoard events; None writes
            no files.
        lr_factor: factor of the learning rate as a function of the iteration (0, 1, ...), for a schedule; None for 1.
            A resumed run must be given the same function.

    Attributes:
        model: as given.
        average: moving average of the model.
        iteration: number of iterations done.

    Raises:
        TypeError: model is no module, or options of another type.
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
        lr_factor: Callable[[int], float] | None = None,
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
        self.model, self.loss, self.data, self.options, self.lr_factor = model, loss, data, options, lr_factor
        self.folder = None if folder is None else Path(folder)
        self.device = next(model.parameters()).device
        for tensor in model.state_dict().values() if self.processes > 1 else ():
            torch.distributed.broadcast(tensor, 0)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=False)
        self.optimizer = OPTIMIZERS[options.optimizer](
            model.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        self.iteration = 0
        self.recent: list[float] = []  # losses since the last row of metrics.csv
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                remove_partial_checkpoints(self.folder)
            self._resume()
        if self.processes > 1:
            check_shared("Trainer", "the iteration of the checkpoint in folder", torch.tensor(self.iteration))

    def run(self, seconds: float = math.inf) -> None:
        """Train up to `options.iterations`, or until the time is up, but for at least one iteration.

        With a folder, ends with a checkpoint. With several processes, rank 0 decides.

        Args:
            seconds: time after which no further iteration begins.
        """
        end = time.monotonic() + seconds
        with closing(self._log()) as log:
            done = self.iteration >= self.options.iterations
            while not done:
                loss = self.step()
                log.write(self.iteration, loss, self.optimizer.param_groups[0]["lr"])
                done = self.iteration == self.options.iterations or self._is_over(end)
                if (
                    self.folder is not None
                    and self.rank == 0
                    and (done or self.iteration % self.options.checkpoint_every == 0)
                ):
                    self.save()

    def _log(self) -> Log:
        folder = self.folder if self.rank == 0 else None
        return Log(self.options, self.iteration, self.recent, folder, self.device, shown=self.rank == 0)

    def _is_over(self, end: float) -> bool:
        if self.processes == 1 or end == math.inf:
            return time.monotonic() >= end
        over = torch.tensor(float(time.monotonic() >= end), device=self.device)
        torch.distributed.broadcast(over, 0)
        return bool(over)

    def step(self) -> float:
        """Train on one minibatch and return its mean loss."""
        options = self.options
        with self._own_random_numbers() as seed:
            x = self._minibatch()
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            half = PRECISIONS[options.precision]
            with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
                losses, details = self._losses(x, seed)
            value = losses.mean()
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            if self.processes > 1:
                average_gradients(self.model.parameters())
            most = float("inf") if options.clip is None else options.clip
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), most)
            finite = torch.stack([value.detach(), norm]).isfinite()
            if not finite.all():
                found = {"loss": value, "norm of the gradient": norm, **details}
                values = ", ".join(
                    f"{name} {torch.as_tensor(v).detach().float().mean().item():.6g}" for name, v in found.items()
                )
                raise self._not_finite(f"the {'gradient' if finite[0] else 'loss'} is not finite ({values})")
            self.optimizer.step()
            self.average.update_parameters(self.model)
        self.iteration += 1
        return value.item()

    def _learning_rate(self) -> float:
        rate = self.options.lr * min(1.0, (self.iteration + 1) / max(1, self.options.warmup))
        return rate if self.lr_factor is None else rate * self.lr_factor(self.iteration)

    def _losses(self, x: Tensor, seed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses and details. On a CPU the losses of this library reject a field that is not finite."""
        try:
            result = self.loss(self.model, x, seed)
        except ValueError as error:
            if "must be finite" not in str(error):
                raise
            raise self._not_finite(str(error)) from error
        losses, details = result if isinstance(result, tuple) else (result, {})
        if not isinstance(losses, Tensor) or not isinstance(details, dict):
            raise TypeError(
                f"Trainer: loss must return a tensor with one number per sample or their mean, or that and a "
                f"dictionary of details; got {type(result).__name__}"
            )
        return losses, details

    def _not_finite(self, what: str) -> TrainingError:
        kept = f", and the last good checkpoint is in {self.folder}" if self.folder else ""
        return TrainingError(f"iteration {self.iteration}: {what}; the model is unchanged{kept}")

    def save(self) -> None:
        """Write `last.pt`; the file before it becomes `previous.pt`. Neither name ever holds a truncated file."""
        if self.folder is None:
            raise ValueError("Trainer: save needs the folder that Trainer(folder=...) was not given")
        write_checkpoint(
            self.folder,
            {
                "iteration": self.iteration,
                "options": asdict(self.options),
                "samples": len(self.data),
                "processes": self.processes,
                "recent": self.recent,
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def _resume(self) -> None:
        assert self.folder is not None
        found = read_newest_checkpoint(self.folder, self.device)
        if found is None:
            return
        state, file = found
        self._check_same_run(state, file)
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"Trainer: {file} belongs to another model: {error}") from error
        self.iteration, self.recent = state["iteration"], state["recent"]

    def _check_same_run(self, state: State, file: Path) -> None:
        here = {
            "samples": len(self.data),
            "processes": self.processes,
            **{name: value for name, value in asdict(self.options).items() if name not in MAY_CHANGE_ON_RESUME},
        }
        there = {name: state[name] for name in ("samples", "processes")} | state["options"]
        changed = [
            f"{name} {there.get(name)!r} there, {value!r} here"
            for name, value in here.items()
            if there.get(name) != value
        ]
        if changed:
            raise ValueError(f"Trainer: {file} belongs to a run with other options: {'; '.join(changed)}")

    @contextmanager
    def _own_random_numbers(self) -> Iterator[Tensor]:
        """Yield the iteration's seed and seed torch's generators for the block; those of CPU and CUDA are restored."""
        seed = (self.options.seed * 0x9E3779B97F4A7C15 + self.iteration) % 2**63
        # The seed of dropout differs between processes and iterations; all processes share the seed of the loss.
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
        """Return the samples of this iteration: a slice of the permutation of its epoch."""
        size = self.options.batch_size * self.processes
        batches = len(self.data) // size
        first = self.iteration % batches * size
        order = _order(len(self.data), (self.options.seed * 1_000_003 + self.iteration // batches) % 2**63)
        joint = order[first : first + size]
        chosen = joint.tensor_split(self.processes)[self.rank]
        x = self.data[chosen]
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Trainer: data must be a tensor, or return one for a tensor of indices; got {type(x).__name__} from "
                f"{type(self.data).__name__}"
            )
        return x.to(self.device, non_blocking=True)


@lru_cache(maxsize=1)
def _order(samples: int, seed: int) -> Tensor:
    """Return the permutation of the samples, computed once per epoch."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
