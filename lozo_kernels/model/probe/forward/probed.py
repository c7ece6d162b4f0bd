"""A probed model: the state of each parameter, the points to evaluate at, and the forwards that evaluate there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ....kernels.registry import Backend, choose_backend
from ...config import PatchConfig
from ...estimators import Estimator
from ...layout import Shard
from ...parameters import Parameter
from ...reading import BeforeRead
from ...storage import check_trainable
from ..members import Member, factors_of
from ..runtime import REST, Point, Runtime
from .install import Installation
from .perturbed import PerturbedWeights
from .signed import PartSigns
from .swapping import Arena
from .unused import UnusedWeights


class ProbedModel:
    """Evaluates a model at points other than its weights, which are only read.

    Attributes:
        model: the model; config: how it was patched.
        members: the state of every trained parameter, in the order of ``Handle.names``.
        runtime: the points.
        learned: some factor is not zero, so that the model differs from its weights also between steps.
        backends: the backend of each device.
    """

    def __init__(self, model: nn.Module, config: PatchConfig, parameters: Sequence[Parameter], estimator: Estimator) -> None:
        self.model, self.config = model, config
        self.members = [
            Member(p, i, p.extent, p.storage.device, signed=config.per_example and p.low_rank) for i, p in enumerate(parameters)
        ]
        self.runtime = Runtime(config)
        self.learned = False
        self.backends: dict[torch.device, Backend] = {}
        self._low_rank = estimator.low_rank
        self._arenas: dict[torch.device, Arena] = {}
        self._installation = Installation()
        self._weights = PerturbedWeights(self.runtime, estimator)

    @property
    def devices(self) -> list[torch.device]:
        """The devices of the trained parameters' state, each once."""
        return list(dict.fromkeys(member.device for member in self.members))

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory held."""
        return sum(arena.nbytes for arena in self._arenas.values())

    def member(self, p: Parameter) -> Member:
        """The state of a parameter."""
        return next(m for m in self.members if m.parameter is p)

    def follow(self) -> None:
        """Makes the state of each member on the device of its parameter, or moves it there."""
        for member in self.members:
            self._follow(member)
        self.backends = {d: choose_backend(d, self.config.backend).backend for d in self.devices}

    def rebuild(self) -> None:
        """Makes the memory for perturbed weights anew, as the sides need it."""
        self._weights.rebuild(self.members, self.backends)
        self._weights.refresh()

    def install(self, before_read: BeforeRead) -> None:
        """Puts the chosen sides into the model's modules. ``before_read`` is called before its weights are read from outside."""
        weights, signs = self._weights, PartSigns(self.runtime, self.members)
        self._installation.add(
            self.model, self.members, self.runtime, signs, self._arenas, weights.fill, self.backends, before_read
        )

    def await_use(self, unused: Sequence[Member], used: Callable[[Member], None]) -> UnusedWeights:
        """Has operators that take unused weights take perturbed ones. ``used`` is called with a member the first time."""
        return UnusedWeights(self.model, self.runtime, unused, self._weights.fill, used)

    def check_forwards(self) -> None:
        """Raises RuntimeError if others replaced a forward that was put into a module."""
        lost = self._installation.lost()
        if lost is not None:
            raise RuntimeError(f"the forward of module {lost!r} was replaced after patching: restore() and patch the model again")

    def remove(self) -> None:
        """Gives every module its own forward back."""
        self._installation.remove()

    def write(self, points: Sequence[Point] = (REST,), examples: int | None = None, parts: int = 1) -> None:
        """Moves to other points, and rewrites copies and shifts for them.

        Args:
            examples: of each evaluation, when several share a forward pass; with directions per example of all ``parts``.
        """
        torch.clear_autocast_cache()  # it holds casts of perturbed weights as they were
        self.runtime.live = self.learned or any(m.past is not None for m in self.members) or any(p.scale for p in points)
        self.runtime.write(points, examples, parts)
        self._weights.refresh()

    def fill(self, member: Member, out: Tensor, base: Tensor | None = None) -> None:
        """Writes the perturbed weight of a member into a tensor of its shape. Arguments as :meth:`PerturbedWeights.fill`."""
        self._weights.fill(member, out, 0, base, keep=False)

    def note_update(self) -> None:
        """Notes that factors are not zero any more, so that modules have something to add."""
        self.learned = self.runtime.live = True

    @property
    def in_use(self) -> list[object]:
        """What holds the memory that evaluations write to now. A captured graph needs it for as long as it is there."""
        buffers = [(member.buffers, member.shift) for member in self.members]
        return [[arena.memory for arena in self._arenas.values()], self._weights.tables, buffers]

    @contextlib.contextmanager
    def borrowed(self, member: Member) -> Iterator[Shard]:
        """Yields a weight that is not always here, and writes it back. A copy lies in scratch memory, at the same address in
        every step, so that what was prepared to launch on it stays good."""
        arena = self._arenas.setdefault(member.device, Arena(member.device))
        with arena.lent() as memory, member.storage.borrowed(member.device, memory) as shard:
            yield shard

    def _follow(self, member: Member) -> None:
        member.device = device = member.storage.device
        if device.type == "meta":
            check_trainable(member.name, member.parameter.tensor)
        batch, rows, cols = member.extent
        if member.parameter.low_rank:
            if member.v is None:
                member.v = torch.zeros(batch, self.config.rank, cols, dtype=torch.float16, device=device)
            member.v = member.v.to(device)
        if member.side == "inplace" or member.signed:
            member.b = None
        elif self._low_rank:
            if member.b is None:
                last = self.config.rank if member.v is not None else cols
                member.b = torch.zeros(batch, rows, last, dtype=torch.float32, device=device)
            member.b = member.b.to(device)
        member.point = self.runtime.on(device)
        if member.storage.in_blocks:
            member.local = factors_of(member, member.storage.shard())
        if member.v is not None and member.b is not None and batch == 1:
            v, b = (member.v, member.b) if member.local is None else (member.local.v, member.local.b)
            assert v is not None
            member.factors = v[0], b[0]
        if member.past is not None:
            member.past.to(device)
