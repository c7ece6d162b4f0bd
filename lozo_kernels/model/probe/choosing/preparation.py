"""Prepares a probe by the first evaluation: where weights are used, which side each takes, and whether the probe is right."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence

import torch

from ...conditions import Conditions
from ...losses import Closure, mean_loss
from ...modules import is_compiled
from ...sharding import Peers, reshard
from ..forward.probed import ProbedModel
from ..members import Member
from ..runtime import Point
from .choice import choose_sides
from .cost import Costs, free_bytes, measure_costs
from .trace import watch_uses
from .verify import Losses, Unit, coarsest, find_wrong, materialised, only_enabled, typical_scale, units_of

_ROUNDS = 4  # of checks: on the activation side, on scratch, in place, and a last one

_CHUNKS = 8  # parts in which the weights are checked, with two evaluations each, so that the check needs little memory
_COPY_BYTES = 1 << 26  # bytes of copies that a check may take in any case
_STANCE = threading.RLock()  # the compiler's stance is that of the process: of two threads, each would restore the other's


class Preparation:
    """Chooses and installs the side of every member, and checks one loss both ways.

    Args:
        install: puts the chosen sides into the model, in place of earlier ones.
        step: a step of the window whose V is in memory.

    Attributes:
        precision: the coarsest dtype that evaluations compute with, known after :meth:`run`.
    """

    def __init__(
        self,
        probed: ProbedModel,
        install: Callable[[], None],
        closures: Sequence[Closure],
        conditions: Conditions,
        step: int,
    ) -> None:
        self.probed, self.install, self.closures, self.conditions, self.step = probed, install, closures, conditions, step
        self.members = probed.members
        reshard(probed.model)
        self.peers = Peers(m.parameter.tensor for m in self.members)
        self.scale = typical_scale(self.members, probed.config.rank)
        self.precision = torch.float32

    @torch.no_grad()
    def run(self) -> list[str]:
        """Chooses, installs and checks the sides. Returns notes for the report."""
        probed, compiled = self.probed, is_compiled(self.probed.model)
        cut = next((m.name for m in self.members if m.storage.in_blocks), None)
        if compiled and cut is not None:
            raise RuntimeError(f"{cut!r} is tensor parallel, and has no probe in a compiled model: leave torch.compile out")
        with _STANCE, torch.compiler.set_stance("force_eager"):
            with watch_uses(probed.model, self.members) as watch:
                rest = self.loss()
            self.precision = coarsest(watch.dtypes)
            for used, tokens in zip(watch.uses.values(), self.peers.most([u.tokens for u in watch.uses.values()]), strict=True):
                used.tokens = int(tokens)
            choose_sides(self.members, watch.uses, self._costs(), probed.config, compiled, self.peers)
            self.install()
            return self._verify(rest)

    def loss(self) -> float:
        """The loss of the model as it is now."""
        return float(mean_loss(self.closures, self.conditions))

    def _costs(self) -> dict[Member, Costs]:
        config = self.probed.config
        costs: dict[Member, Costs] = {}
        for member in self.members:
            if member.parameter.low_rank:
                p = member.parameter.tensor
                dtype = p.dtype if p.is_floating_point() else torch.float32
                costs[member] = measure_costs(member.device, dtype, config.rank, config.backend)
        agreed = self.peers.most([seconds for found in costs.values() for seconds in dataclasses.astuple(found)])
        return {member: Costs(*agreed[4 * i : 4 * i + 4]) for i, member in enumerate(costs)}

    def _verify(self, rest: float) -> list[str]:
        notes: list[str] = []
        for _ in range(_ROUNDS):
            units = [u for u in units_of(self.members) if all(m.storage.always_here for m in u)]
            if not self._any_wrong(units, rest):
                return notes
            if self.peers.any(abs(self.loss() - rest) > 1e-6 * max(1.0, abs(rest))):
                return [*notes, "the loss is not the same twice at the same weights, so the probe could not be checked"]
            wrong = find_wrong(units, lambda some: self.differ(some, rest)) or units
            notes += [_demote(member) for unit in wrong for member in unit]
            self.install()
        return notes

    def _any_wrong(self, units: Sequence[Unit], rest: float) -> bool:
        """Whether the probe is wrong. Units are checked together as far as memory allows for copies of their weights."""
        weights = sum(_bytes(unit) for unit in units)
        free = self.peers.least(max(free_bytes(device) for device in self.probed.devices))
        budget = min(copies_at_once(weights), free // 2)
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
        return self.peers.any(not self.compare(units, rest).agree(self.precision))

    def compare(self, units: Sequence[Unit], rest: float) -> Losses:
        """Returns the loss with the members of some units perturbed, by the probe and in their weights."""
        try:
            self.probed.write([Point(self.step, 0, self.scale)])
            with only_enabled(self.members, units):
                probed = self.loss()
                self.probed.runtime.live = False
                with materialised(units, self.probed.fill):
                    real = self.loss()
        finally:
            self.probed.write()
        return Losses(rest, probed, real)


def copies_at_once(weights: int) -> int:
    """Bytes of copies that a check may take at a time, if there is memory, where all weights have ``weights`` bytes."""
    return max(_COPY_BYTES, weights // _CHUNKS)


def _bytes(unit: Unit) -> int:
    return sum(m.numel * m.parameter.tensor.element_size() for m in unit)


def _demote(member: Member) -> str:
    """Moves a member to the next safer side. Returns a note."""
    before = member.side
    if member.storage.in_blocks and before not in ("activation", "shift"):
        raise RuntimeError(f"{member.name!r} is sharded and cannot be probed (the loss differed on every side): exclude it")
    small = not member.parameter.low_rank
    member.side = ("copy" if small else "scratch") if before in ("activation", "shift") else "inplace"
    if not member.scopes:
        member.scopes = [member.owners[0].module]
    member.reason = f"the loss differed on the {before} side"
    return f"{member.name}: {member.reason}; now {member.side}"
