"""The Trainer of a run of the command line: :class:`ZOTrainer` around a driver, which takes whole steps."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import DivergenceError, InputError, NonFiniteLossError, PeerLostError, require
from ...model.interrupts import deferred_interrupt, interruptible
from ...optim.optimizer import ZerothOrderOptimizer
from ..measure import PeakMemory, Stopwatch, peak_memory
from ..models.pretrained import in_one_line
from ..objectives import Batch, Encoded
from ..run import Run
from ..settings import Settings
from ..trainer.arguments import ZOArguments
from ..trainer.trainer import ZOTrainer
from .building import make_schedule
from .drivers import Driver
from .kept_weights import KeptWeights
from .processes import part
from .reading import StepReader
from .records import EvalRecord

TrainerCallback = require("transformers").TrainerCallback


@dataclasses.dataclass
class RunArguments(ZOArguments):
    """The Trainer's arguments of a run, whose method was checked with the settings of the run."""

    def _check_method(self) -> None:
        """The driver has the method and its rate."""


def make_arguments(settings: Settings, device: torch.device, first: int) -> RunArguments:
    """The Trainer's arguments that resolved settings mean.

    Args:
        first: the step that is taken next. A run that goes on from where it was evaluated is evaluated there again.

    Raises:
        ImportError, RuntimeError, TypeError, ValueError: the Trainer does not take them.
    """
    assert settings.eval_every is not None
    args = RunArguments(
        output_dir=str(settings.output),
        run_name=Path(str(settings.output)).name,
        method=settings.method,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.lr or 0.0,
        weight_decay=settings.weight_decay,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        eval_on_start=first > 0 and first % settings.eval_every == 0,
        save_strategy="no" if settings.save_steps is None else "steps",
        save_steps=settings.save_steps or 1,
        save_total_limit=settings.save_total_limit,
        save_only_model=True,  # a run goes on by its journal
        logging_strategy="no",  # see RunTrainer.report
        report_to=settings.reports or "none",
        seed=settings.seed % 2**32,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # noqa: SLF001  (the model stays on the device where it is)
    return args


class RunTrainer(ZOTrainer):
    """Takes the steps of a driver. Evaluations, checkpoints, schedules, reports and callbacks are the Trainer's.

    A driver's step is not one that ``backward()`` could take: updates wait for the next pass over the weights, evaluations share a
    forward pass, and examples have directions of their own. So batches are kept until the Trainer's optimiser is asked for a step,
    which is the driver's.

    Args:
        reader: is given what steps saw.
        kept: is offered the model at every evaluation.
        memory: peak of what was made for the run so far.
        callbacks: of the user.

    Raises:
        InputError: the Trainer does not take the settings, or a report needs a package that is not installed.
    """

    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        driver: Driver,
        reader: StepReader,
        kept: KeptWeights,
        memory: PeakMemory,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.run, self.driver, self.reader, self.kept, self.memory = run, driver, reader, kept, memory
        self.first, self.measured_steps, self._reported = driver.steps_done, 0, len(reader.log.steps)
        self._measured = run.measured_steps(self.first)
        self._batches: list[Sequence[Encoded]] = []
        config: Any = getattr(model, "config", None)
        threads, cache = torch.get_num_threads(), getattr(config, "use_cache", None)
        try:
            args = make_arguments(run.settings, run.device, self.first)
            super().__init__(model, args, eval_dataset=[()], callbacks=[_Following(self), *callbacks])
        except (ImportError, RuntimeError, TypeError, ValueError) as e:
            raise InputError(f"the Trainer of transformers does not take these settings: {in_one_line(e)}") from None
        if cache is not None:  # the configuration is saved with the model
            config.use_cache = cache
        torch.set_num_threads(threads)  # accelerate sets it where several processes share a machine
        self.remove_callback(require("transformers").PrinterCallback)
        # What processes share is the driver's business, and the groups of the optimiser are those of the driver's.
        self.accelerator.prepare_model = self.accelerator.prepare_optimizer = lambda prepared, **_: prepared

    def run_steps(self) -> str | None:
        """Takes the steps that are left. Returns why some still are, if at least one was taken; None if none is."""
        try:
            if self.driver.steps_done < self.args.max_steps:
                self.train()
        except (KeyboardInterrupt, NonFiniteLossError, PeerLostError, DivergenceError) as e:
            if self.driver.steps_done == 0:
                raise
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            return "interrupted" if isinstance(e, KeyboardInterrupt) else str(e)
        return "a callback ended the training" if self.driver.steps_done < self.args.max_steps else None

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """It is where it belongs."""

    def get_train_dataloader(self) -> Iterator[Sequence[Encoded]]:  # type: ignore[override]
        """The batches from the first that is to come on: a run that goes on sees the data that it would have seen."""
        return itertools.islice(self.run.batches(), self.first * self.args.gradient_accumulation_steps, None)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:  # noqa: ARG002
        self.optimizer = _Steps(self.driver, self._take_kept)
        self.zo_optimizer = self.driver if isinstance(self.driver, ZerothOrderOptimizer) else None
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:  # noqa: ARG002
        self.lr_scheduler = make_schedule(self.driver, self.run.settings)
        for _ in range(self.first):
            self.lr_scheduler.step()
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:  # noqa: ARG002
        """Keeps a batch. Losses are in the records."""
        self._batches.append(inputs)
        return torch.zeros((), dtype=torch.float32, device=self.args.device)

    def _take_kept(self) -> None:
        """Takes the step of the batches that were kept."""
        batches, self._batches = self._batches, []
        step = self.driver.steps_done
        if step and step not in self._measured:
            self.take(batches)
            return
        with peak_memory(self.run.device) as memory:
            self.take(batches)
        self.memory = self.memory.then(memory)
        self.measured_steps += step in self._measured

    def take(self, batches: Sequence[Sequence[Encoded]]) -> None:
        """Takes one step and records it. Ctrl-C comes through only while the driver is at work."""
        rows = [part(batch, self.run.settings.parallel) for batch in batches]
        lr, before = float(self.driver.learning_rates[0]), self.driver.info
        watch = Stopwatch(self.run.device)
        with deferred_interrupt():
            watch.start("step")
            try:
                with interruptible():
                    self._step(rows, watch)
            finally:  # a step that was taken is logged, also when it is the one that ends the run
                watch.stop("step")
                if self.driver.info is not None and self.driver.info is not before:
                    self.reader.add(self.driver.info, lr, watch)

    def _step(self, batches: Sequence[Sequence[Encoded]], watch: Stopwatch) -> None:
        if self.driver.by_example:
            closures = [watch.timed("forwards", functools.partial(self._losses, rows)) for rows in batches]
            self.driver.step(closures, [torch.arange(len(rows), dtype=torch.int64, device="cpu") for rows in batches])
            return
        parts = self.driver.parts_next if len(batches) == 1 else 1
        closures = []
        for rows in batches:
            cuts = [len(rows) * i // parts for i in range(parts + 1)]
            for a, b in itertools.pairwise(cuts):
                batch = self.run.objective.collate(rows[a:b], self.run.device)
                closures.append(watch.timed("forwards", functools.partial(self._loss, batch)))
        self.driver.step(closures)

    def _losses(self, rows: Sequence[Encoded], index: torch.Tensor) -> Any:
        batch = self.run.objective.collate([rows[i] for i in index.tolist()], self.run.device)
        each = self.run.objective.losses(self.model, batch)
        return each.sums, each.counts

    def _loss(self, batch: Batch) -> Any:
        if self.run.settings.parallel is None:
            return self.run.objective.loss(self.model, batch)
        totals = self.run.objective.totals(self.model, batch)  # of this process's part
        return totals.loss, totals.count

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluates between steps. After the last one the run does, once the driver has left a plain model."""
        return {} if self.driver.steps_done == self.run.settings.steps else self.evaluate_now()

    def evaluate_now(self) -> dict[str, float]:
        """Evaluates the model as it is, and says what it scored to everybody who asked for it."""
        self.reader.flush()
        record = self.run.evaluate(self.model, self.driver.steps_done)
        with deferred_interrupt():
            self.reader.log.add_evaluation(record)
            self.kept.offer(record)
            return self.tell(record)

    def tell(self, record: EvalRecord) -> dict[str, float]:
        """Gives an evaluation to reports and callbacks, which know it by the Trainer's names."""
        metrics = {"eval_loss": record.loss} | ({} if record.accuracy is None else {"eval_accuracy": record.accuracy})
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def report(self) -> None:
        """Gives the steps since the last report to reports and callbacks."""
        self.reader.flush()
        new = self.reader.log.steps[self._reported :]
        losses = [record.loss for record in new if math.isfinite(record.loss)]
        self.log({"loss": statistics.fmean(losses) if losses else math.nan, "learning_rate": new[-1].lr})
        self._reported += len(new)

    def _drain_times(self) -> dict[str, float]:
        new = self.reader.log.steps[self._reported :]
        step, forwards = (statistics.fmean(getattr(record, name) for record in new) for name in ("step_ms", "forwards_ms"))
        return {"step_ms": step, "forwards_ms": forwards, "weights_ms": step - forwards}

    def save_model(self, output_dir: str | None = None, *more: Any, **named: Any) -> None:
        """Saves a checkpoint with the tokenizer, so that it can be loaded by itself."""
        super().save_model(output_dir, *more, **named)
        if self.args.should_save:
            self.run.checkpoint.tokenizer.save_pretrained(output_dir or self.args.output_dir)


class _Steps(torch.optim.Optimizer):
    """What the Trainer holds: the groups of the driver's optimiser, and the driver's steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, take: Callable[[], None]) -> None:
        super().__init__([torch.zeros((), dtype=torch.float32, device="cpu")], {"lr": 0.0})
        self.param_groups, self._take = optimizer.param_groups, take

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        self._take()


class _Following(TrainerCallback):  # type: ignore[misc, valid-type]
    """Has the Trainer begin where the driver is, count epochs of the data, and report."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        trainer = self.trainer
        state.global_step = first = trainer.first
        if trainer.zo_optimizer is not None and args.save_strategy != "no" and first % args.save_steps == 0:
            trainer.zo_optimizer.flush()  # as the checkpoint there did, if the run goes on from one
        if not first:
            for record in trainer.reader.log.evaluations:
                trainer.tell(record)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        trainer = self.trainer
        examples = state.global_step * args.gradient_accumulation_steps * args.per_device_train_batch_size
        state.epoch = examples / len(trainer.run.train_set)
        if state.global_step % trainer.run.settings.logging_steps == 0:
            trainer.report()
