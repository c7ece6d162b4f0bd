"""Puts probed forwards into modules, one instance at a time, and takes them out again."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ....kernels.registry import Backend
from ..members import Member, scopes_of
from ..runtime import Runtime
from .activation import layer_kind, probed_forward
from .fast_paths import close_fast_paths
from .swapping import Arena, Fill, scoped_forward

_MISSING = object()


class Installation:
    """The forwards that were replaced in a model."""

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, str, Any]] = []
        self._outermost: list[tuple[dict[str, Any], str, str, Any]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def add(
        self,
        model: nn.Module,
        members: Sequence[Member],
        runtime: Runtime,
        arenas: dict[torch.device, Arena],
        fill: Fill,
        backends: Mapping[torch.device, Backend],
        save: Callable[[], None],
        load: Callable[[], None],
    ) -> None:
        """Replaces the forward of every module that a probe concerns. Calls ``save`` and ``load``, which are bound methods and held
        weakly, before ``state_dict()`` and ``load_state_dict()``."""
        names = {module: name for name, module in model.named_modules()}
        shifts = {m.owners[0].module: m for m in members if m.side == "shift"}
        for member in members:
            for owner in member.owners if member.side == "activation" else ():
                kind = layer_kind(owner)
                assert kind is not None
                bias, backend = shifts.get(owner.module), backends[member.device]
                make = functools.partial(probed_forward, runtime, kind, member, bias, owner, backend)
                self._replace(owner.module, owner.path, make)
        for module, some in scopes_of(members).items():
            for device in {m.device for m in some}:
                arenas.setdefault(device, Arena(device))
            self._replace(module, names[module], functools.partial(scoped_forward, runtime, some, arenas, fill))
        self._hooks += close_fast_paths(model, members)
        before_save, before_load = _weakly(save), _weakly(load)
        for module in model.modules():
            self._hooks += [
                module.register_state_dict_pre_hook(before_save),
                module.register_load_state_dict_pre_hook(before_load),
            ]

    def remove(self) -> None:
        """Gives every module its own forward back."""
        for module, attribute, old in reversed(self._replaced):
            if old is _MISSING:
                module.__dict__.pop(attribute, None)
            else:
                module.__dict__[attribute] = old
        self._replaced.clear()
        self._outermost.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def lost(self) -> str | None:
        """Returns the name of a module whose forward was replaced by others since, or None."""
        for owned, attribute, name, new in self._outermost:
            if owned.get(attribute) is not new:
                return name
        return None

    def _replace(self, module: nn.Module, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        # accelerate's own forward brings offloaded weights in and calls _old_forward, which is where they are present.
        attribute = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        old = module.__dict__.get(attribute, _MISSING)
        new = make(getattr(module, attribute))
        module.__dict__[attribute] = new
        self._replaced.append((module, attribute, old))
        self._outermost = [row for row in self._outermost if row[0] is not module.__dict__ or row[1] != attribute]
        self._outermost.append((module.__dict__, attribute, name, new))


def _weakly(method: Callable[[], None]) -> Callable[..., None]:
    """Makes a hook that calls a bound method for as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def hook(*_: Any) -> None:
        found = reference()
        if found is not None:
            found()

    return hook
