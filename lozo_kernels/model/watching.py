"""Noticing what happens to trained parameters between passes: their storage moves, or their values change."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.calls import Step
from .modules import own_parameters, reader_of, versions_of
from .parameters import Parameter
from .sharding import is_sharded, local_of

Seen = tuple[list[int], list[int], list[bool], list[torch.dtype]]
"""Addresses, sizes, whether contiguous, and dtypes."""


class StorageWatch:
    """Compares where trained parameters lie with where they lay before (``model.to``, ``param.data = ...``, a replaced parameter).

    Addresses are compared at every pass; sizes and dtypes, which can change at one address (``model.float().half()``), only at the
    first pass of a step. With hundreds of parameters, comparing either takes longer than launching a kernel.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        self._gone: list[object] = []
        self._modules = [weakref.ref(p.storage.owners[0].module, self._gone.append) for p in parameters]
        resident = [p.storage.owners[0] for p in parameters if p.storage.resident]
        self._read = reader_of((own_parameters(owner.module), owner.attribute) for owner in resident)
        self._shapes = [p.tensor.shape for p in parameters]
        self._seen: Seen | None = None
        self._seen_at: Step | None = None

    def look(self, more: list[Tensor], step: Step | None, moved: Callable[[], None]) -> None:
        """Calls ``moved`` if something moved since the last look that it did not raise in.

        Args:
            more: storage to compare besides, of shards.
            step: the step of the pass that follows.

        Raises:
            RuntimeError: a parameter does not exist any more.
            ValueError: a parameter has another shape than when the model was patched.
        """
        again = isinstance(step, int) and step == self._seen_at
        try:
            tensors: list[Any] = list(self._read())
            addresses = list(map(Tensor.data_ptr, tensors))
            gone = bool(self._gone)
        except TypeError:  # of None, for one that a module does not have any more
            gone = True
        if gone:
            tensors = [p.tensor for p in self._parameters]  # raises for the one that is gone
            addresses = [p.data_ptr() for p in tensors]
        if more:
            tensors, addresses = tensors + more, addresses + [t.data_ptr() for t in more]
        if again and self._seen is not None and addresses == self._seen[0]:
            return
        contiguous = list(map(Tensor.is_contiguous, tensors))
        seen = (addresses, list(map(Tensor.numel, tensors)), contiguous, [t.dtype for t in tensors])
        if seen != self._seen:
            self._check_shapes()
            moved()
            self._seen = seen
        self._seen_at = step

    def _check_shapes(self) -> None:
        for p, shape in zip(self._parameters, self._shapes, strict=True):
            if p.tensor.shape != shape:
                raise ValueError(
                    f"parameter {p.name!r} was {tuple(shape)}, now is {tuple(p.tensor.shape)}: restore() and patch again"
                )


class WeightVersions:
    """Notices that something other than a pass of ours changed weights in place.

    Changes through ``p.data`` are not seen: torch does not count them.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        here = [p for p in parameters if p.storage.always_here]
        self._names = [p.name for p in here]
        self._read = reader_of((own_parameters(p.storage.owners[0].module), p.storage.owners[0].attribute) for p in here)
        self._in_blocks = any(p.storage.in_blocks for p in here)
        self._seen: list[Any] = []
        self._versions: list[int] = []

    def look(self) -> None:
        """Remembers the weights as they are now."""
        self._seen = list(self._read())
        self._versions = (_blocks_too if self._in_blocks else versions_of)(self._seen)

    def check(self, why: str) -> None:
        """Raises RuntimeError, once, if a weight was changed in place since the last look: its name, and ``why`` that is an error.
        A parameter that was replaced is followed by :class:`StorageWatch`."""
        now = list(self._read())
        versions = (_blocks_too if self._in_blocks else versions_of)(now)
        if versions == self._versions or not self._seen:
            return
        rows = zip(self._names, self._seen, now, self._versions, versions, strict=True)
        name = next((name for name, old, new, before, after in rows if old is new and before != after), None)
        if name is not None:
            self.look()
            raise RuntimeError(f"{name!r} was changed {why}")


def _blocks_too(tensors: list[Any]) -> list[int]:
    """Versions of weights and of this process's blocks of DTensors, through which they change as well."""
    blocks = [local_of(t) if t is not None and is_sharded(t) else t for t in tensors]
    return list(map(operator.add, versions_of(tensors), versions_of(blocks)))
