"""The training of a run: by the Trainer of transformers, between the making of its driver and a plain model that is scored."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from ...errors import JournalError, require
from ...model.interrupts import deferred_interrupt
from ..measure import peak_memory, since
from ..run import Run
from ..settings import Settings
from ..trainer.prospects import judges_of
from .building import build_driver
from .drivers import backends_of
from .journaling import Keeper
from .kept_weights import KeptWeights
from .processes import is_first
from .reading import StepReader
from .records import MetricsLog
from .scoring import score


@dataclasses.dataclass
class Outcome:
    """How training ended.

    Attributes:
        steps_done: steps taken.
        stopped: None if it ran to the end, else "interrupted" or the reason why it could not go on.
        peak_bytes: most memory alive at once in the first steps beyond the weights, with V, momentum and activations.
        measured_steps: how many steps that is of.
        seconds: duration of the steps, with the evaluations between them.
        backends: names of the backends that changed the weights.
        kept_step: steps after which the model had the weights that it has at the end.
        unended: why the journal got no end, if it did not. The model is whole all the same.
        test: scores on the test examples, of a run that took all its steps.
    """

    steps_done: int
    stopped: str | None
    peak_bytes: int | None
    measured_steps: int
    seconds: float
    backends: list[str]
    kept_step: int
    unended: Exception | None = None
    test: dict[str, Any] | None = None


def train(run: Run, model: Any, keeper: Keeper, log: MetricsLog, kept: KeptWeights, callbacks: Sequence[Any] = ()) -> Outcome:
    """Trains the model between two evaluations, and leaves it plain.

    After the first step, Ctrl-C and a loss that stays NaN end the steps early, with the weights of the last whole one. Ctrl-C after
    the last step leaves out what is not scored yet.

    Args:
        keeper: begins the journal, or brings the model to where the journal ends.
        kept: is offered the model at every evaluation.
        callbacks: of transformers' Trainer.
    """
    if not log.evaluations:
        log.add_evaluation(run.evaluate(model, 0))
    outcome, trainer = _take_steps(run, model, keeper, log, kept, callbacks)
    if outcome.stopped is not None:
        return outcome
    try:
        trainer.evaluate_now()
        with deferred_interrupt():
            outcome.kept_step = kept.load(outcome.steps_done)
        if run.data.test and is_first():
            run.say(f"scoring {len(run.data.test)} test examples")
            most = run.settings.max_new_tokens
            outcome.test = score(model, run.objective, run.data.test, run.eval_batch_size, most, run.device).to_dict()
    except KeyboardInterrupt:
        outcome.stopped = "interrupted"
    return outcome


def _take_steps(
    run: Run, model: Any, keeper: Keeper, log: MetricsLog, kept: KeptWeights, callbacks: Sequence[Any]
) -> tuple[Outcome, Any]:
    from .trainer import RunTrainer  # the Trainer needs accelerate, which evaluations do without

    settings, start, unended = run.settings, time.perf_counter(), None
    with _progress_bar(settings, run.quiet) as bar, warnings.catch_warnings():
        # Skipped updates are in the log and on the bar, and torch cannot know that the driver takes the steps.
        warnings.filterwarnings("ignore", message=".*update skipped|.*lr_scheduler.step", category=UserWarning)
        with peak_memory(run.device) as memory:  # V and momentum are part of the peak
            driver = keeper.attach(build_driver(model, settings))
        try:
            judges = judges_of(driver, settings.steps or 0, "--lr", "Leave --lr out, or give a larger one")
            reader = StepReader(log, bar, run.device, judges)
            bar.update(driver.steps_done)
            trainer = RunTrainer(run, model, driver, reader, kept, memory, callbacks)
            stopped = trainer.run_steps()
        except BaseException:
            with contextlib.suppress(Exception):  # nobody else could release the journal's file and the patched model
                driver.close()
            raise
    backends = backends_of(driver)
    try:
        driver.close()
    except (JournalError, OSError, RuntimeError, MemoryError) as e:  # the model is saved before this is said
        unended = e
    reader.flush()
    steps, peak, seconds = driver.steps_done, trainer.memory.bytes, since(start)
    return Outcome(steps, stopped, peak, trainer.measured_steps, seconds, backends, steps, unended), trainer


def _progress_bar(settings: Settings, quiet: bool) -> Any:
    tty = sys.stderr.isatty()
    options = {"mininterval": 0.2 if tty else 10, "dynamic_ncols": tty, "desc": settings.method}
    return require("tqdm").tqdm(total=settings.steps, file=sys.stderr, disable=quiet, unit="step", **options)
