"""The journal of a run of the command line: kept beside its results, and what a killed run goes on from."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ...errors import InputError, JournalError
from ...journal import Journal, RecordedRun, read_journal, replay
from ...optim.optimizer import ZerothOrderOptimizer
from ..command_line import check_options
from ..run import Run
from ..settings import Settings
from .drivers import Driver
from .folder import EXTENDED, JOURNAL, METRICS, MODEL, SUMMARY, read_saved
from .records import StepRecord, read_metrics


@dataclasses.dataclass(frozen=True)
class Keeper:
    """Keeps the journal of one run.

    Attributes:
        path: the file.
        about: what it says of the run.
        goes_on_at: steps that a resumed run keeps; None for a new one.
        extended: steps that it is to take in all, where that is not what its journal says.
    """

    path: Path
    about: dict[str, Any]
    goes_on_at: int | None = None
    extended: int | None = None

    def attach(self, driver: Driver) -> Driver:
        """Begins the journal of a zeroth-order driver, or brings it to where its run was. Other methods have none.

        Raises:
            InputError: the journal is of something else, or cannot be written.
        """
        if isinstance(driver, ZerothOrderOptimizer):
            try:
                if self.goes_on_at is None:
                    Journal.create(self.path, driver, about=self.about, overwrite=True)
                else:
                    Journal.resume(self.path, driver, upto=self.goes_on_at)
            except JournalError as e:
                driver.close()
                raise InputError(str(e)) from None
        return driver

    def model_after(self, base: Any, steps: int) -> Any:
        """A copy of the model that the run started from, with the weights that its journal has after so many steps."""
        model = copy.deepcopy(base)
        replay(model, read_run_journal(self.path), steps)
        return model


def new_keeper(run: Run, output: Path) -> Keeper:
    """The keeper of a run that begins in a folder."""
    task = {name: getattr(run.data.task, name) for name in ("name", "kind")} | {"labels": list(run.data.task.labels)}
    about = {"settings": run.settings.recorded(), "objective": run.objective.name, "task": task}
    return Keeper(output / JOURNAL, about | {"data": _digest_trained(run), "scored": _digest_scored(run)})


def resumed_keeper(keeper: Keeper) -> Keeper:
    """The keeper of a run that goes on after the last step that both its journal and its metrics have.

    Raises:
        InputError: the data are not those of the run, or it has taken all its steps.
    """
    run = read_run_journal(keeper.path)
    folder = keeper.path.parent
    if run.header.about.get("data") != keeper.about["data"]:
        raise InputError(f"--resume {folder}: the train examples are not those that the run had")
    if run.header.about.get("scored", keeper.about["scored"]) != keeper.about["scored"]:
        raise InputError(f"--resume {folder}: the dev or test examples are not those that the run had")
    wanted = keeper.about["settings"]["steps"]
    summary = read_saved(folder / SUMMARY)
    if run.fingerprint is not None and run.steps >= wanted and summary and summary.get("stopped") is None:
        raise InputError(f"--resume {folder}: the run has taken all of its {wanted} steps; --steps N goes on to N steps")
    logged = {record.step for _, record in read_metrics(folder / METRICS) if isinstance(record, StepRecord)}
    # Without its metrics, the journal alone says how far it was.
    whole = next((i for i in range(len(logged) + 1) if i not in logged), 0) if (folder / METRICS).exists() else run.steps
    extended = None if wanted == recorded_settings(run).steps else wanted
    return dataclasses.replace(keeper, goes_on_at=min(run.steps, whole), extended=extended)


def settings_of(folder: Path, steps: int | None = None) -> Settings:
    """The settings of a run that was ended, from its journal.

    Args:
        steps: the run is to take so many steps in all; None: as many as it was to take.

    Raises:
        InputError: the folder has no journal, or the run cannot take more steps.
    """
    if not (folder / JOURNAL).is_file():
        raise InputError(
            f"--resume {folder}: there is no {JOURNAL}; a run has one from its first step on, if its method is zeroth-order"
        )
    run = read_run_journal(folder / JOURNAL)
    settings, extended = recorded_settings(run), read_saved(folder / EXTENDED).get("steps")
    settings = dataclasses.replace(settings, output=str(folder), steps=extended if isinstance(extended, int) else settings.steps)
    if steps is None or steps == settings.steps:
        return settings
    if settings.lr_schedule not in (None, "constant", "constant_with_warmup") or 0 < settings.warmup_steps < 1:
        raise InputError(
            f"--resume {folder} --steps {steps}: the {settings.lr_schedule} schedule of the run ends after {settings.steps} steps, "
            f"and a run of {steps} has other rates from its first step on: begin one with --model {folder / MODEL}"
        )
    if steps < run.steps:
        raise InputError(f"--resume {folder} --steps {steps}: the run has taken {run.steps} steps; lozo-kernels revert goes back")
    return dataclasses.replace(settings, steps=steps)


def find_journal(path: Path) -> Path:
    """A journal, given as itself or as the folder of its run."""
    return path / JOURNAL if path.is_dir() else path


def read_run_journal(path: Path) -> RecordedRun:
    """The journal at a path, or in the folder of a run.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return read_journal(find_journal(path))
    except JournalError as e:
        raise InputError(str(e)) from None


def recorded_settings(run: RecordedRun) -> Settings:
    """The settings that a journal records.

    It may be anybody's: they are checked here, and it cannot say that code is trusted. Weights that a checkpoint lacks are
    allowed, because fingerprints tell whether a model is the one that the run started from.

    Raises:
        InputError: it records none, or one is of the wrong type or out of range.
    """
    try:
        settings = Settings(**run.header.about["settings"] | {"trust_remote_code": False, "allow_missing_weights": True})
    except (KeyError, TypeError):
        raise InputError(f"{run.source} was not written by lozo-kernels finetune, so it does not say how to go on") from None
    try:
        check_options(settings)
    except InputError as e:
        raise InputError(f"{run.source} holds settings that no run has: {e}") from None
    return settings


def _digest_trained(run: Run) -> str | None:
    """A digest of the train examples as the model sees them; None for images, which are read only when they are needed."""
    return None if run.data.task.kind == "image" else _digest([repr(e) for e in run.train_set])


def _digest_scored(run: Run) -> str:
    """A digest of what a run is scored on: dev examples as the model sees them, and test examples. Images by name and class."""
    data = run.data
    if data.task.kind == "image":
        return _digest([[Path(e.texts[0]).name, str(e.label)] for e in (*data.dev, *data.test)])
    return _digest([[repr(e)] for e in (*run.dev_set, *data.test)])


def _digest(seen: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(seen).encode(), digest_size=16).hexdigest()
