"""What the journal of a run is good for: its model is made again, taken back to an earlier step, or verified."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, require
from ..journal import RecordedRun, Verification, replay, revert, verify
from ..journal.format import Header
from ..model.files import replacing, replacing_folder, write_whole
from .loop.folder import JOURNAL, METRICS, MODEL, SUMMARY, begin, claimed, read_saved
from .loop.journaling import find_journal, read_run_journal, recorded_settings
from .loop.records import read_metrics
from .models.adapters import load_adapter
from .models.checkpoint import load_model, open_checkpoint
from .models.pretrained import open_config, read_pretrained
from .objectives import OBJECTIVES
from .tasks import Task


def replay_run(
    model: str | None,
    journal: Path,
    output: Path,
    steps: int | None,
    *,
    reverting: bool = False,
    overwrite: bool = False,
    trusted: bool = False,
) -> dict[str, Any]:
    """Writes the model that a run had after so many steps, from the model that it started from.

    Args:
        model: name on the Hub or a folder; None: that of the run.
        journal: the file, or the folder of its run.
        reverting: also write the journal and the metrics up to there, so that the run can go on from it.
        overwrite: replace the run or the model that is in the output folder.
        trusted: run Python code that comes with the model.

    Raises:
        InputError, JournalError: the journal is damaged, of another model, or shorter; the output folder is in use, holds a run or
            a model, or is that of the journal or the model.
    """
    run = _read(journal, steps)
    settings = run.header.about.get("settings")
    base_name = model or (settings.get("model") if isinstance(settings, dict) else None)
    with claimed(output, inputs=(base_name, str(find_journal(journal))), overwrite=overwrite):
        base, tokenizer = _load(model, run, trusted)
        done = revert(base, run, run.steps if steps is None else steps) if reverting else replay(base, run, steps)
        if done.agrees is False:
            raise InputError(f"{run.source}: the replayed weights are not those with which the run ended; nothing was saved")
        begin(output, going_on=False)
        with replacing_folder(output / MODEL) as folder:
            base.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        if reverting:
            kept = len(run.until(done.steps))
            end = run.ends[kept - 1][0] if kept else run.start[0]
            with replacing(output / JOURNAL) as part:
                part.write_bytes(find_journal(journal).read_bytes()[:end])
            logged = [line for line, record in read_metrics(find_journal(journal).with_name(METRICS)) if record.step < done.steps]
            if logged:
                write_whole(output / METRICS, "".join(line + "\n" for line in logged))
    return dataclasses.asdict(done) | {"output": str(output)}


def verify_run(
    model: str | None, journal: Path, tuned: Path | None, steps: int | None = None, *, trusted: bool = False
) -> Verification:
    """Replays so many steps of a run and compares with the tuned model in a folder.

    Args:
        tuned: a model, or the folder of a run.
        steps: None: as many as the model of a run had, which with ``--keep best`` are not all; otherwise all.

    Raises:
        InputError, JournalError: as :func:`replay_run`.
    """
    run = _read(journal, steps)
    kept = read_saved(tuned / SUMMARY).get("kept_step") if tuned is not None and steps is None else None
    steps = kept if isinstance(kept, int) and 0 <= kept < run.steps else steps
    base, _ = _load(model, run, trusted)
    other = None
    if tuned is not None:
        folder = tuned / "model" if (tuned / "model").is_dir() else tuned
        dtype = _dtype(run.header)
        if (folder / "adapter_config.json").is_file():
            other = load_adapter(_load(model, run, trusted, peft=False)[0], folder)
        else:
            other = read_pretrained(type(base), str(folder), "weights", trusted=trusted, option="--checkpoint", dtype=dtype)
    return verify(base, run, other, upto=steps, copied=False)


def _read(journal: Path, steps: int | None) -> RecordedRun:
    run = read_run_journal(journal)
    if steps is not None and not 0 <= steps <= run.steps:
        raise InputError(f"--step {steps}: {run.source} has {run.steps} steps")
    return run


def _load(model: str | None, run: RecordedRun, trusted: bool, *, peft: bool = True) -> tuple[Any, Any]:
    """The model that a run started from, without the adapters that it may have had if not ``peft``, and its tokenizer if there is
    one."""
    about = run.header.about
    if "settings" not in about:
        return _load_plain(model, run, trusted)
    settings = recorded_settings(run)
    settings = dataclasses.replace(settings, model=model or settings.model, trust_remote_code=trusted)
    settings = dataclasses.replace(settings, peft=settings.peft and peft)
    task, objective = _recorded_task(run)
    checkpoint = open_checkpoint(settings)
    base, _ = load_model(checkpoint, objective, task, settings, torch.device("cpu"))
    return base, checkpoint.tokenizer


def _recorded_task(run: RecordedRun) -> tuple[Task, str]:
    """The task that a journal records, as far as a model depends on it, and the objective's name."""
    about = run.header.about
    try:
        task, objective = about["task"], OBJECTIVES[about["objective"]].name
        words = [task["name"], task["kind"], *task["labels"]]
        if not isinstance(task["labels"], list) or not all(isinstance(word, str) for word in words):
            raise TypeError
    except (KeyError, TypeError):
        raise InputError(f"{run.source} does not say which model it is of") from None
    return Task(task["name"], task["kind"], (), labels=tuple(task["labels"])), objective


def _load_plain(model: str | None, run: RecordedRun, trusted: bool) -> tuple[Any, Any]:
    """The model for a journal that does not name one: of the class that its folder names, in the dtype of the journal."""
    if model is None:
        raise InputError("--model: give the model that the run started from, which the journal does not name")
    transformers = require("transformers")
    config = open_config(model, trusted=trusted)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        kind = transformers.AutoModelForCausalLM
    base = read_pretrained(kind, model, "weights", trusted=trusted, dtype=_dtype(run.header)).eval()
    try:
        return base, transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=trusted)
    except Exception:  # a model without a tokenizer, or with one that is of no use, is a model still
        return base, None


def _dtype(header: Header) -> torch.dtype:
    """The dtype of the first parameter."""
    dtype = getattr(torch, header.parameters[0].dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"weights of {header.parameters[0].dtype} cannot be loaded from a folder")
    return dtype
