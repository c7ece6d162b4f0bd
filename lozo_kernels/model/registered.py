"""Which handle a patched model has."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_HANDLES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()

AnyHandle = TypeVar("AnyHandle")


def register_handle(model: nn.Module, make: Callable[[], AnyHandle]) -> AnyHandle:
    """Makes a model's handle and registers it for :func:`registered`. Raises RuntimeError if the model has one already."""
    with _LOCK:
        if registered(model) is not None:
            raise RuntimeError(
                "this model is patched already: use lozo_kernels.handle_of(model), or call its restore() before patching again"
            )
        handle = make()
        _HANDLES[model] = weakref.ref(handle)
    return handle


def registered(model: nn.Module) -> Any:
    """The handle of a model, None if it has none or if it was deleted."""
    reference = _HANDLES.get(model)
    return None if reference is None else reference()


def forget_handle(model: nn.Module, handle: object) -> None:
    """The model has no handle any more, if it had this one."""
    with _LOCK:
        if registered(model) is handle:
            del _HANDLES[model]
