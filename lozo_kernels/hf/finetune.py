"""A whole run: data, model, evaluation, training, evaluation, reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..journal import JournalError
from ..model.files import unwritable, write_whole
from .loop.building import build_driver
from .loop.journaling import JOURNAL, Keeper, new_keeper, resumed_keeper
from .loop.kept_weights import KeptWeights
from .loop.measure import forward_peak
from .loop.processes import is_first, joined
from .loop.records import MetricsLog
from .loop.scoring import score
from .loop.train import Outcome, eval_batch_size, evaluate, train
from .models.checkpoint import load_model
from .models.pretrained import computing, first_line
from .output import make_folder, to_json
from .reports.beside_published import compare
from .reports.card import write_card
from .reports.plots import plot_losses
from .reports.summary import summarize
from .run import Run, open_run, threads
from .settings import Settings


def finetune(settings: Settings, *, command: str = "", quiet: bool = False, resume: bool = False) -> dict[str, Any]:
    """Runs the settings and leaves model, metrics, plot and summary in their output folder.

    Args:
        settings: resolved here.
        command: how this run was asked for, for the summary.
        quiet: no progress on stderr.
        resume: go on with the run in the output folder, whose settings these are (:func:`~.journaling.settings_of`). Its end is
            that of a run that was never stopped, in every bit.

    Returns:
        The summary, see :func:`lozo_kernels.hf.reports.summary.summarize`. Its "stopped" is None if all steps were taken.

    Raises:
        InputError: something that the user can put right, before any training.
        KeyboardInterrupt: before the first step; later ones end the training and everything is saved.
    """
    settings = settings.resolved()
    with joined(settings, resume) as own, threads(own.threads):
        try:
            return _run(own, command, quiet or not is_first(), resume)
        except JournalError as e:
            raise InputError(f"{e}; lozo-kernels finetune --resume {settings.output} goes on from there") from None
        except Exception as e:
            why = unwritable(e)
            if why is None:
                raise
            raise InputError(
                f"--output {own.output}: {why}; make room, and lozo-kernels finetune --resume {settings.output} goes on"
            ) from e


def _run(settings: Settings, command: str, quiet: bool, resume: bool) -> dict[str, Any]:
    run = open_run(settings, quiet=quiet)
    examples = f"{len(run.train_set)} train and {len(run.dev_set)} dev examples from {run.data.source}"
    output = _make_output(settings)
    keeper = new_keeper(output, settings, run.data, run.objective.name, run.train_set)
    if resume:
        keeper = resumed_keeper(keeper)
    else:
        keeper.path.unlink(missing_ok=True)
    model, notes = load_model(run.checkpoint, run.objective.name, run.data.task, settings, run.device)
    run.say(f"{run.data.task.name}: {examples}")
    for note in notes:
        run.say(note)
    first_batch = run.batches().next()
    batch = run.objective.collate(first_batch, run.device)
    with computing(run.checkpoint.path):
        forward_bytes = forward_peak(lambda: run.objective.loss(model, batch), run.device)
    comparison = None
    if settings.compare_steps:
        run.say(f"timing {settings.compare_steps} steps of the published way beside this library's, on copies of the model")
        comparison = compare(model, run.objective, first_batch, settings, run.device)
    log = MetricsLog(output / "metrics.jsonl", keeper.goes_on_at or 0)
    kept = KeptWeights(model, output, best=settings.keep == "best", earlier=log.evaluations)
    try:
        outcome, test = _train(run, model, keeper, log, kept)
    finally:
        log.close()
    summary = summarize(run, model, outcome, log, forward_bytes, comparison)
    summary |= {"notes": notes, "command": command, "output": str(output), "test": test, "kept_step": kept.step}
    if is_first():
        model.save_pretrained(output / "model")
        run.checkpoint.tokenizer.save_pretrained(output / "model")
        write_card(output / "model", summary, run.data.task.metrics)
        plot_losses(output / "loss.png", log, f"{run.data.task.name}, {settings.method}")
        if outcome.unended is not None:
            raise InputError(
                f"the model is saved in {output / 'model'}, but its journal has no end: {first_line(outcome.unended)}; "
                f"lozo-kernels finetune --resume {output} writes it"
            ) from outcome.unended
        write_whole(output / "summary.json", to_json(summary, indent=2) + "\n")  # last: where it is, all the rest is
        kept.discard()
    return summary


def _train(run: Run, model: Any, keeper: Keeper, log: MetricsLog, kept: KeptWeights) -> tuple[Outcome, dict[str, Any] | None]:
    """Trains between two evaluations; the scores on the test examples come with a run that took all its steps."""
    settings, objective, device = run.settings, run.objective, run.device
    batch_size = eval_batch_size(settings)
    if not log.evaluations:
        log.add_evaluation(evaluate(model, objective, run.dev_set, 0, batch_size, device))
    outcome = train(
        model,
        make_driver=lambda: keeper.attach(build_driver(model, settings)),
        objective=objective,
        sampler=run.batches(),
        dev=run.dev_set,
        log=log,
        settings=settings,
        device=device,
        quiet=run.quiet,
        evaluated=kept.offer,
    )
    if outcome.stopped is not None:
        return outcome, None
    evaluation = evaluate(model, objective, run.dev_set, outcome.steps_done, batch_size, device)
    log.add_evaluation(evaluation)
    kept.offer(evaluation)
    kept.load()
    if not run.data.test or not is_first():
        return outcome, None
    run.say(f"scoring {len(run.data.test)} test examples")
    return outcome, score(model, objective, run.data.test, batch_size, settings.max_new_tokens, device).to_dict()


def _make_output(settings: Settings) -> Path:
    """The folder of the results, made if it is not there; nothing in it is in the way of a result."""
    output = make_folder(Path(str(settings.output)))
    for name in ("metrics.jsonl", JOURNAL, "summary.json", "loss.png", "model"):
        if (output / name).exists() and (output / name).is_dir() != (name == "model"):
            kind = "a folder" if name == "model" else "a file"
            raise InputError(f"--output {output}: {name} is in the way, where {kind} of that name is to be written")
    try:
        (output / "metrics.jsonl").touch()
    except OSError as e:
        raise InputError(f"--output {output}: {e.strerror}") from None
    return output
