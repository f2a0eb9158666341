"""Training loop for every loss module, on Lightning Fabric, with exact resume.

>>> import torch
>>> from fluxmatching import FluxMatching, Trainer, TrainingOptions
>>> field = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
>>> trainer = Trainer(FluxMatching(field, sigma=0.3), torch.randn(1000, 2), TrainingOptions(3, progress=False))
>>> trainer.run()
>>> trainer.iteration
3
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fluxmatching.distributed import check_same_options, check_shared
from fluxmatching.training.average import MovingAverage
from fluxmatching.training.checkpoint import (
    State,
    TrainingError,
    read_newest_checkpoint,
    remove_partial_checkpoints,
    write_checkpoint,
)
from fluxmatching.training.checks import check_arguments, check_state, check_takes_labels
from fluxmatching.training.data import Minibatches, Samples
from fluxmatching.training.engine import (
    copy_from_first_process,
    cpu_by_default,
    is_sharded,
    layout_of,
    local,
    make_fabric,
    share_buffers,
)
from fluxmatching.training.log import Log
from fluxmatching.training.options import OPTIMIZERS, TrainingOptions
from fluxmatching.training.state import load_state, state_of

if TYPE_CHECKING:
    from lightning_fabric.loggers.logger import Logger


class Trainer:
    """Trainer of a loss module. With a folder, it resumes from the last checkpoint there.

    Every iteration has its own seed, which determines minibatch order, the random numbers of the loss and dropout. A
    run that was interrupted and resumed therefore equals one that was not, bit for bit on the same CPU.

    Lightning Fabric runs devices, processes and mixed precision. Several processes are started by torchrun, by Slurm,
    or by `devices=8` in the options. Each takes its part of a joint minibatch, gradients are averaged, and the first
    process writes the files, which all processes must see. `FluxOptions(gather_across_ranks=True)` makes one density
    estimate for all.

    Args:
        loss: a module with forward(minibatch, seed=...) -> mean loss `[]`, or (mean loss, dictionary to log); such as
            `NoiseAnnealedFluxMatching`; labels=... too where the data have them. Moved to the device of the run.
        data: `[samples, *event]`, on the device of the run or on the CPU; or any `Samples`, such as
            `torch.utils.data.TensorDataset(x, labels)`.
        options: settings of the run.
        folder: for `last.pt`, the checkpoint before it `previous.pt`, and `metrics.csv`; None writes no files.
        lr_factor: factor of the learning rate as a function of the iteration (0, 1, ...), for a schedule; None for 1.
            Finite and not negative. A resumed run must be given the same function.
        loggers: loggers of Lightning, such as `TensorBoardLogger`, for the rows of metrics.csv and what the loss logs.

    Attributes:
        loss: as given. With "fsdp" it holds this process's part of the parameters; `state_dict` has all of them.
        average: moving average of the loss module; its field is `average.module.field`.
        fabric: the engine.
        iteration: number of iterations done.

    Raises:
        TypeError: an argument of another type, or a state that a checkpoint cannot hold.
        ValueError: nothing to train, fewer samples than a minibatch, a checkpoint of another run or model, or options,
            data or modules that differ between processes.
        TrainingError: the loss or its gradient is not finite, or no checkpoint can be read. The last good checkpoint
            stays.
    """

    def __init__(
        self,
        loss: nn.Module,
        data: Tensor | Samples,
        options: TrainingOptions,
        *,
        folder: str | os.PathLike[str] | None = None,
        lr_factor: Callable[[int], float] | None = None,
        loggers: Sequence[Logger] = (),
    ) -> None:
        check_arguments(loss, options)
        self.options, self.lr_factor = options, lr_factor
        self.folder = None if folder is None else Path(folder)
        self.loss = _without_compilation(loss)
        if self.folder is not None:
            check_state(self.loss, options)
        self.fabric = make_fabric(options, loggers)
        self.rank, self.processes = self.fabric.global_rank, self.fabric.world_size
        self.minibatches = Minibatches(
            data, options.batch_size, self.rank, self.processes, options.seed, self.fabric.device,
            getattr(self.loss, "num_classes", None),
        )  # fmt: skip
        if self.minibatches.labeled:
            check_takes_labels(self.loss)
        if self.processes > 1:
            check_same_options("Trainer", self._shared())
        self._set_up(loss)
        self.iteration = 0
        self.recent: list[Tensor] = []  # losses since the last row of metrics.csv
        self._unchecked: list[tuple[int, dict[str, Tensor]]] = []
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                remove_partial_checkpoints(self.folder)
            self.fabric.barrier()
            self._resume()
        if self.processes > 1:
            check_shared(
                "Trainer", "the iteration of the checkpoint in folder", torch.tensor(self.iteration, device="cpu")
            )

    def _set_up(self, loss: nn.Module) -> None:
        """Move, wrap and, if requested, shard the loss and its moving average; make the optimizer."""
        options, sharded = self.options, is_sharded(self.fabric)
        if self.processes > 1:
            copy_from_first_process(self.fabric, self.loss)
        if sharded and loss is not self.loss:
            raise TypeError("Trainer: a compiled loss cannot be sharded; compile its field instead")
        if sharded:  # copied while it is whole, then sharded in the same way
            self.average = MovingAverage(self.loss, options.ema)
            self.fabric.setup_module(self.average.module)
        self.engine = self.fabric.setup_module(loss if loss is self.loss else _Call(loss))
        if not sharded:
            self.average = MovingAverage(self.loss, options.ema)
        kind = OPTIMIZERS[options.optimizer]
        optimizer = kind(self.loss.parameters(), lr=options.lr, weight_decay=options.weight_decay)
        # With gradients of an earlier training, PyTorch takes the optimizer's empty state for a complete one.
        optimizer.zero_grad(set_to_none=True)
        self.optimizer: Any = self.fabric.setup_optimizers(optimizer)

    def run(self, seconds: float = math.inf) -> None:
        """Train up to `options.iterations`, or until the time is up, but for at least one iteration.

        With a folder, ends with a checkpoint. With several processes, rank 0 decides.

        Args:
            seconds: time after which no further iteration begins.
        """
        end = time.monotonic() + seconds
        folder = self.folder if self.rank == 0 else None
        with closing(Log(self.options, self.iteration, self.recent, folder, self.fabric)) as log:
            done = self.iteration >= self.options.iterations
            while not done:
                logged = self._train_iteration()
                if log.is_due(self.iteration):
                    self._check_finite()
                log.write(self.iteration, logged, self.optimizer.param_groups[0]["lr"])
                done = self.iteration == self.options.iterations or self._is_over(end)
                if self.folder is not None and (done or self.iteration % self.options.checkpoint_every == 0):
                    self.save()
        self._check_finite()

    def _is_over(self, end: float) -> bool:
        over = time.monotonic() >= end
        return over if end == math.inf else bool(self.fabric.broadcast(over))

    def step(self) -> Tensor:
        """Train on one minibatch, or on `accumulate` of them, and return the mean loss `[]`, detached.

        On a GPU the result is not waited for, and values that are not finite raise an error at the next row of the log
        or the next checkpoint.
        """
        return self._train_iteration()["loss"]

    def _train_iteration(self) -> dict[str, Tensor]:
        options = self.options
        with self._own_random_numbers(), cpu_by_default():
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            self.optimizer.zero_grad(set_to_none=True)
            logged = [self._accumulate(part) for part in range(options.accumulate)]
            values = {
                name: torch.stack([one[name].detach().float().mean() for one in logged]).mean() for name in logged[0]
            }
            norm = self.fabric.clip_gradients(
                self.engine, self.optimizer, max_norm=options.clip or math.inf, error_if_nonfinite=False
            )
            if options.precision != "16-mixed":  # whose loss scale makes infinite gradients, which it then skips
                values["norm of the gradient"] = torch.as_tensor(norm).detach()
            self._unchecked.append((self.iteration, values))
            if self.fabric.device.type == "cpu":  # elsewhere the host would wait
                self._check_finite()
            self.optimizer.step()
            if self.processes > 1:
                share_buffers(self.loss)
            self.average.update_parameters(self.loss)
        self.iteration += 1
        return values

    def _accumulate(self, part: int) -> dict[str, Tensor]:
        """Add the gradient of one minibatch and return what it logs, "loss" first."""
        options = self.options
        index = self.iteration * options.accumulate + part
        seed = torch.full((), self._seed(index), dtype=torch.int64, device=self.fabric.device)
        last = part == options.accumulate - 1
        with self.fabric.no_backward_sync(self.engine, enabled=self.processes > 1 and not last):
            value, logged = self._evaluate(*self.minibatches[index], seed)
            self.fabric.backward(value / options.accumulate)
        return {"loss": value.detach(), **{name: v for name, v in logged.items() if name != "loss"}}

    def _evaluate(self, x: Tensor, labels: Tensor | None, seed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss and what it logs. On a CPU our losses reject a field that is not finite."""
        try:
            result = self.engine(x, seed=seed, **({} if labels is None else {"labels": labels}))
        except ValueError as error:
            if "must be finite" not in str(error):
                raise
            raise self._not_finite(self.iteration, str(error)) from error
        value, logged = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not isinstance(value, Tensor) or value.ndim or not isinstance(logged, dict):
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(result).__name__
            raise TypeError(
                f"Trainer: forward of the loss must return its mean, a tensor of shape [], or that and a dictionary of "
                f"tensors to log; got {got}"
            )
        for name, number in logged.items():
            if not isinstance(number, (Tensor, Real)):
                raise TypeError(f"Trainer: what the loss logs must be tensors or numbers, got {name!r}: {number!r}")
        return value, {name: torch.as_tensor(v, device=value.device) for name, v in logged.items()}

    def _learning_rate(self) -> float:
        rate = self.options.lr * min(1.0, (self.iteration + 1) / max(1, self.options.warmup))
        if self.lr_factor is None:
            return rate
        rate *= float(self.lr_factor(self.iteration))
        if not 0 <= rate <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"Trainer: lr_factor must give a finite rate that is not negative, got lr {rate} at iteration "
                f"{self.iteration}"
            )
        return rate

    def _check_finite(self) -> None:
        """Raise TrainingError at the first iteration since the last check whose loss or gradient is not finite."""
        waiting, self._unchecked = self._unchecked, []
        for iteration, values in waiting:
            tested = [name for name in ("loss", "norm of the gradient") if name in values]
            bad = [name for name in tested if not values[name].isfinite()]
            if bad:
                numbers = ", ".join(f"{name} {value.item():.6g}" for name, value in values.items())
                what = "loss" if "loss" in bad else "gradient"
                raise self._not_finite(iteration, f"the {what} is not finite ({numbers})")

    def _check_finite_parameters(self) -> None:
        """Raise TrainingError in all processes if a parameter of the loss or its average is not finite in one."""
        named = [*self.loss.named_parameters(), *self.average.module.named_parameters()]
        bad = [name for name, parameter in named if not local(parameter).isfinite().all()]
        every = self.fabric.all_reduce(torch.tensor(float(len(bad)), device=self.fabric.device), reduce_op="sum")
        if every:
            raise TrainingError(
                f"iteration {self.iteration}: {f'parameter {bad[0]}' if bad else 'a parameter'} is not finite; nothing "
                f"is written to {self.folder}"
            )

    def _not_finite(self, iteration: int, what: str) -> TrainingError:
        unchanged = "; the model is unchanged" if self.fabric.device.type == "cpu" else ""
        stored = f"; the last good checkpoint is in {self.folder}" if self.folder else ""
        return TrainingError(f"iteration {iteration}: {what}{unchanged}{stored}")

    def save(self) -> None:
        """Write `last.pt`; the file before it becomes `previous.pt`. Neither name ever holds a truncated file.

        With several processes, all of them must call it; the first one writes. Sharded parameters are gathered on it,
        so the file does not depend on the strategy.

        Raises:
            TrainingError: a parameter is not finite; the file before stays.
        """
        if self.folder is None:
            raise ValueError("Trainer: save needs the folder that Trainer(folder=...) was not given")
        self._check_finite()
        self._check_finite_parameters()
        state = self.state_dict()
        if self.rank == 0:
            write_checkpoint(self.folder, state)
        self.fabric.barrier()

    def state_dict(self) -> State:
        """Return the contents of a checkpoint: entries "loss", "average" and "optimizer" with all parameters, and more.

        With several processes, all of them must call it. With "fsdp" only the first one receives the parameters.
        """
        return {
            "iteration": self.iteration,
            "options": self.options.that_decide_results(),
            "samples": len(self.minibatches.data),
            "processes": self.processes,
            "recent": [value.item() for value in self.recent],
            "loss scale": self.fabric.strategy.precision.state_dict(),
            **state_of(self.loss, self.average, self.optimizer.optimizer),
        }

    def _resume(self) -> None:
        assert self.folder is not None
        found = read_newest_checkpoint(self.folder)
        if found is None:
            return
        state, file = found
        self._check_same_run(state, file)
        try:
            with cpu_by_default():
                load_state(state, self.loss, self.average, self.optimizer.optimizer)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"Trainer: {file} belongs to another model: {error}") from error
        self.fabric.strategy.precision.load_state_dict(state["loss scale"])
        self.iteration = state["iteration"]
        self.recent[:] = [torch.tensor(value, device=self.fabric.device) for value in state["recent"]]

    def _check_same_run(self, state: State, file: Path) -> None:
        here = self._decide_results()
        there = {name: state[name] for name in ("samples", "processes")} | state["options"]
        changed = [
            f"{name} {there.get(name)!r} there, {value!r} here"
            for name, value in here.items()
            if there.get(name) != value
        ]
        if changed:
            raise ValueError(f"Trainer: {file} belongs to a run with other options: {'; '.join(changed)}")

    def _shared(self) -> dict[str, Any]:
        """Return what all processes must share, so that they end at the same numbers and wait for each other."""
        names = ("iterations", "checkpoint_every")
        more = {name: getattr(self.options, name) for name in names} | {"folder": self.folder is not None}
        return self._decide_results() | more | layout_of(self.loss)

    def _decide_results(self) -> dict[str, Any]:
        """Return what a resumed run must share with its checkpoint."""
        return {
            "samples": len(self.minibatches.data),
            "processes": self.processes,
            **self.options.that_decide_results(),
        }

    def _seed(self, index: int) -> int:
        seed = (self.options.seed * 0x9E3779B97F4A7C15 + index) % 2**63
        return int(seed)

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Seed torch's generators for the block, by iteration and process; those of CPU and CUDA are restored."""
        own = (self._seed(self.iteration) * self.processes + self.rank) % 2**63
        device = self.fabric.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(own)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(own)
            elif device.type == "mps":
                torch.mps.manual_seed(own)
            yield


class _Call(nn.Module):
    """Hide that a module is compiled: Fabric would compile it again, which fails unless it was imported first."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _without_compilation(loss: nn.Module) -> nn.Module:
    """Return the module inside of `torch.compile`, whose names of parameters are those of a checkpoint."""
    inner: nn.Module = getattr(loss, "_orig_mod", loss)
    return inner
