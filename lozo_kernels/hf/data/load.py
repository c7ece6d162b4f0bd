"""load."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ..methods import METHODS
from ..settings import Settings
from ..tasks import TASKS
from .examples import TaskData
from .splits import split
from .text import _examples, _find, _from_files, _from_hub, _numbered, read_examples


def load_data(settings: Settings) -> TaskData:
    """The data that resolved settings ask for, divided as they say, see :func:`lozo_kernels.hf.data.text.splits.split`.

    Raises:
        InputError: a file is missing or malformed, a label is none of the classes, or there are no examples.
    """
    whole = _load(settings)
    parts = split(whole.task, whole.train, whole.dev, [e.label for e in whole.train], settings)
    source = f"{whole.source}: {parts.note}" if parts.note else whole.source
    return TaskData(whole.task, parts.train, parts.dev, source, parts.test)


def _load(settings: Settings) -> TaskData:
    labelled = settings.objective != "lm"
    if settings.train_file is not None:
        return _from_files(settings, labelled)
    task = TASKS[settings.task or ""]
    shown = METHODS[settings.method].trains or settings.method == "icl"  # the train examples are
    if task.kind == "image":
        from .images import load_images

        return load_images(settings)
    if settings.dev_file is not None:  # zero-shot
        return TaskData(task, [], read_examples(Path(settings.dev_file), task, labelled), settings.dev_file)
    if settings.data_dir is not None:
        paths = _find(Path(settings.data_dir), task, shown)
        train, dev = (read_examples(path, task, labelled) if path is not None else [] for path in paths)
        return TaskData(task, train, dev, ", ".join(str(path) for path in paths if path is not None))
    if task.generate is not None:
        train, dev = (_examples(_numbered(rows, task.name), task, labelled) for rows in task.generate(0))
        return TaskData(task, train, dev, "its generator")
    if task.hub is None:
        raise InputError(f"--task {task.name} needs --train-file or --data-dir")
    return _from_hub(task, labelled, shown)
