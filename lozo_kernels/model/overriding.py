"""Attributes and hooks that are put into modules and taken out of copies."""

from __future__ import annotations

from typing import Any

from torch import nn

_MISSING = object()


class Hook:
    """A hook of any kind that this package put into a module. Copies are without it."""


class Overrides:
    """Attributes that were put into modules, one instance at a time, and what was there before."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, str], tuple[nn.Module, Any]] = {}

    def put(self, module: nn.Module, attribute: str, value: Any) -> None:
        """Sets an attribute of one module, which hides that of its class."""
        self._before.setdefault((id(module), attribute), (module, module.__dict__.get(attribute, _MISSING)))
        module.__dict__[attribute] = value

    def remove(self) -> None:
        """Gives every module its own attributes back."""
        for (_, attribute), (module, old) in self._before.items():
            if old is _MISSING:
                module.__dict__.pop(attribute, None)
            else:
                module.__dict__[attribute] = old
        self._before.clear()

    def without(self, module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """Returns a module's ``__dict__`` as it would be without what was put into it."""
        cleaned = {}
        for attribute, value in state.items():
            old = self._before.get((id(module), attribute), (module, value))[1]
            if old is not _MISSING:
                cleaned[attribute] = old
        return cleaned
