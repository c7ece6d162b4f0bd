"""What every evaluation of a step starts from: the same random numbers, and the same buffers."""

from __future__ import annotations

import contextlib
import ctypes
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .modules import own_buffers, versions_of

_SMALL = 1 << 20
"""Bytes. Smaller buffers are always kept, larger ones only once a forward was seen to write them."""


class Conditions:
    """The state of everything that a forward pass can change, when this was made. It is put back before every further evaluation.

    After the last evaluation of a step it has advanced once.

    Args:
        devices: of the model.
        buffers: of the model.
        randomness: put the state of random generators back too: those of torch, Python's ``random`` and ``numpy.random``.

    Attributes:
        randomness: as given.
    """

    def __init__(self, devices: Sequence[torch.device], buffers: Buffers, *, randomness: bool) -> None:
        self.randomness = randomness
        self._generators = _Generators(devices) if randomness else None
        self._buffers = buffers
        self._fresh = True
        buffers.keep()

    def begin_evaluation(self) -> None:
        """Called before every evaluation, so that it sees the weights as they are now, and everything else as the others do."""
        torch.clear_autocast_cache()  # which holds casts of the weights as they were
        if not self._fresh:
            self.put_back()
        self._fresh = False

    def put_back(self) -> None:
        """Puts everything back."""
        if self._generators is not None:
            self._generators.replay()
        self._buffers.put_back()


_STANCE = threading.RLock()  # the compiler's stance is that of the process: of two threads, each would restore the other's


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """While the body runs, what is compiled runs in eager mode, with all hooks."""
    with _STANCE, torch.compiler.set_stance("force_eager"):
        yield


def small_buffer_bytes(model: nn.Module) -> int:
    """Bytes of the buffers that are kept for every step, in :class:`Buffers` of a model with memory."""
    return sum(b.nbytes for module in model.modules() for b in own_buffers(module).values() if b is not None and b.nbytes <= _SMALL)


class Buffers:
    """The buffers of a model that its forwards may write, such as the statistics of ``BatchNorm``."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sizes: list[int] = []
        self._written: set[tuple[int, str]] = set()
        self._kept: list[Tensor | None] = []
        self._now: list[Any] = []
        self._pairs: list[list[Tensor]] = []
        self._versions: list[int] = []
        self._find()

    def keep(self) -> None:
        """Remembers the buffers as they are now."""
        if list(map(len, self._dicts)) != self._sizes:
            self._find()
        self._now = list(map(dict.get, self._owned, self._keys))
        if not all(map(_alike, self._kept, self._now)):
            self._kept = [None if b is None else torch.empty_like(b) for b in self._now]
        if self._now:
            pairs = [(kept, b) for kept, b in zip(self._kept, self._now, strict=True) if b is not None]
            self._pairs = list(map(list, zip(*pairs, strict=True)))
        if self._pairs:
            _copy(*self._pairs)
        if self._large:
            self._versions = versions_of(self._large)

    def put_back(self) -> None:
        """Makes the buffers what they were at :meth:`keep`: the same tensors with the same values."""
        for owned, key, was in zip(self._owned, self._keys, self._now, strict=True):
            if owned.get(key) is not was:
                owned[key] = was
        if self._pairs:
            kept, buffers = self._pairs
            _copy(buffers, kept)
        if self._large and versions_of(self._large) != self._versions:
            self._watch_written()

    def _find(self) -> None:
        self._dicts = [own_buffers(module) for module in self._model.modules()]
        self._sizes = list(map(len, self._dicts))
        every = [(own, key, b) for own in self._dicts for key, b in own.items() if type(b) is Tensor and b.device.type != "meta"]
        some = [(own, key) for own, key, b in every if b.nbytes <= _SMALL or (id(own), key) in self._written]
        self._owned, self._keys = [own for own, _ in some], [key for _, key in some]
        large = [(own, key, b) for own, key, b in every if b.nbytes > _SMALL and (id(own), key) not in self._written]
        self._large_places, self._large = [(own, key) for own, key, _ in large], [b for _, _, b in large]
        self._kept = [None] * len(some)
        self._pairs = []

    def _watch_written(self) -> None:
        """From the next step on, keeps large buffers that were written too."""
        rows = zip(self._large_places, versions_of(self._large), self._versions, strict=True)
        self._written |= {(id(own), key) for (own, key), now, before in rows if now != before}
        self._sizes = []


class _Generators:
    """The state of random generators."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}
        self._python = random.getstate()
        self._numpy: Any = sys.modules.get("numpy")
        if self._numpy is not None:
            self._numpy_state = self._numpy.random.get_state(legacy=False)
            self._numpy_bits = self._read_numpy()

    def replay(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None and (self._numpy_bits is None or self._read_numpy() != self._numpy_bits):
            self._numpy.random.set_state(self._numpy_state)

    def _read_numpy(self) -> bytes | None:
        """The bits of numpy's generator, which take a hundredth of the time that its state takes. None if they do not tell whether
        it was used: a normal number can be left from the last draw of two."""
        generator = self._numpy.random.get_bit_generator()
        if type(generator).__name__ != "MT19937" or self._numpy_state.get("has_gauss"):
            return None
        return ctypes.string_at(generator.ctypes.state_address, 2500)


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


@torch.no_grad()
def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    torch._foreach_copy_(into, values)
