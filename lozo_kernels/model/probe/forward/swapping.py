"""The weight side: perturbed weights replace the real ones while a module runs.

The storage behind the parameter (``param.data``) is swapped, so every way of reaching it sees the same weight. In compiled code,
tensors of fixed storage are put into the module instead, which compilers understand.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ...interrupts import deferred_interrupt, interruptible
from ...modules import own_parameters
from ...storage import Memory
from ..members import Member
from ..runtime import Runtime

Forward = Callable[..., Any]
_ALIGNMENT = 64  # bytes


class Arena:
    """Scratch memory of one device. It is taken and given back in stack order, because modules run inside each other."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._top = 0

    @property
    def memory(self) -> Tensor:
        """All of it, uint8."""
        return self._memory

    @property
    def nbytes(self) -> int:
        return self._memory.numel()

    def take(self, like: Tensor) -> tuple[Tensor, int]:
        """Returns a contiguous tensor of the shape and dtype of ``like``, and the number that :meth:`give_back` takes."""
        start, size = self._top, like.numel() * like.element_size()
        end = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
        if end > self._memory.numel():  # tensors in the old memory keep it alive
            self._memory = torch.empty(end, dtype=torch.uint8, device=self._memory.device)
        self._top = end
        return self._memory[start : start + size].view(like.dtype).view(like.shape), start

    def give_back(self, start: int) -> None:
        """Frees everything from ``start`` on."""
        self._top = start

    @contextlib.contextmanager
    def lent(self) -> Iterator[Memory]:
        """Memory that is taken with what this yields is given back when the body ends."""
        before = self._top
        try:
            yield lambda like: self.take(like)[0]
        finally:
            self.give_back(before)


Fill = Callable[[Member, Tensor, int], None]
"""Writes the perturbed weight of a member at the point of a group into a tensor of its shape."""


def scoped_forward(
    runtime: Runtime, members: Sequence[Member], arenas: dict[torch.device, Arena], fill: Fill, old: Forward
) -> Forward:
    """Wraps a module's forward, so that it runs with the perturbed weights of ``members`` in their places."""
    scope = _Scope(runtime, members, arenas, fill)

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return scope.run_compiled(old, args, kwargs)
        if not runtime.live:
            return old(*args, **kwargs)
        if runtime.groups == 1:
            return scope.run(old, args, kwargs)
        return scope.run_groups(old, args, kwargs)

    return forward


class _Scope:
    def __init__(self, runtime: Runtime, members: Sequence[Member], arenas: dict[torch.device, Arena], fill: Fill) -> None:
        self.runtime, self.members, self.arenas, self.fill = runtime, members, arenas, fill
        self.places = [[(owner.module, owner.attribute) for owner in member.owners] for member in members]  # for run_compiled

    def run(self, old: Forward, args: Any, kwargs: Any) -> Any:
        """Runs the module at one point."""
        group = self.runtime.selected or 0
        swapped: list[tuple[Member, Tensor, Tensor]] = []
        starts: list[tuple[Arena, int]] = []
        with deferred_interrupt():
            try:
                for member in self.members:
                    if member.enabled and not member.swapped:
                        places = member.storage.present()
                        if member.side == "copy":
                            perturbed = member.buffers[group]
                        else:
                            arena = self.arenas[places[0].device]
                            perturbed, start = arena.take(places[0])
                            starts.append((arena, start))
                            self.fill(member, perturbed, group)
                        for p in places:
                            swapped.append((member, p, p.data))
                            p.data = perturbed
                        member.swapped = True
                with interruptible():
                    return old(*args, **kwargs)
            finally:
                for member, p, rest in swapped:
                    p.data = rest
                    member.swapped = False
                for arena, start in reversed(starts):
                    arena.give_back(start)

    def run_groups(self, old: Forward, args: Any, kwargs: Any) -> Any:
        """Runs the module at every point, each with its part of the batch."""
        runtime = self.runtime
        groups = runtime.groups

        def is_batch(x: Any) -> bool:
            return isinstance(x, Tensor) and runtime.is_batch(x.shape)

        if len(args) == 1 and not kwargs and is_batch(args[0]):  # the fast way for most modules, above all norms
            parts = []
            for g in range(groups):
                with runtime.only(g):
                    parts.append(self.run(old, (_rows(args[0], g, groups),), kwargs))
            return torch.cat(parts) if isinstance(parts[0], Tensor) else _join(parts, None)
        split = any(is_batch(x) for x in tree_leaves((args, kwargs)))
        outputs = []
        for g in range(groups):
            part, more = tree_map(lambda x, g=g: _rows(x, g, groups) if is_batch(x) else x, (args, kwargs))
            with runtime.only(g):
                outputs.append(self.run(old, part, more))
        return _join(outputs, None if split else runtime.examples)

    def run_compiled(self, old: Forward, args: Any, kwargs: Any) -> Any:
        """Runs the module with tensors of fixed storage in the parameters' places, which compilers understand."""
        if self.runtime.groups > 1:
            raise NotImplementedError(
                "several points in one forward pass are not for compiled models with weights on the weight side"
            )
        rest = []
        for member, places in zip(self.members, self.places, strict=True):
            if not member.buffers:
                raise NotImplementedError(
                    f"{member.name!r} of a compiled model needs memory of its own: patch with side={{'{member.name}': 'copy'}}"
                )
            for module, attribute in places:  # a tied weight is in several modules
                owned = own_parameters(module)
                rest.append((owned, attribute, owned[attribute]))
                owned[attribute] = member.buffers[0]  # type: ignore[assignment]
        output = old(*args, **kwargs)
        for owned, attribute, p in rest:
            owned[attribute] = p
        return output


def _rows(x: Tensor, group: int, groups: int) -> Tensor:
    size = x.shape[0] // groups
    return x[group * size : (group + 1) * size]


def _join(outputs: Sequence[Any], examples: int | None) -> Any:
    """Joins the evaluations' outputs into one batch. ``examples``: inputs were shared by all examples, so outputs are repeated."""
    flat, spec = tree_flatten(outputs[0])
    leaves = [flat, *(tree_flatten(output)[0] for output in outputs[1:])]
    return tree_unflatten([_concatenate(parts, examples) for parts in zip(*leaves, strict=True)], spec)


def _concatenate(parts: Sequence[Any], examples: int | None) -> Any:
    if not isinstance(parts[0], Tensor) or parts[0].dim() == 0:
        return parts[0]
    if examples is not None and parts[0].shape[0] == 1:
        parts = [part.expand(examples, *part.shape[1:]) for part in parts]
    return torch.cat(list(parts))
