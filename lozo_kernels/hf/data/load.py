"""The data of a run."""

from __future__ import annotations

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
    return split(load_images(settings) if images else load_texts(settings), settings)
