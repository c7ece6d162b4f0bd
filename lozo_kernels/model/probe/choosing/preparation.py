"""Prepares a probe by the first evaluation: where weights are used, which side each takes, and whether the probe is right."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from ...conditions import Conditions, eagerly
from ...losses import Closure, mean_loss
from ...modules import has_pre_hooks, is_compiled
from ...overriding import Hook
from ...sharding import Peers, reshard
from ...watching import WeightVersions
from ..forward.probed import ProbedModel
from ..members import Member, modules_of
from ..runtime import Point
from .choice import choose_sides, needs_costs
from .cost import Costs, free_bytes, measure_costs
from .lookout import Lookout, Uncovered
from .trace import Watch, watching
from .verify import Doubts, Losses, Unit, coarsest, find_wrong, materialised, only_enabled, typical_scale, units_of

_ROUNDS = 4  # of checks: on the activation side, on scratch, in place, and a last one

_CHUNKS = 8  # parts in which the weights are checked, with two evaluations each, so that the check needs little memory
_COPY_BYTES = 1 << 26  # bytes of copies that a check may take in any case
_UNMOVED = 2  # parts of the weights that do not change the loss, after which a check ends that has proved nothing
_NOISE = 8.0  # differences of losses up to so many times the one seen at the same weights prove nothing


class Preparation:
    """Chooses and installs the side of every member by a first evaluation, looks again later, and checks losses both ways.

    Args:
        lookout: notices later what the first evaluation did not show.
        doubts: the members that no check has proved yet.
        versions: notices changes of weights.
        install: puts the chosen sides into the model, in place of earlier ones. It merges what was learned where it has to.
        step: a step of the window whose V is in memory.

    Attributes:
        precision: the coarsest dtype that evaluations compute with. :meth:`choose` finds it; for the others it has to be set.
    """

    def __init__(
        self,
        probed: ProbedModel,
        lookout: Lookout,
        doubts: Doubts,
        versions: WeightVersions,
        install: Callable[[], None],
        closures: Sequence[Closure],
        conditions: Conditions,
        step: int,
    ) -> None:
        self.probed, self.lookout, self.doubts, self.versions = probed, lookout, doubts, versions
        self.install, self.closures, self.conditions, self.step = install, closures, conditions, step
        self.members = probed.members
        reshard(probed.model)
        self.peers = Peers(m.parameter.tensor for m in self.members)
        self.scale = doubts.scale * typical_scale(self.members, probed.config.rank)
        self.precision = torch.float32
        self._noise = 0.0

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While the body runs, forwards are eager, and what they change besides the loss is put back in the end."""
        with eagerly(), self.lookout.hushed(), torch.no_grad():
            try:
                yield
            finally:
                self.conditions.put_back()

    def choose(self) -> list[str]:
        """Chooses, installs and checks the sides. Returns notes for the report."""
        probed, compiled = self.probed, is_compiled(self.probed.model)
        cut = next((m.name for m in self.members if m.storage.in_blocks), None)
        if compiled and cut is not None:
            raise RuntimeError(f"{cut!r} is tensor parallel, and has no probe in a compiled model: leave torch.compile out")
        if compiled and probed.config.per_example:
            raise RuntimeError("directions per example (GRZO) have no probe in a compiled model: leave torch.compile out")
        with self.alone():
            with watching(probed.model, Watch(self.members)) as watch:
                rest = self.loss()
            self.precision = coarsest(watch.dtypes)
            for used, tokens in zip(watch.uses.values(), self.peers.most([u.tokens for u in watch.uses.values()]), strict=True):
                used.tokens = int(tokens)
            choose_sides(self.members, watch.uses, self._costs(), probed.config, compiled, self.peers)
            self.install()
            self.lookout.survey(watch.ran)
            self.doubts.add(self.members)
            notes = self._check(rest)
            unused = [m for m in self.members if not watch.uses[m].modules]
            if self.doubts.proved:  # losses can change, and do not with parameters that nobody uses
                self.doubts.members -= set(unused)
            if not compiled:
                self.lookout.unused = probed.await_use(unused, self.lookout.notice)
            return notes

    def look_again(self) -> list[str]:
        """Traces an evaluation with what was seen for the first time in it, or in the last ones. Returns notes for the report."""
        with self.alone():
            new_mode, watch = self.lookout.is_new_mode(), Uncovered(self.members)
            with watching(self.probed.model, watch):
                self.loss()
            self.lookout.survey(watch.ran)
            self.lookout.settle(watch)
            woken, moved = self.lookout.take()
            if moved:
                self.install()
            concerned = watch.ran if new_mode else woken
            self.doubts.add(m for m in self.members if m in moved or not concerned.isdisjoint(modules_of(m)))
            return [f"{m.name}: {m.reason}; now {m.side}" for m in moved] + self._check(None)

    def check(self) -> list[str]:
        """Checks losses both ways for the members that are in doubt. Returns notes for the report."""
        with self.alone():
            return self._check(None)

    def loss(self) -> float:
        """The loss of the model as it is now. Raises RuntimeError if the closure changes weights whose factors hold something."""
        self.versions.look()
        loss = float(mean_loss(self.closures, self.conditions))
        if self.probed.learned:
            self.versions.check("by an evaluation: a probe only reads weights, and so must the closure")
        return loss

    def _costs(self) -> dict[Member, Costs]:
        config = self.probed.config
        costs: dict[Member, Costs] = {}
        for member in self.members:
            if needs_costs(member, config):
                p = member.parameter.tensor
                dtype = p.dtype if p.is_floating_point() else torch.float32
                costs[member] = measure_costs(member.device, dtype, config.rank, config.backend)
        if not costs:
            return costs
        agreed = self.peers.most([seconds for found in costs.values() for seconds in dataclasses.astuple(found)])
        return {member: Costs(*agreed[4 * i : 4 * i + 4]) for i, member in enumerate(costs)}

    def _check(self, rest: float | None) -> list[str]:
        notes: list[str] = []
        for _ in range(_ROUNDS):
            units = self._doubtful()
            if not units:
                break
            rest = self._at_the_weights() if rest is None else rest
            if self.peers.any(not math.isfinite(rest)) or not self._any_wrong(units, rest):
                break
            noise = self.peers.most([abs(self._at_the_weights() - rest)])[0]
            if noise > 1e-6 * max(1.0, abs(rest)) and not self._noise:
                self._noise = _NOISE * noise
                continue
            wrong = find_wrong(units, lambda some, rest=rest: self.differ(some, rest)) or units  # type: ignore[misc]
            notes += [_demote(member) for unit in wrong for member in unit]
            self.install()
        if self._noise and self.doubts.members:
            notes += self._do_without()
        self.doubts.put_off()
        return notes

    def _doubtful(self) -> list[Unit]:
        """The units that a check has to prove. Members that no check can perturb are not in doubt."""
        doubtful = self.doubts.members
        of_any = self.peers.most([float(m in doubtful) for m in self.members])
        doubtful |= {m for m, found in zip(self.members, of_any, strict=True) if found}
        units = [u for u in units_of(self.members) if all(m.storage.always_here for m in u) and not doubtful.isdisjoint(u)]
        doubtful &= {m for unit in units for m in unit}
        return units

    def _do_without(self) -> list[str]:
        """Settles members that no loss can prove, since it is not the same twice. What a hook may read before a module runs is
        moved in place."""
        unproved = [m for m in self.members if m in self.doubts.members]
        moved = [m for m in unproved if any(has_pre_hooks(module, Hook) for module in modules_of(m))]
        for member in moved:
            member.settle_on("inplace", "no loss can prove its probe")
        if moved:
            self.install()
        self.doubts.members.clear()
        note = (
            "the loss is not the same twice at the same weights, random numbers and buffers, so the probe of "
            f"{len(unproved)} parameters (e.g. {unproved[0].name}) could not be checked: let the closure compute one batch's loss"
        )
        warnings.warn(note, stacklevel=2)
        return [note]

    def _any_wrong(self, units: Sequence[Unit], rest: float) -> bool:
        """Whether the probe is wrong. Units are checked together as far as memory allows for copies of their weights, and are no
        longer in doubt if the loss changes with them."""
        weights = sum(_bytes(unit) for unit in units)
        free = int(self.peers.least(max(free_bytes(device) for device in self.probed.devices)))
        unmoved = 0
        for chunk in _chunks(units, min(copies_at_once(weights), free // 2)):
            losses = self.compare(chunk, rest)
            if self.peers.any(not losses.agree(self.precision, self._noise)):
                return True
            if self.peers.any(losses.moved(self._noise)):
                self.doubts.clear(m for unit in chunk for m in unit)
            elif self.peers.any(not math.isfinite(losses.materialised)):
                self.doubts.scale *= 0.1
            else:
                unmoved += 1
            if unmoved == _UNMOVED and not self.doubts.proved:
                break
        return False

    def differ(self, units: Sequence[Unit], rest: float) -> bool:
        """Whether the probe is wrong with the members of some units perturbed, on any process that shares the weights."""
        return self.peers.any(not self.compare(units, rest).agree(self.precision, self._noise))

    def _at_the_weights(self) -> float:
        """The loss without perturbations, and without what was learned."""
        try:
            self.probed.runtime.live = False
            return self.loss()
        finally:
            self.probed.write()

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


def _chunks(units: Sequence[Unit], most: int) -> Iterator[list[Unit]]:
    """Yields units in parts of at most so many bytes, or of one unit."""
    chunk: list[Unit] = []
    for unit in units:
        if chunk and sum(map(_bytes, chunk)) + _bytes(unit) > most:
            yield chunk
            chunk = []
        chunk.append(unit)
    if chunk:
        yield chunk


def copies_at_once(weights: int) -> int:
    """Bytes of copies that a check may take at a time, if there is memory, where all weights have ``weights`` bytes."""
    return max(_COPY_BYTES, weights // _CHUNKS)


def _bytes(unit: Unit) -> int:
    return sum(m.numel * m.parameter.tensor.element_size() for m in unit)


def _demote(member: Member) -> str:
    """Moves a member to the next safer side. Returns a note."""
    before = member.side
    if member.signed:
        raise RuntimeError(f"{member.name!r} cannot have a direction for each example (the loss differed): exclude it, or use LOZO")
    if member.storage.in_blocks and before not in ("activation", "shift"):
        raise RuntimeError(f"{member.name!r} is sharded and cannot be probed (the loss differed on every side): exclude it")
    small = not member.parameter.low_rank
    member.side = ("copy" if small else "scratch") if before in ("activation", "shift") else "inplace"
    if not member.scopes:
        member.scopes = [member.owners[0].module]
    member.reason = f"the loss differed on the {before} side"
    return f"{member.name}: {member.reason}; now {member.side}"
