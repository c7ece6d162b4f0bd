"""Images with classes: from a folder with a folder for each class, or from the Hub."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import InputError, require
from ..settings import Settings
from ..tasks import TASKS, Hub, Task
from .examples import DEV_NAMES, Example, TaskData, relabelled

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class ImageExample(Example):
    """An image and its class. ``texts`` has what it is called; ``read`` returns it as an image of PIL."""

    read: Callable[[], Any] | None = None


def load_images(settings: Settings) -> TaskData:
    """The images that resolved settings ask for; their classes become those of the task.

    A folder holds ``train`` and one of ``dev``, ``val``, ``validation`` and ``test``, each with a folder for each class; or only
    the folders of the classes, of which a tenth of the images is held out.

    Raises:
        InputError: there are no images, or the two parts have different classes.
    """
    task = TASKS[settings.task or ""]
    if settings.train_file is not None or settings.dev_file is not None:
        raise InputError(f"--task {task.name} takes images from --data-dir, not from a file")
    if settings.data_dir is not None:
        folder = Path(settings.data_dir)
        return _from_folder(task, folder, settings.seed) if folder.is_dir() else _from_hub(task, Hub(settings.data_dir))
    if task.hub is None:
        raise InputError(f"--task {task.name} needs --data-dir: a folder, or the name of a set on the Hub")
    return _from_hub(task, task.hub)


def read_image(path: Path) -> Any:
    """A file as an image of PIL.

    Raises:
        InputError: it is none.
    """
    pil = require("PIL.Image")
    try:
        with pil.open(path) as file:
            file.load()
            return file
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not an image ({e})") from None


def _from_folder(task: Task, folder: Path, seed: int) -> TaskData:
    train = folder / "train"
    if not train.is_dir():
        labels, examples = _read_folder(folder)
        random.Random(seed).shuffle(examples)
        held_out = max(1, len(examples) // 10)
        if len(examples) < 2:
            raise InputError(f"{folder}: one image is too few to hold some out")
        source = f"{folder}, a tenth of it held out"
        return TaskData(dataclasses.replace(task, labels=labels), examples[held_out:], examples[:held_out], source)
    dev = next((folder / name for name in DEV_NAMES if (folder / name).is_dir()), None)
    if dev is None:
        raise InputError(f"--data-dir {folder}: beside train there is none of {', '.join(DEV_NAMES)}")
    labels, examples = _read_folder(train)
    others, held = _read_folder(dev)
    if not set(others) <= set(labels):
        odd = min(set(others) - set(labels))
        raise InputError(f"{dev}: the class {odd!r} is not in {train}")
    held = relabelled(held, others, labels)
    return TaskData(dataclasses.replace(task, labels=labels), examples, held, f"{train}, {dev}")


def _read_folder(folder: Path) -> tuple[tuple[str, ...], list[Example]]:
    """Names of the classes, and their images."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    examples: list[Example] = []
    for label, path in enumerate(classes):
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError(f"{path}: no images ({', '.join(SUFFIXES)})")
        examples += [ImageExample((str(f),), label, read=functools.partial(read_image, f)) for f in files]
    if len(classes) < 2:
        raise InputError(f"{folder}: a folder of images for each of two classes or more is needed, this has {len(classes)}")
    return tuple(p.name for p in classes), examples


def _from_hub(task: Task, hub: Hub) -> TaskData:
    parts, labels = {}, task.labels
    whole = hub.load(task.name)
    held = next((name for name in (hub.dev, *DEV_NAMES) if name in whole), None)
    if hub.train not in whole or held is None:
        raise InputError(f"{hub.path}: a set with {hub.train!r} and one of {', '.join(DEV_NAMES)} is needed, not {list(whole)}")
    for part in (hub.train, held):
        rows = whole[part]
        image = next((name for name in task.fields[0] if name in rows.column_names), None)
        label = hub.label_field or task.label_field
        if label not in rows.column_names and task.label_field in rows.column_names:
            label = task.label_field
        if image is None or label not in rows.column_names:
            wanted = f"one of {', '.join(task.fields[0])}, and {label}"
            raise InputError(f"{hub.path}: it has the columns {', '.join(rows.column_names)}; needed are {wanted}")
        names = getattr(rows.features[label], "names", None)
        if names is None:
            raise InputError(f"{hub.path}: the column {label!r} does not name its classes")
        labels = tuple(names)
        parts[part] = [
            ImageExample((f"{part} {i}",), int(y), read=functools.partial(_read_row, rows, i, image))
            for i, y in enumerate(rows[label])
        ]
    task = dataclasses.replace(task, labels=labels)
    return TaskData(task, list(parts[hub.train]), list(parts[held]), f"the Hub: {hub.path}")


def _read_row(rows: Any, index: int, column: str) -> Any:
    return rows[index][column]
