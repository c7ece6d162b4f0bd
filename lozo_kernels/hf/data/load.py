"""The data of a run: read, and divided into what is trained on, looked at and scored."""

from __future__ import annotations

import dataclasses

from ..settings import Settings
from ..tasks import TASKS
from .examples import TaskData
from .image_sets import load_images
from .splits import split
from .text import load_texts


def load_data(settings: Settings) -> TaskData:
    """The data that resolved settings ask for, divided as they say, see :func:`lozo_kernels.hf.data.splits.split`.

    Raises:
        InputError: a file is missing or malformed, a label is none of the classes, or there are no examples.
    """
    images = settings.task is not None and TASKS[settings.task].kind == "image"
    whole = load_images(settings) if images else load_texts(settings)
    parts = split(whole.task, whole.train, whole.dev, [e.label for e in whole.train], settings)
    source = f"{whole.source}: {parts.note}" if parts.note else whole.source
    return dataclasses.replace(whole, train=parts.train, dev=parts.dev, test=parts.test, source=source)
