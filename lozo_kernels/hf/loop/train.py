"""The loop: a batch, a step, now and then an evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...errors import JournalError, NonFiniteLossError, require
from ...model.interrupts import deferred_interrupt, interruptible
from ...optim.parallel import DivergenceError, PeerLostError
from ...optim.steps import StepInfo
from ..objectives import Batch, Encoded, Objective
from ..settings import Settings
from .drivers import Driver, StepResult, ZerothOrder
from .measure import Stopwatch, peak_memory, since
from .processes import part
from .prospects import Prospects, Rising
from .records import EvalRecord, MetricsLog, StepRecord

MEASURED_STEPS = 2
"""Steps whose memory is measured: some optimisers make their state at the end of the first."""


@dataclasses.dataclass
class Outcome:
    """How the loop ended.

    Attributes:
        steps_done: steps taken.
        stopped: None if it ran to the end, else "interrupted" or the reason why it could not go on.
        peak_bytes: most memory alive at once in the first steps beyond the weights, with V, momentum and activations.
        measured_steps: how many steps that is of.
        seconds: duration with evaluations.
        backends: names of the backends that changed the weights.
        kept_step: steps after which the model had the weights that it has at the end.
        unended: why the journal got no end, if it did not. The model is whole all the same.
    """

    steps_done: int = 0
    stopped: str | None = None
    peak_bytes: int | None = None
    measured_steps: int = 0
    seconds: float = 0.0
    backends: list[str] = dataclasses.field(default_factory=list)
    kept_step: int = 0
    unended: Exception | None = None


class BatchSampler:
    """Batches of examples without end: each pass over the data in a new order, from a generator of its own."""

    def __init__(self, examples: Sequence[Encoded], size: int, seed: int) -> None:
        self.examples = examples
        self.size = size
        self._indices = _endless(len(examples), torch.Generator().manual_seed(seed))

    def next(self) -> list[Encoded]:
        return [self.examples[i] for i in itertools.islice(self._indices, self.size)]


def _endless(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu").tolist()


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, objective: Objective, examples: Sequence[Encoded], step: int, batch_size: int, device: torch.device
) -> EvalRecord:
    """Mean loss and accuracy over examples, after so many steps."""
    start = time.perf_counter()
    totals = [objective.totals(model, objective.collate(b, device)) for b in objective.batches(examples, batch_size)]
    loss = sum(float(t.loss) for t in totals) / sum(int(t.count) for t in totals)
    correct = [int(t.correct) for t in totals if t.correct is not None]
    asked = [t.examples for t in totals if t.correct is not None]
    return EvalRecord(step, loss, sum(correct) / sum(asked) if asked else None, len(examples), since(start))


def make_schedule(optimizer: torch.optim.Optimizer, name: str | None, steps: int) -> Any:
    """A learning-rate schedule over the run, or None for a constant rate."""
    factors = {"linear": lambda t: 1 - t / steps, "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t / steps))}
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors[name]) if name is not None and name in factors else None


def train(
    model: torch.nn.Module,
    make_driver: Callable[[], Driver],
    objective: Objective,
    sampler: BatchSampler,
    dev: Sequence[Encoded],
    log: MetricsLog,
    settings: Settings,
    device: torch.device,
    *,
    measured: Sequence[int] = (),
    quiet: bool = False,
    evaluated: Callable[[EvalRecord], None] | None = None,
) -> Outcome:
    """Runs the steps of the settings and leaves a plain model.

    After the first step, Ctrl-C and a loss that stays NaN end it early, with the weights of the last whole step.

    Args:
        dev: examples that are evaluated every ``settings.eval_every`` steps.
        measured: steps whose memory is measured, together with the making of the driver.
        evaluated: is given every evaluation while the model has the weights that were evaluated.
    """
    assert settings.steps is not None and settings.eval_every is not None
    outcome, start = Outcome(), time.perf_counter()
    with _progress_bar(settings, quiet) as bar, warnings.catch_warnings(), contextlib.ExitStack() as failing:
        # Skipped updates are in the log and on the bar, and torch cannot know that step() is called inside take().
        warnings.filterwarnings("ignore", message=".*update skipped|.*lr_scheduler.step", category=UserWarning)
        reader = _StepReader(log, bar, device)
        # The first step is measured together with the making of the driver, whose V and momentum are part of the peak.
        with peak_memory(device) as memory:
            driver = make_driver()
            failing.callback(_give_up, driver)
            reader.judges.append(Prospects(driver.scale, settings.steps))
            steps = _Steps(model, driver, objective, sampler, settings, reader)
            first = driver.steps_done
            bar.update(first)
            if first == 0:
                steps.take()
        outcome.peak_bytes, outcome.backends = memory.bytes, driver.backends
        outcome.measured_steps = int(first == 0 and 0 in measured)
        try:
            while driver.steps_done < settings.steps:
                if driver.steps_done % settings.eval_every == 0:
                    reader.flush()
                    evaluation = evaluate(model, objective, dev, driver.steps_done, eval_batch_size(settings), device)
                    log.add_evaluation(evaluation)
                    if evaluated is not None:
                        evaluated(evaluation)
                if driver.steps_done not in measured:
                    steps.take()
                    continue
                with peak_memory(device) as next_step:
                    steps.take()
                memory = memory.then(next_step)
                outcome.peak_bytes, outcome.measured_steps = memory.bytes, outcome.measured_steps + 1
        except KeyboardInterrupt:
            outcome.stopped = "interrupted"
        except (NonFiniteLossError, PeerLostError, DivergenceError) as e:
            outcome.stopped = str(e)
        failing.pop_all()
    try:
        driver.close()
    except (JournalError, OSError, RuntimeError, MemoryError) as e:  # the model is saved before this is said
        outcome.unended = e
    reader.flush()
    outcome.steps_done, outcome.seconds = driver.steps_done, since(start)
    return outcome


def _progress_bar(settings: Settings, quiet: bool) -> Any:
    tty = sys.stderr.isatty()
    return require("tqdm").tqdm(
        total=settings.steps,
        file=sys.stderr,
        disable=quiet,
        unit="step",
        mininterval=0.2 if tty else 10,
        dynamic_ncols=tty,
        desc=settings.method,
    )


@dataclasses.dataclass
class _Steps:
    """Takes the steps of a driver one after the other. A run that goes on sees the data and the rates that it would have seen."""

    model: torch.nn.Module
    driver: Driver
    objective: Objective
    sampler: BatchSampler
    settings: Settings
    reader: _StepReader

    def __post_init__(self) -> None:
        self.schedule = make_schedule(self.driver.optimizer, self.settings.lr_schedule, self.settings.steps or 0)
        for _ in range(self.driver.steps_done):
            self.sampler.next()
            self._advance()

    def take(self) -> None:
        """Takes one step and records it. Ctrl-C comes through only while the driver is at work."""
        rows = part(self.sampler.next(), self.settings.parallel)
        lr = self.driver.lr
        before = self.driver.info
        watch = Stopwatch(self.reader.device)
        with deferred_interrupt():
            watch.start("step")
            try:
                with interruptible():
                    self._step(rows, watch)
            finally:  # a step that was taken is logged, also when it is the one that ends the run
                watch.stop("step")
                if self.driver.info is not None and self.driver.info is not before:
                    self.reader.add(self.driver.info, lr, watch)
            self._advance()

    def _advance(self) -> None:
        if self.schedule is not None:
            self.schedule.step()

    def _step(self, rows: Sequence[Encoded], watch: Stopwatch) -> None:
        if isinstance(self.driver, ZerothOrder) and self.driver.batched:
            self.driver.step_together(watch.timed("forwards", functools.partial(self._losses, rows)), len(rows))
            return
        parts = self.driver.parts
        cuts = [len(rows) * i // parts for i in range(parts + 1)]
        batches = [self.objective.collate(rows[a:b], self.reader.device) for a, b in itertools.pairwise(cuts)]
        closures = [watch.timed("forwards", functools.partial(self._loss, batch)) for batch in batches]
        self.driver.step(closures if parts > 1 else closures[0])

    def _losses(self, rows: Sequence[Encoded], index: torch.Tensor) -> Any:
        batch = self.objective.collate([rows[i] for i in index.tolist()], self.reader.device)
        each = self.objective.losses(self.model, batch)
        return each.sums, each.counts

    def _loss(self, batch: Batch) -> Any:
        if self.settings.parallel is None:
            return self.objective.loss(self.model, batch)
        totals = self.objective.totals(self.model, batch)  # of this process's part
        return totals.loss, totals.count


def _give_up(driver: Driver) -> None:
    """Closes the driver after an error that ends the run: nobody else could release the journal's file and the patched model."""
    with contextlib.suppress(Exception):
        driver.close()


def eval_batch_size(settings: Settings) -> int:
    """Rows of a batch that is only evaluated: more than in training, as neither its time nor its memory is compared."""
    return max(32, settings.batch_size)


class _StepReader:
    """Turns what steps left on the device into records: at once on the CPU, every few steps elsewhere, since reading waits."""

    def __init__(self, log: MetricsLog, bar: Any, device: torch.device) -> None:
        self.device = device
        self._log = log
        self._bar = bar
        self.judges: list[Prospects | Rising] = [Rising()]
        self._every = 1 if device.type == "cpu" else 10
        self._waiting: list[tuple[StepInfo | StepResult, float, Stopwatch]] = []

    def add(self, info: StepInfo | StepResult, lr: float, watch: Stopwatch) -> None:
        self._waiting.append((info, lr, watch))
        if len(self._waiting) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting; an interrupt loses no step and writes none twice."""
        record = None
        while self._waiting:
            info, lr, watch = self._waiting.pop(0)
            record = StepRecord(
                step=info.step,
                loss=float(info.loss),
                c=info.c.tolist(),
                lr=lr,
                step_ms=1e3 * watch.seconds("step"),
                forwards_ms=1e3 * watch.seconds("forwards"),
                skipped=bool(info.skipped),
            )
            self._log.add_step(record)
            for judge in self.judges:
                judge.look(record)
            self._bar.update()
        if record is not None:
            values = {"loss": f"{record.loss:.4f}"}
            if record.c:
                values["c"] = f"{sum(record.c) / len(record.c):+.2e}"
            values |= {"ms/step": f"{record.step_ms:.1f}", "outside forwards": f"{record.outside:.0%}"}
            if self._log.skipped:
                values["skipped"] = str(self._log.skipped)
            self._bar.set_postfix(values, refresh=False)
