"""Data sets of the Hub."""

from __future__ import annotations

from typing import Any

from ...errors import InputError, require
from ..tasks import Hub, Task


def load_from_hub(task: Task, hub: Hub, **options: Any) -> Any:
    """What ``datasets.load_dataset`` returns.

    Args:
        options: arguments of it beside the place.

    Raises:
        InputError: the library is not installed, or the data set cannot be had.
    """
    datasets = require("datasets", extra="hub")
    try:
        return datasets.load_dataset(hub.path, hub.config, revision=hub.revision, **options)
    except Exception as e:  # offline, renamed, gated: the library raises many kinds, and each is the user's to know
        reason = " ".join(str(e).split())
        raise InputError(f"task {task.name}: {hub.path} could not be had from the Hub ({reason}); use --data-dir") from None
