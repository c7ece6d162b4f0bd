"""The journal of a run of the command line: kept beside its results, and what a killed run goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError, require
from ...journal import Difference, Journal, JournalError, RecordedRun, Verification, diff, read_journal, replay, revert, verify
from ...journal.format import Header
from ..data.examples import TaskData
from ..models.checkpoint import pick_device
from ..models.load import load_model, open_checkpoint
from ..objectives import Encoded
from ..settings import Settings
from ..tasks import Task
from .drivers import Driver, ZerothOrder
from .records import StepRecord, read_metrics

NAME = "run.journal"
"""In the folder of a run."""


@dataclasses.dataclass(frozen=True)
class Keeper:
    """Keeps the journal of one run.

    Attributes:
        path: the file.
        about: what it says of the run.
        goes_on_at: steps that a run has that goes on; None for a new one.
    """

    path: Path
    about: dict[str, Any]
    goes_on_at: int | None = None

    def attach(self, driver: Driver) -> Driver:
        """Begins the journal of a zeroth-order driver, or brings it to where its run was. Other methods have none.

        Raises:
            InputError: the journal is of something else, or cannot be written.
        """
        if isinstance(driver, ZerothOrder):
            try:
                if self.goes_on_at is None:
                    Journal.create(self.path, driver.optimizer, about=self.about, overwrite=True)
                else:
                    Journal.resume(self.path, driver.optimizer, upto=self.goes_on_at)
            except JournalError as e:
                driver.close()
                raise InputError(str(e)) from None
        return driver


def new_keeper(settings: Settings, output: Path, data: TaskData, objective: str, encoded: list[Encoded]) -> Keeper:
    """For a run that begins."""
    task = {"name": data.task.name, "kind": data.task.kind, "labels": list(data.task.labels)}
    about = {"settings": settings.to_dict(), "objective": objective, "task": task, "data": _digest(data, encoded)}
    return Keeper(output / NAME, about)


def resumed_keeper(keeper: Keeper) -> Keeper:
    """For a run that goes on: after the last step that both its journal and its metrics have.

    Raises:
        InputError: the data are not those of the run, or it is done.
    """
    run = _read(keeper.path)
    if run.header.about.get("data") != keeper.about["data"]:
        raise InputError(f"--resume {keeper.path.parent}: the train examples are not those that the run had")
    wanted = keeper.about["settings"]["steps"]
    if run.fingerprint is not None and run.steps >= wanted and (keeper.path.parent / "summary.json").exists():
        raise InputError(f"--resume {keeper.path.parent}: the run has taken all of its {wanted} steps")
    logged = {record.step for _, record in read_metrics(keeper.path.parent / "metrics.jsonl") if isinstance(record, StepRecord)}
    whole = next((i for i in range(len(logged) + 1) if i not in logged), 0)
    return dataclasses.replace(keeper, goes_on_at=min(run.steps, whole))


def settings_of(folder: Path) -> Settings:
    """The settings of a run that was ended, from its journal.

    Raises:
        InputError: the folder has none.
    """
    if not (folder / NAME).is_file():
        raise InputError(
            f"--resume {folder}: there is no {NAME}; a run has one from its first step on, if its method is zeroth-order"
        )
    return dataclasses.replace(_settings(_read(folder / NAME).header, folder / NAME), output=str(folder))


def replay_run(model: str | None, journal: Path, output: Path, steps: int | None, *, reverting: bool = False) -> dict[str, Any]:
    """Writes the model that a run had after so many steps, from the model that it started from.

    Args:
        model: name on the Hub or a folder; None: that of the run.
        reverting: also write the journal up to there, so that the run can go on from it.

    Raises:
        InputError: the journal is damaged, of another model, or shorter.
    """
    run = _read(journal)
    _check_steps(run, steps)
    base, tokenizer = _load(model, run)
    _make_folder(output)
    try:
        done = revert(base, run, run.steps if steps is None else steps) if reverting else replay(base, run, steps)
    except (JournalError, ValueError) as e:
        raise InputError(str(e)) from None
    if done.agrees is False:
        raise InputError(f"{journal}: the replayed weights are not those with which the run ended; nothing was saved")
    base.save_pretrained(output / "model")
    if tokenizer is not None:
        tokenizer.save_pretrained(output / "model")
    if reverting:
        kept = len(run.until(done.steps))
        end = run.ends[kept - 1][0] if kept else run.start[0]
        (output / NAME).write_bytes(journal.read_bytes()[:end])
    return dataclasses.asdict(done) | {"output": str(output)}


def verify_run(model: str | None, journal: Path, tuned: Path | None, steps: int | None = None) -> Verification:
    """Replays so many steps of a run, or all, and compares with the tuned model in a folder.

    Raises:
        InputError: as :func:`replay_run`.
    """
    run = _read(journal)
    _check_steps(run, steps)
    base, _ = _load(model, run)
    other = None
    if tuned is not None:
        folder = tuned / "model" if (tuned / "model").is_dir() else tuned
        try:
            other = type(base).from_pretrained(folder, dtype=_dtype(run.header))
        except (OSError, ValueError) as e:
            raise InputError(f"--checkpoint {tuned}: {str(e).splitlines()[0]}") from None
    try:
        return verify(base, run, other, upto=steps, copied=False)
    except JournalError as e:
        raise InputError(str(e)) from None


def diff_runs(first: Path, second: Path) -> Difference | None:
    """The first difference of two journals, given as files or as folders of runs.

    Raises:
        InputError: one cannot be read.
    """
    return diff(_read(find_journal(first)), _read(find_journal(second)))


def find_journal(path: Path) -> Path:
    """A journal, given as itself or as the folder of its run."""
    return path / NAME if path.is_dir() else path


def _read(path: Path) -> RecordedRun:
    try:
        return read_journal(path)
    except JournalError as e:
        raise InputError(str(e)) from None


def _check_steps(run: RecordedRun, steps: int | None) -> None:
    if steps is not None and not 0 <= steps <= run.steps:
        raise InputError(f"--step {steps}: {run.source} has {run.steps} steps")


def _settings(header: Header, path: Path) -> Settings:
    try:
        return Settings(**header.about["settings"])
    except (KeyError, TypeError):
        raise InputError(f"{path} was not written by lozo-kernels finetune, so it does not say how to go on") from None


def _load(model: str | None, run: RecordedRun) -> tuple[Any, Any]:
    """The model that a run started from, and its tokenizer if there is one."""
    about = run.header.about
    if "settings" not in about:
        return _load_plain(model, run)
    settings = _settings(run.header, Path(run.source))
    settings = dataclasses.replace(settings, model=model or settings.model, device="cpu")
    checkpoint = open_checkpoint(settings)
    try:
        task = Task(about["task"]["name"], about["task"]["kind"], (), labels=tuple(about["task"]["labels"]))
        objective = str(about["objective"])
    except (KeyError, TypeError):
        raise InputError(f"{run.source} does not say which model it is of") from None
    base, _ = load_model(checkpoint, objective, task, settings, pick_device("cpu"))
    return base, checkpoint.tokenizer


def _load_plain(model: str | None, run: RecordedRun) -> tuple[Any, Any]:
    """Of a journal that says nothing of its model: the class that the folder names, in the dtype of the journal."""
    if model is None:
        raise InputError("--model: give the model that the run started from, which the journal does not name")
    transformers = require("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        kind = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
        base = kind.from_pretrained(model, dtype=_dtype(run.header)).eval()
    except (OSError, ValueError, AttributeError) as e:
        raise InputError(f"--model {model}: {str(e).splitlines()[0]}") from None
    try:
        return base, transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return base, None


def _dtype(header: Header) -> torch.dtype:
    """Of the first parameter."""
    dtype = getattr(torch, header.parameters[0].dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"weights of {header.parameters[0].dtype} cannot be loaded from a folder")
    return dtype


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--output {output}: {e.strerror}") from None


def _digest(data: TaskData, encoded: list[Encoded]) -> str | None:
    """Of the train examples as the model sees them; None for images, which are read when they are needed."""
    if data.task.kind == "image":
        return None
    return hashlib.blake2b(json.dumps([repr(e) for e in encoded]).encode(), digest_size=16).hexdigest()
