"""The first evaluation: where weights are used, which side each takes, and whether the probe is right."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...losses import Closure, Randomness, mean_loss
from ...sharding import Peers, reshard
from ..members import Member
from ..runtime import REST, Point
from .choice import choose_sides
from .cost import Costs, free_bytes, measure_costs
from .trace import watch_uses
from .verify import Losses, Unit, coarsest, find_wrong, materialised, only_enabled, typical_scale, units_of

if TYPE_CHECKING:
    from ..handle import ProbeHandle

_ROUNDS = 4  # of demoting what differs: activation side, scratch, in place, and a last look

_CHUNKS = 8  # in which the weights are checked, two evaluations each, so that the check needs little memory
_COPY_BYTES = 1 << 26  # that it may take in any case
_STANCE = threading.RLock()  # the compiler's stance is that of the process: of two threads each would put back the other's


@torch.no_grad()
def prepare(handle: ProbeHandle, closures: Sequence[Closure], randomness: Randomness | None) -> tuple[torch.dtype, list[str]]:
    """Chooses and installs sides. Returns the coarsest dtype that evaluations compute with, and notes for the report."""
    preparation = _Preparation(handle, closures, randomness)
    notes = preparation.run()
    return preparation.dtype, notes


class _Preparation:
    def __init__(self, handle: ProbeHandle, closures: Sequence[Closure], randomness: Randomness | None) -> None:
        self.handle, self.closures, self.randomness = handle, closures, randomness
        self.members, self.runtime = handle.members, handle._runtime
        reshard(handle.model)
        self.peers = Peers(handle.parameters)
        self.scale = typical_scale(self.members, handle.config.rank)
        self.dtype = torch.float32

    def run(self) -> list[str]:
        handle, compiled = self.handle, is_compiled(self.handle.model)
        cut = next((m.name for m in self.members if m.in_blocks), None)
        if compiled and cut is not None:
            raise RuntimeError(f"{cut!r} is tensor parallel, and has no probe in a compiled model: leave torch.compile out")
        with _STANCE, torch.compiler.set_stance("force_eager"):
            handle._watch.look()
            with watch_uses(handle.model, self.members) as watch:
                rest = self.loss()
            self.dtype = coarsest(watch.dtypes)
            for used, tokens in zip(watch.uses.values(), self.peers.most([u.tokens for u in watch.uses.values()]), strict=True):
                used.tokens = int(tokens)
            choose_sides(self.members, watch.uses, self._costs(), handle.config, compiled, self.peers)
            self.handle.install()
            return self._verify(rest)

    def loss(self) -> float:
        return float(mean_loss(self.closures, self.randomness))

    def _costs(self) -> dict[Member, Costs]:
        handle = self.handle
        costs: dict[Member, Costs] = {}
        for member in self.members:
            if member.slot.kind == "lowrank":
                p = member.slot.parameter
                dtype = p.dtype if p.is_floating_point() else torch.float32
                costs[member] = measure_costs(member.device, dtype, handle.config.rank, handle.config.backend)
        agreed = self.peers.most([seconds for found in costs.values() for seconds in dataclasses.astuple(found)])
        return {member: Costs(*agreed[4 * i : 4 * i + 4]) for i, member in enumerate(costs)}

    def _verify(self, rest: float) -> list[str]:
        notes: list[str] = []
        for _ in range(_ROUNDS):
            units = [u for u in units_of(self.members) if all(m.within_reach for m in u)]
            if not self._any_wrong(units, rest):
                return notes
            if self.peers.any(abs(self.loss() - rest) > 1e-6 * max(1.0, abs(rest))):
                return [*notes, "the loss is not the same twice at the same weights, so the probe could not be checked"]
            wrong = find_wrong(units, lambda some: self.differ(some, rest)) or units
            for unit in wrong:
                for member in unit:
                    notes.append(_demote(member))
            self.handle.install()
        return notes

    def _any_wrong(self, units: Sequence[Unit], rest: float) -> bool:
        """Checks as many units together as the memory allows that a copy of their weights may take."""
        weights = sum(_bytes(unit) for unit in units)
        free = self.peers.least(max(free_bytes(device) for device in self.handle.devices))
        budget = min(max(_COPY_BYTES, weights // _CHUNKS), free // 2)
        chunk: list[Unit] = []
        size = 0
        for unit in [*units, None]:
            need = 0 if unit is None else _bytes(unit)
            if chunk and (unit is None or size + need > budget):
                if self.differ(chunk, rest):
                    return True
                chunk, size = [], 0
            if unit is not None:
                chunk.append(unit)
                size += need
        return False

    def differ(self, units: Sequence[Unit], rest: float) -> bool:
        """Whether the probe is wrong with the members of some units perturbed, on any process that shares the weights."""
        return self.peers.any(not self.compare(units, rest).agree(self.dtype))

    def compare(self, units: Sequence[Unit], rest: float) -> Losses:
        """The loss with the members of some units perturbed, by the probe and really."""
        handle = self.handle
        point = Point(0 if handle.window is None else handle.window * handle.config.interval, 0, self.scale)
        try:
            handle._write([point])
            with only_enabled(self.members, units):
                probed = self.loss()
                self.runtime.live = False
                with materialised(units, lambda member, p: handle._fill(member, p, 0)):
                    real = self.loss()
        finally:
            handle._write([REST])
        return Losses(rest, probed, real)


def _bytes(unit: Unit) -> int:
    return sum(m.numel * m.slot.parameter.element_size() for m in unit)


def _demote(member: Member) -> str:
    """The next safer side."""
    before = member.side
    if member.in_blocks and before not in ("activation", "shift"):
        raise RuntimeError(f"{member.name!r} is sharded and cannot be probed (the loss differed on every side): exclude it")
    small = member.slot.kind == "dense"
    member.side = ("copy" if small else "scratch") if before in ("activation", "shift") else "inplace"
    if not member.scopes:
        member.scopes = [member.holders[0].module]
    member.reason = f"the loss differed on the {before} side"
    return f"{member.name}: {member.reason}; now {member.side}"


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether torch.compile was applied to the model or to a module of it."""
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or isinstance(m, torch._dynamo.OptimizedModule) for m in model.modules()
    )
