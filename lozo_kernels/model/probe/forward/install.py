"""Puts probed forwards into modules, one instance at a time, and takes them out again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from ....kernels.registry import Backend
from ...overriding import Overrides
from ...reading import BeforeRead, ReadHooks
from ...storage import layer_kind
from ..members import Member, scopes_of
from ..runtime import Runtime
from .activation import layer_of, probed_forward
from .fast_paths import close_fast_paths
from .signed import PartSigns, SignedLayer
from .swapping import Arena, Fill, scoped_forward


class Installation:
    """The forwards that were replaced in a model."""

    def __init__(self) -> None:
        self._overrides = Overrides()
        self._outermost: list[tuple[dict[str, Any], str, str, Any]] = []
        self._reads: ReadHooks | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def add(
        self,
        model: nn.Module,
        members: Sequence[Member],
        runtime: Runtime,
        signs: PartSigns,
        arenas: dict[torch.device, Arena],
        fill: Fill,
        backends: Mapping[torch.device, Backend],
        before_read: BeforeRead,
    ) -> None:
        """Replaces the forward of every module that a probe concerns, and has ``before_read`` called before weights are read."""
        names = {module: name for name, module in model.named_modules()}
        shifts = {m.owners[0].module: m for m in members if m.side == "shift"}
        for member in members:
            for owner in member.owners if member.side == "activation" else ():
                kind = layer_kind(owner)
                assert kind is not None
                bias, backend = shifts.get(owner.module), backends[member.device]
                what = (runtime, kind, member, bias, owner, backend)
                layer = SignedLayer(*what, signs=signs) if member.signed else layer_of(*what)
                self._replace(owner.module, owner.path, functools.partial(probed_forward, runtime, layer))
        for module, some in scopes_of(members).items():
            for device in {m.device for m in some}:
                arenas.setdefault(device, Arena(device))
            self._replace(module, names[module], functools.partial(scoped_forward, runtime, some, arenas, fill))
        self._hooks = close_fast_paths(model, members)
        self._overrides.put(model, "_replicate_for_data_parallel", _refuse_replicas)
        self._reads = ReadHooks(model, before_read, self._overrides)

    def remove(self) -> None:
        """Gives every module its own forward back."""
        if self._reads is not None:
            self._reads.remove()
            self._reads = None  # it holds the handle: their memory would wait for the garbage collector
        for hook in self._hooks:
            hook.remove()
        self._outermost.clear()

    def lost(self) -> str | None:
        """Returns the name of a module whose forward was replaced by others since, or None."""
        for owned, attribute, name, new in self._outermost:
            if owned.get(attribute) is not new:
                return name
        return None

    def _replace(self, module: nn.Module, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        # accelerate's own forward brings offloaded weights in and calls _old_forward, which is where they are present.
        attribute = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        new = make(getattr(module, attribute))
        self._overrides.put(module, attribute, new)
        self._outermost = [row for row in self._outermost if row[0] is not module.__dict__ or row[1] != attribute]
        self._outermost.append((module.__dict__, attribute, name, new))


def _refuse_replicas() -> NoReturn:
    raise RuntimeError(
        "torch.nn.DataParallel copies a model for each call, and the copies of a probed model would run its weights on one device: "
        "start one process for each device (torchrun) and use parallel='examples', or placement='inplace'"
    )
