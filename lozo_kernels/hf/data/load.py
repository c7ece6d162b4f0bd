"""The data of a run."""

from __future__ import annotations

from ..settings import Settings
from ..tasks import TASKS, Task
from .examples import TaskData
from .image_sets import load_images
from .splits import split
from .text import load_texts


def load_data(settings: Settings, own: Task | None = None) -> TaskData:
    """The data that resolved settings ask for, divided as they say, see :func:`lozo_kernels.hf.data.splits.split`.

    Args:
        own: the task of a file that comes without one, where more is known than its rows say.

    Raises:
        InputError: a file is missing or malformed, a label is none of the classes, or there are no examples.
    """
    images = settings.task is not None and TASKS[settings.task].kind == "image"
    return split(load_images(settings) if images else load_texts(settings, own), settings)
