"""A whole run: data, model, evaluation, training, evaluation, reports."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..journal import JournalError
from ..model.files import replacing_folder, unwritable, write_whole
from ..model.interrupts import deferred_interrupt
from .loop.building import measure_eps
from .loop.folder import METRICS, MODEL, PLOT, SUMMARY, begin, claimed, find_run
from .loop.journaling import new_keeper, resumed_keeper
from .loop.kept_weights import KeptWeights
from .loop.processes import first_does, is_first, joined, own_folder
from .loop.records import MetricsLog
from .loop.scoring import check_examples
from .loop.train import train
from .measure import inference_peaks
from .models.checkpoint import load_model
from .models.hub import push
from .models.pretrained import computing, first_line
from .output import to_json
from .reports.beside_published import compare
from .reports.card import write_card
from .reports.plots import plot_losses
from .reports.summary import summarize
from .run import Run, open_run, threads
from .settings import Settings


def finetune(
    settings: Settings,
    *,
    command: str = "",
    quiet: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Runs the settings and leaves model, metrics, plot and summary in their output folder, which is this run's alone meanwhile.

    Args:
        settings: resolved here. Without an output, the folder is runs/TASK-METHOD, or the first of runs/TASK-METHOD-2, -3, ...
            where no run is.
        command: how this run was asked for, for the summary.
        quiet: no progress on stderr.
        resume: go on with the run in the output folder, whose settings these are (:func:`~.journaling.settings_of`). Its end is
            that of a run that was never stopped, in every bit.
        overwrite: replace the run that is in the output folder, once model and data of this one were read.
        callbacks: of the Trainer of transformers, which takes the steps.

    Returns:
        The summary, see :func:`lozo_kernels.hf.reports.summary.summarize`. Its "stopped" is None if all steps were taken.

    Raises:
        InputError: something that the user can put right, before any training; the folder is in use, or another run is in it.
        KeyboardInterrupt: before the first step, or once everything is saved; its message says what the folder holds. Between
            them it ends the training and everything is saved.
    """
    numbered, settings = settings.output is None, settings.resolved()
    inputs = (settings.model, settings.train_file, settings.dev_file, settings.data_dir)
    options = {"inputs": inputs, "going_on": resume, "overwrite": overwrite, "numbered": numbered and not resume}
    with joined(settings) as own, threads(own.threads), contextlib.ExitStack() as stack:
        shared = first_does(lambda: stack.enter_context(claimed(Path(str(settings.output)), **options)))  # type: ignore[arg-type]
        folder = stack.enter_context(own_folder(shared, copied=resume))
        try:
            return _run(dataclasses.replace(own, output=str(folder)), command, quiet or not is_first(), resume, callbacks)
        except JournalError as e:
            raise InputError(f"{e}; lozo-kernels finetune --resume {shared} goes on from there") from None
        except KeyboardInterrupt:
            found = find_run(shared)
            raise KeyboardInterrupt(f"{shared} {found}" if found else "") from None
        except Exception as e:
            why = unwritable(e)
            if why is None:
                raise
            raise InputError(f"--output {own.output}: {why}; make room, and lozo-kernels finetune --resume {shared} goes on") from e


def _run(settings: Settings, command: str, quiet: bool, resume: bool, callbacks: Sequence[Any]) -> dict[str, Any]:
    run, output = open_run(settings, quiet=quiet), Path(str(settings.output))
    settings = run.settings
    if run.data.test:
        check_examples(run.objective, run.data.test, settings.max_new_tokens)
    keeper = new_keeper(run, output)
    if resume:
        keeper = resumed_keeper(keeper)
    model, notes = load_model(run.checkpoint, run.objective.name, run.data.task, settings, run.device)
    if settings.find_eps:
        batch = run.objective.collate(run.batches_of([0])[0], run.device)
        eps = measure_eps(model, settings, lambda: run.objective.loss(model, batch))
        settings = dataclasses.replace(settings, eps=eps, find_eps=False)  # a run that goes on has this one
        run, keeper.about["settings"] = dataclasses.replace(run, settings=settings), settings.recorded()
        notes = [*notes, f"eps {eps:.2g} was measured"]
    notes = [*notes, *run.notes()]
    for line in (*run.describe(), *notes):
        run.say(line)
    measured = run.batches_of(run.measured_steps(keeper.goes_on_at or 0))
    with computing(run.checkpoint.path):
        inference = inference_peaks(run.objective, model, measured, run.device)
    comparison = None
    if settings.compare_steps and measured:
        run.say(f"timing {settings.compare_steps} steps of the published way beside this library's, on copies of the model")
        comparison = compare(model, run.objective, measured, settings, run.device)
        gc.collect()  # or the copies would be freed while the memory of steps is measured
    begin(output, going_on=resume, extended=keeper.extended)
    log = MetricsLog(output / METRICS, keeper.goes_on_at or 0)
    kept = KeptWeights(model, output, best=settings.keep == "best", earlier=log.evaluations)
    kept.complete(lambda step: keeper.model_after(model, step))
    try:
        outcome = train(run, model, keeper, log, kept, callbacks)
    finally:
        log.close()
    summary = summarize(run, model, outcome, log, inference, comparison)
    notes = [*notes, *([kept.note] if kept.note else [])]
    summary |= {"notes": notes, "command": command, "output": str(output), "test": outcome.test, "kept_step": outcome.kept_step}
    if is_first():
        with deferred_interrupt():
            _save(run, model, summary, log, output, outcome.unended)
            if outcome.stopped is None:
                kept.discard()
        if outcome.stopped is None and settings.push_to_hub is not None:
            push(output / MODEL, settings.push_to_hub)
    return summary


def _save(run: Run, model: Any, summary: dict[str, Any], log: MetricsLog, output: Path, unended: Exception | None) -> None:
    """Each result under another name first. The summary comes last: where it is, all the rest is whole.

    Raises:
        InputError: the journal has no end, for the reason ``unended``; all but the summary is saved.
    """
    with replacing_folder(output / MODEL) as folder:
        model.save_pretrained(folder)
        run.checkpoint.tokenizer.save_pretrained(folder)
        write_card(folder, summary, run.data.task.metrics)
    plot_losses(output / PLOT, log, f"{run.data.task.name}, {run.settings.method}")
    if unended is not None:
        raise InputError(
            f"the model is saved in {output / MODEL}, but its journal has no end: {first_line(unended)}; "
            f"lozo-kernels finetune --resume {output} writes it"
        ) from unended
    write_whole(output / SUMMARY, to_json(summary, indent=2) + "\n")
