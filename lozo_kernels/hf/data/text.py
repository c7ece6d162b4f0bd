"""Examples from files, from a folder, from the Hub or from a generator, all through the same checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..methods import METHODS
from ..settings import Settings
from ..tasks import TASKS, Hub, Row, Task
from .examples import DEV_NAMES, Example, TaskData, relabelled
from .files import read_rows, spell
from .own import hold_out, task_of


def read_examples(path: Path, task: Task, labelled: bool = True) -> list[Example]:
    """The examples of one file.

    Args:
        labelled: read the labels of a classification task; otherwise only its texts.
    """
    examples = _examples(read_rows(path), task, labelled)
    if not examples:
        raise InputError(f"{path}: no examples")
    return examples


def load_texts(settings: Settings, own: Task | None = None) -> TaskData:
    """The examples that resolved settings ask for, as train and dev.

    Args:
        own: the task of a file that comes without one; None: what its rows say.

    Raises:
        InputError: a file is missing or malformed, a label is none of the classes, or there are no examples.
    """
    labelled = settings.objective != "lm"
    if settings.train_file is not None:
        return _from_files(settings, labelled, own)
    if settings.task is None and own is None:
        raise InputError("--dev-file goes with --task, or with the --checkpoint of a run")
    task = own if settings.task is None and own is not None else TASKS[settings.task or ""]
    needs_train = METHODS[settings.method].trains or settings.method == "icl"
    if settings.dev_file is not None:  # zero-shot
        return TaskData(task, [], read_examples(Path(settings.dev_file), task, labelled), settings.dev_file)
    if settings.data_dir is not None:
        paths = _find(Path(settings.data_dir), task, needs_train)
        train, dev = (read_examples(path, task, labelled) if path is not None else [] for path in paths)
        return TaskData(task, train, dev, ", ".join(str(path) for path in paths if path is not None))
    if task.generate is not None:
        train, dev = (_examples(_numbered(rows, task.name), task, labelled) for rows in task.generate(0))
        return TaskData(task, train, dev, "its generator")
    if task.hub is None:
        raise InputError(f"--task {task.name} needs --train-file or --data-dir")
    return _from_hub(task, task.hub, labelled, needs_train)


def _from_files(settings: Settings, labelled: bool, own: Task | None) -> TaskData:
    train_path = Path(settings.train_file or "")
    task = TASKS[settings.task] if settings.task else own or task_of(train_path, labelled=labelled)
    train = read_examples(train_path, task, labelled)
    if settings.dev_file is not None:
        return TaskData(task, train, read_examples(Path(settings.dev_file), task, labelled), f"{train_path}, {settings.dev_file}")
    train, dev, source = hold_out(train_path, train, settings.drawing_seed)
    return TaskData(task, train, dev, source)


def _find(folder: Path, task: Task, needs_train: bool) -> tuple[Path | None, Path]:
    train_paths = [folder / f"{task.name}.train.jsonl", *sorted(folder.glob(f"{task.name}.train*.jsonl"))]
    devs = [folder / f"{task.name}.{name}.jsonl" for name in DEV_NAMES]
    train, dev = (next((p for p in paths if p.is_file()), None) for paths in (train_paths, devs))
    lacks_train = train is None and needs_train
    if dev is None or lacks_train:
        missing = train_paths[0].name if lacks_train else " or ".join(p.name for p in devs)
        raise InputError(f"--data-dir {folder}: no {missing}")
    return train, dev


def _from_hub(task: Task, hub: Hub, labelled: bool, needs_train: bool) -> TaskData:
    source = dataclasses.replace(task, label_field=hub.label_field or task.label_field, labels=hub.labels or task.labels)
    parts = {}
    for part in (hub.train, hub.dev) if needs_train else (hub.dev,):
        rows = hub.load(task.name, split=part)
        examples = _examples(_numbered(rows, f"{hub.path} {part}"), source, labelled, skip_unlabelled=True)
        if hub.labels and labelled:
            examples = relabelled(examples, hub.labels, task.labels)
        parts[part] = examples
    return TaskData(task, parts.get(hub.train, []), parts[hub.dev], f"the Hub: {hub.path}")


def _numbered(rows: Iterable[Row], name: str) -> Iterator[tuple[str, Row]]:
    return ((f"{name}, row {i}", row) for i, row in enumerate(rows))


def _examples(rows: Iterable[tuple[str, Row]], task: Task, labelled: bool, skip_unlabelled: bool = False) -> list[Example]:
    """Rows as examples. ``skip_unlabelled`` passes over those whose answer is not published: label -1, or no right answer."""
    examples = []
    for where, row in rows:
        for part in _unpack(row, task, where):
            texts = tuple(_text(part, names, where) for names in task.fields)
            if not labelled or task.kind == "causal_lm":
                examples.append(Example(texts))
            elif skip_unlabelled and _unanswered(part, task):
                continue
            elif task.kind == "classification":
                if task.label_field not in part:
                    raise InputError(f"{where}: no field {task.label_field!r}")
                examples.append(Example(texts, _class_index(part[task.label_field], task, where)))
            elif task.kind == "choice":
                if not part["right"]:
                    raise InputError(f"{where}: none of the {len(part['options'])} options of {task.name} is the answer")
                examples.append(Example(texts, options=tuple(part["options"]), right=tuple(part["right"])))
            else:
                if not part["answers"] or not all(isinstance(a, str) and a.strip() for a in part["answers"]):
                    raise InputError(f"{where}: the answers are {part['answers']!r}, texts are needed")
                examples.append(Example(texts, answers=tuple(part["answers"])))
    return examples


def _unpack(row: Row, task: Task, where: str) -> list[Row]:
    if task.unpack is None:
        return [row]
    try:
        return list(task.unpack(row))
    except KeyError as e:
        raise InputError(f"{where}: no field {e} as {task.name} has it") from None
    except (TypeError, ValueError, AttributeError, IndexError) as e:
        raise InputError(f"{where}: not a row of {task.name}: {e}") from None


def _unanswered(row: Row, task: Task) -> bool:
    if task.kind == "classification":
        return bool(row.get(task.label_field) == -1)
    return not row["right" if task.kind == "choice" else "answers"]


def _text(row: Row, names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in row:
            if not isinstance(row[name], str) or not row[name].strip():
                raise InputError(f"{where}: {name!r} is {row[name]!r}, a text is needed")
            return row[name]
    raise InputError(f"{where}: no field {spell(names)}")


def _class_index(value: Any, task: Task, where: str) -> int:
    if isinstance(value, bool) or value in ("True", "False"):  # the latter as tables have them
        value = str(value).lower()
    if isinstance(value, str) and value in task.labels:
        return task.labels.index(value)
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(task.labels):
        return value
    raise InputError(
        f"{where}: label {value!r} is none of the {len(task.labels)} classes of {task.name}: "
        + ", ".join(f"{i} {name}" if name != str(i) else name for i, name in enumerate(task.labels))
    )
