"""Putting probed forwards into modules, one instance at a time, and taking them out again."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ....kernels.registry import Choice
from ..members import Member, scopes_of
from ..runtime import Runtime
from .activation import layer_kind, probed_forward
from .swapping import Arena, Fill, scoped_forward

if TYPE_CHECKING:
    from ..handle import ProbeHandle

_MISSING = object()


class Installation:
    """The forwards that were replaced."""

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, str, str, Any, Any]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def add(
        self,
        model: nn.Module,
        members: Sequence[Member],
        runtime: Runtime,
        arenas: dict[torch.device, Arena],
        fill: Fill,
        choices: Mapping[torch.device, Choice],
        handle: weakref.ref[ProbeHandle],
    ) -> None:
        """Replaces the forward of every module that a probe concerns."""
        names = {module: name for name, module in model.named_modules()}
        shifts = {m.holders[0].module: m for m in members if m.side == "shift"}
        for member in members:
            if member.side == "activation":
                for holder in member.holders:
                    kind = layer_kind(holder)
                    assert kind is not None
                    backend = choices[member.device].backend
                    bias = shifts.get(holder.module)
                    self._replace(
                        holder.module,
                        holder.name,
                        functools.partial(probed_forward, runtime, kind, member, bias, holder, backend),
                    )
        for module, some in scopes_of(members).items():
            for device in {m.device for m in some}:
                arenas.setdefault(device, Arena(device))
            self._replace(module, names[module], functools.partial(scoped_forward, runtime, some, arenas, fill))
        self._add_hooks(model, handle)

    def remove(self) -> None:
        """Gives every module its own forward back."""
        for module, _, attribute, old, _ in reversed(self._replaced):
            if old is _MISSING:
                module.__dict__.pop(attribute, None)
            else:
                module.__dict__[attribute] = old
        self._replaced.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def lost(self) -> str | None:
        """The name of a module whose forward was replaced since, or None."""
        outer = {(module, attribute): (name, new) for module, name, attribute, _, new in self._replaced}
        for (module, attribute), (name, new) in outer.items():
            if module.__dict__.get(attribute) is not new:
                return name
        return None

    def _replace(self, module: nn.Module, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        # accelerate's own forward brings offloaded weights in and calls _old_forward: inside of that they are there.
        attribute = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        old = module.__dict__.get(attribute, _MISSING)
        new = make(getattr(module, attribute))
        module.__dict__[attribute] = new
        self._replaced.append((module, name, attribute, old, new))

    def _add_hooks(self, model: nn.Module, handle: weakref.ref[ProbeHandle]) -> None:
        def save(*_: Any) -> None:
            found = handle()
            if found is not None:
                found.before_state_dict()

        def load(*_: Any) -> None:
            found = handle()
            if found is not None:
                found.settle()

        for module in model.modules():
            self._hooks += [module.register_state_dict_pre_hook(save), module.register_load_state_dict_pre_hook(load)]
