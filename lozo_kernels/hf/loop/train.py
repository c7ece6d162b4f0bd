"""The training of a run: by the Trainer of transformers, between the making of its driver and a plain model."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...errors import InputError, JournalError, NonFiniteLossError, require
from ...optim.parallel import DivergenceError, PeerLostError
from ..models.pretrained import first_line
from ..objectives import Encoded, Objective
from ..settings import Settings
from .drivers import Driver
from .measure import peak_memory, since
from .prospects import Prospects
from .reading import StepReader
from .records import EvalRecord, MetricsLog

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
        tell: gives an evaluation to reports and callbacks.
    """

    steps_done: int = 0
    stopped: str | None = None
    peak_bytes: int | None = None
    measured_steps: int = 0
    seconds: float = 0.0
    backends: list[str] = dataclasses.field(default_factory=list)
    kept_step: int = 0
    unended: Exception | None = None
    tell: Callable[[EvalRecord], object] = id


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


def make_schedule(optimizer: torch.optim.Optimizer, settings: Settings) -> Any:
    """The learning-rate schedule of a run: of transformers, but for the two of which journals have the rates in these bits.

    Raises:
        InputError: the schedule does not take the options that it was given.
    """
    name, steps = settings.lr_schedule or "constant", settings.steps or 0
    warmup, options = settings.warmup(steps), settings.schedule_options
    factors = {"linear": lambda t: 1 - t / steps, "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t / steps))}
    if name in factors and not (warmup or options):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factors[name])
    if name == "constant" and warmup:
        name = "constant_with_warmup"
    try:
        return require("transformers").get_scheduler(name, optimizer, warmup, steps, options)
    except (TypeError, ValueError) as e:
        raise InputError(f"--lr-schedule {name}: {first_line(e)}; --lr-scheduler-kwargs has its options") from None


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
    tokenizer: Any = None,
    callbacks: Sequence[Any] = (),
) -> Outcome:
    """Runs the steps of the settings and leaves a plain model.

    After the first step, Ctrl-C and a loss that stays NaN end it early, with the weights of the last whole step.

    Args:
        dev: examples that are evaluated every ``settings.eval_every`` steps.
        measured: steps whose memory is measured, together with the making of the driver.
        evaluated: is given every evaluation while the model has the weights that were evaluated.
        tokenizer: is saved with checkpoints.
        callbacks: of transformers' Trainer.
    """
    assert settings.steps is not None and settings.eval_every is not None
    from .trainer import RunTrainer  # the Trainer needs accelerate, which evaluations do without

    outcome, start = Outcome(), time.perf_counter()

    def evaluate_now() -> EvalRecord:
        record = evaluate(model, objective, dev, driver.steps_done, eval_batch_size(settings), device)
        log.add_evaluation(record)
        if evaluated is not None:
            evaluated(record)
        return record

    with _progress_bar(settings, quiet) as bar, warnings.catch_warnings(), contextlib.ExitStack() as failing:
        # Skipped updates are in the log and on the bar, and torch cannot know that the driver takes the steps.
        warnings.filterwarnings("ignore", message=".*update skipped|.*lr_scheduler.step", category=UserWarning)
        reader = StepReader(log, bar, device)
        with peak_memory(device) as memory:  # V and momentum are part of the peak
            driver = make_driver()
        failing.callback(_give_up, driver)
        reader.judges.append(Prospects(driver.scale, settings.steps))
        bar.update(driver.steps_done)
        trainer = RunTrainer(
            *(model, driver, settings, objective, sampler, reader),
            evaluate=evaluate_now,
            schedule=lambda optimizer: make_schedule(optimizer, settings),
            memory=memory,
            measured=measured,
            tokenizer=tokenizer,
            callbacks=callbacks,
        )
        outcome.tell = trainer.tell
        try:
            if driver.steps_done < settings.steps:
                trainer.train()
                if driver.steps_done < settings.steps:
                    outcome.stopped = "a callback ended the training"
        except (KeyboardInterrupt, NonFiniteLossError, PeerLostError, DivergenceError) as e:
            if driver.steps_done == 0:
                raise
            outcome.stopped = "interrupted" if isinstance(e, KeyboardInterrupt) else str(e)
            trainer.end()
        failing.pop_all()
    outcome.peak_bytes, outcome.measured_steps, outcome.backends = trainer.memory.bytes, trainer.measured_steps, driver.backends
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


def _give_up(driver: Driver) -> None:
    """Closes the driver after an error that ends the run: nobody else could release the journal's file and the patched model."""
    with contextlib.suppress(Exception):
        driver.close()


def eval_batch_size(settings: Settings) -> int:
    """Rows of a batch that is only evaluated: more than in training, as neither its time nor its memory is compared."""
    return max(32, settings.batch_size)
