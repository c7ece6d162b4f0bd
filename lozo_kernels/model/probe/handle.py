"""The handle of a probed model. Perturbations move the point of evaluation and updates go into factors, but no weight changes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.calls import Draw, Rounding, Step
from ...kernels.checks import check_range, check_scale
from ...kernels.noise import MAX_DIRECTION
from ...kernels.table import TensorTable
from ..conditions import Conditions
from ..handle import Handle, Perturbation
from ..interrupts import deferred_interrupt
from ..losses import BatchClosure, Closure
from ..parameters import Parameter
from ..passes import Group, Term, Update, run_pass, run_update
from ..report import ParameterReport, report_of
from ..sharding import Peers, reshard
from .batch_split import check_batches
from .choosing.lookout import Lookout
from .choosing.preparation import Preparation
from .choosing.verify import Doubts
from .forward.probed import ProbedModel
from .learned.factors import StateGroup, make_groups
from .learned.ledger import Ledger
from .members import Member
from .runtime import REST, Point
from .sides import describe_sides, set_sides


class ProbeHandle(Handle):
    """A handle whose perturbations do not touch the weights (:class:`~lozo_kernels.PatchConfig`, ``placement="probe"``).

    The model behaves as if its weights were X_t = W + B V^T, plus the perturbation that is applied, wherever it is called: in a
    step, in an evaluation, in ``generate``. W itself changes only when B is merged: when V is drawn anew, in :meth:`merge`, before
    ``state_dict()`` and ``load_state_dict()``, and in :meth:`restore`. Methods are those of :class:`Handle`; :meth:`prepare` comes
    first.

    Attributes:
        probed: the model, the points, and the state of each parameter.
        prepared: :meth:`prepare` has chosen sides.
    """

    probes = True
    state_in_pieces = False

    def _begin(self) -> None:
        self.probed = ProbedModel(self.model, self.config, self.trained, self.estimator)
        self.prepared = False
        self._ledger = Ledger(self.members, self.config)
        self._states: list[StateGroup] = []
        self._resting: list[Group] = []
        self._away: dict[Member, Group] = {}
        self._applied: Point | None = None
        self._last_step = 0
        self._warned = False
        self._notes: list[str] = []
        self._doubts = Doubts()
        self._lookout = Lookout(self.model, self.members, self._reinstall)
        super()._begin()

    @property
    def members(self) -> list[Member]:
        """The state of every trained parameter, in the order of :attr:`names`."""
        return self.probed.members

    @property
    def devices(self) -> list[torch.device]:
        """The devices of the trained parameters' state, each once."""
        return self.probed.devices

    @property
    def notes(self) -> tuple[str, ...]:
        return (*super().notes, *self._notes, *self._doubts.notes)

    @property
    def moves_weights(self) -> bool:
        return bool(self._groups)

    @property
    def factors(self) -> dict[str, Tensor]:
        return {member.name: member.b for member in self.members if member.b is not None}

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory held."""
        return self.probed.scratch_bytes

    def device_of(self, p: Parameter) -> torch.device:
        return p.storage.device

    def prepare(self, closures: Closure | Sequence[Closure], conditions: Conditions | None = None, *, step: int = 0) -> None:
        """Finds where an evaluation uses each weight, chooses sides, and checks one loss both ways.

        An optimiser does this in its first step. It costs three evaluations, and some more if a weight has to be treated in another
        way than expected; :meth:`report` names these weights. A later call looks again if a module ran for the first time or
        modules are in another mode, and checks again what no loss has proved yet; otherwise it does nothing.

        Args:
            closures: as :meth:`lozo_kernels.LOZO.step` takes them.
            conditions: what every evaluation starts from; None: the buffers and random numbers as they are now.
            step: the step that follows.
        """
        look = not self.prepared or self._lookout.due()
        if self._sharded and self._lookout.asleep:  # processes may run other modules (experts), and look together
            look = Peers(self.parameters).any(look)
        if not look and not self._doubts.due():
            return
        self._check_between_steps()
        self.enter_window(step)
        some = [closures] if callable(closures) else list(closures)
        first = step - step % self.config.interval
        seen = self._lookout, self._doubts, self._versions
        if conditions is None or not conditions.randomness:
            conditions = self.conditions(randomness=True)  # a check compares losses, which have to see the same numbers
        preparation = Preparation(self.probed, *seen, self.install, some, conditions, first)
        if not self.prepared:
            self._notes += preparation.choose()
            self.precision = preparation.precision
            self.prepared = True
        else:
            preparation.precision = self.precision
            self._notes += preparation.look_again() if look else preparation.check()
        self._lookout.stand()
        self._versions.look()  # a check changes weights and puts them back

    def describe_sides(self) -> dict[str, Any] | None:
        return describe_sides(self.probed, self.precision) if self.prepared else None

    @torch.no_grad()
    def adopt_sides(self, described: dict[str, Any], *, install: bool) -> None:
        """Takes over what :meth:`describe_sides` of another handle of the same model returned, in place of :meth:`prepare`.

        Args:
            install: let the model be evaluated too. Otherwise only updates can be made, and memory for perturbed weights is saved.

        Raises:
            ValueError: it does not fit the model; nothing was changed.
        """
        precision = set_sides(self.probed, described, evaluate=install)
        if install:
            self.precision = precision
            self.install()
            self._lookout.stand()
        else:
            self._rebuild_groups()
        self.prepared = True

    @torch.no_grad()
    def perturb_(self, step: Step, scale: float, *, direction: int = 0) -> None:
        """Adds scale * D(step, direction) to the point at which the model is evaluated. Arguments as :meth:`Handle.perturb_`.

        Raises:
            RuntimeError: not prepared, or a perturbation along another direction is applied (use :meth:`shift_`).
        """
        check_scale(scale)
        check_range("direction", direction, MAX_DIRECTION)
        applied = self._applied
        if applied is not None and ((applied.step is not step and applied.step != step) or applied.direction != direction):
            raise RuntimeError("a perturbation along another direction is applied: a probe holds one at a time; use shift_()")
        before = 0.0 if applied is None else applied.scale
        self.move(step, None if applied is None else (direction, before), (direction, before + scale))

    def move(self, step: Step, before: Perturbation | None, after: Perturbation | None) -> None:
        self._check_prepared()
        self._start(step)
        if before is None:
            self._check_between_steps()
        if self._groups:
            self._move_groups(step, before, after)
            self._versions.look()
        self._move_to(REST if after is None else Point(step, after[0], after[1]))

    @torch.no_grad()
    def spread_(self, step: Step, offsets: Sequence[Perturbation], examples: int, parts: int = 1) -> None:
        """Lets evaluations share the next forward passes, with ``examples`` of the batch at each (direction, scale), in order, or
        ``parts`` of them in as many directions as :meth:`Handle.spread_` says.

        Raises:
            RuntimeError: not prepared, or a parameter is perturbed in place.
        """
        for direction, scale in offsets:
            check_scale(scale)
            check_range("direction", direction, MAX_DIRECTION)
        self._check_prepared()
        self._start(step)
        if self._groups:
            name = self.names[int(self._groups[0].index[0])]
            raise RuntimeError(f"{name!r} is perturbed in place, which one forward pass can do in one way only: see report()")
        self._check_between_steps()
        self._applied = Point(step, 0, 0.0)
        self.probed.write([Point(step, direction, scale) for direction, scale in offsets], examples, parts)

    @torch.no_grad()
    def rest_(self) -> None:
        applied = self._applied
        if applied is not None and self._groups and applied.scale:
            run_pass(self._groups, [Term(Draw(applied.step, applied.direction), perturb=-applied.scale)])
        self._move_to(REST)

    def check_batches(
        self, closures: Sequence[BatchClosure], batches: Sequence[Any], conditions: Conditions, *, step: int, parts: int
    ) -> bool:
        return check_batches(self, self.members, closures, batches, conditions, step=step, parts=parts)

    def take(self, update: Update, applied: float = 0.0, perturb_next: float | None = None) -> None:
        assert perturb_next is None
        self._check_prepared()
        self._check_weights()
        self._start(update.step)
        for state in self._states:
            state.update(update)
        run_update(self._resting, update)
        for member in self.members:
            if member.b is None and not member.storage.resident:
                with self.probed.borrowed(member) as shard:
                    run_update([self._group_away(member, shard.x)], update)
        run_update(self._groups, update, applied)
        self._last_step = self._last_step + 1 if isinstance(update.step, Tensor) else update.step
        self.probed.learned = self.probed.learned or bool(self._states)
        self._versions.look()  # weights that are updated in place changed
        self._move_to(REST)

    def check_capturable(self) -> None:
        if self.config.per_example:
            raise ValueError("a step with directions per example (GRZO) cannot be captured: take plain steps")
        member = next((m for m in self.members if not m.storage.always_here), None)
        if member is not None:
            raise ValueError(
                f"{member.name!r} is {member.storage.word}, and a captured step of a probe needs weights that stay where they are "
                "and can be merged: take plain steps, or exclude it"
            )

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        before = self.probed.learned, self._last_step
        moved = [x for group in self._groups for x in group.table.x]  # weights that are perturbed in place, which rounds
        kept = [x.clone() for x in moved]
        try:
            yield
        finally:
            for x, value in zip(moved, kept, strict=True):
                x.copy_(value)
            self.probed.learned, self._last_step = before
            self._versions.look()
            self.probed.write()

    @property
    def in_use(self) -> list[object]:
        return self.probed.in_use

    def begin_replay(self, step: int) -> None:
        super().begin_replay(step)
        self._check_between_steps()

    def end_replay(self, step: int, *, decays: bool) -> None:
        self._last_step = step
        if self._states:
            self.probed.note_update()
        for state in self._states if decays else ():
            state.note_decay()

    def merge(self) -> None:
        """Merges what was learned into the weights: they become X_t, rounded once into their dtype.

        This rounds once more than a run that merges only when V is drawn anew. What quantised layers learned stays in factors that
        their forwards add: r more ranks with every V.
        """
        self._merge(asked=True)

    @torch.no_grad()
    def _merge(self, *, asked: bool = False) -> None:
        if not self.probed.learned:
            return
        if any(member.swapped for member in self.members):
            raise RuntimeError("the weights cannot be brought up to date while a forward pass of the model runs")
        with deferred_interrupt():
            if self._applied is not None:
                self.rest_()
            self._ledger.check_decay()
            self._refresh_groups()  # weights may have been replaced since the last step
            if self.sharded:
                reshard(self.model)
            assert self._window is not None
            if asked and self.on_merge is not None:
                self.on_merge()
            rounding = Rounding(self._last_step) if self.config.rounding == "stochastic" else None
            for state in self._states:
                self._ledger.merge(state, self._window, rounding)
            self._versions.look()  # these changes are our own
            self.probed.learned = False
            self.probed.write()

    @property
    def undecaying(self) -> list[str]:
        return self._ledger.undecaying

    def check_decay(self) -> None:
        """Raises RuntimeError if a parameter has decayed whose factors are kept, because they cannot express decay."""
        self._ledger.check_decay()

    @property
    def history(self) -> list[tuple[int, dict[str, Tensor]]]:
        return self._ledger.history

    @property
    def past(self) -> dict[str, dict[str, Any]]:
        """What quantised layers learned in earlier windows, by name. No weight can hold it.

        Factors ``b`` (rows, ranks) and ``v`` (ranks, cols), fp32, and the last ``window``.
        """
        return self._ledger.past

    @torch.no_grad()
    def load_learned(self, past: Mapping[str, Mapping[str, Any]], history: Sequence[tuple[int, dict[str, Tensor]]]) -> None:
        self._check_usable()
        self._ledger.check_past(past)
        self.merge()
        self._ledger.load_past(past)
        self._ledger.history = [(window, dict(kept)) for window, kept in history]
        self.probed.write()

    def write_perturbed(self, name: str, out: Tensor) -> None:
        """Writes the weight that the model behaves as having, rounded into its dtype as the weight side computes with it.

        Args:
            name: the parameter's name, or an alias.
            out: of its shape and dtype, contiguous.

        Raises:
            KeyError: no trained parameter has this name.
            TypeError: it is quantised: no weight holds what the layer computes with.
            ValueError: ``out`` does not fit.
        """
        p = self.find(name)
        if not p.storage.mergeable:
            raise TypeError(f"{name!r} is quantised and has no perturbed weight")
        if out.shape != p.storage.shape or out.dtype != p.tensor.dtype or not out.is_contiguous():
            needed = f"contiguous {tuple(p.storage.shape)} {p.tensor.dtype}"
            raise ValueError(f"out is {tuple(out.shape)} {out.dtype}; needed is {needed}")
        if p.storage.sharded:
            reshard(self.model)
        member = self.probed.member(p)
        if member.side == "inplace":  # the weight is where it was moved to
            out.copy_(p.tensor)
            return
        self.probed.fill(member, out, None if p.storage.resident else p.storage.load(member.device))

    def restore(self, *, discard: bool = False) -> None:
        """Merges, and gives the model its own forwards back. A second call does nothing.

        Args:
            discard: give up what quantised layers learned, which no weight can hold, and what weights cannot hold any more.

        Raises:
            RuntimeError: quantised layers learned something, and ``discard`` is False; nothing was changed.
            TypeError: weights cannot be changed any more (quantised, or on the meta device), and ``discard`` is False.
        """
        if self._restored:
            return
        names = self._ledger.unmergeable(self.probed.learned)
        if names and not discard:
            raise RuntimeError(
                f"what {len(names)} quantised layers learned (e.g. {names[0]!r}) cannot be merged into their weights and would be "
                "lost: save it with lozo_kernels.export_lora() and call restore(discard=True)"
            )
        self.rest_()
        try:
            self.merge()
        except TypeError as error:
            if not discard:
                raise TypeError(f"{error}. restore(discard=True) gives up what was learned since the last merge") from None
        self._lookout.leave()
        self.probed.remove()
        super().restore()

    def before_read(self, use: str) -> bool:
        learned = self.probed.learned
        if use == "parameters" and self._applied is not None:
            return False  # a closure reads weights, which is checked once: see prepare()
        names = self._ledger.unmergeable(learned) if use in ("copy", "state_dict") else []
        if use == "copy" and names:
            raise RuntimeError(
                f"a copy would be without what {len(names)} quantised layers learned (e.g. {names[0]!r}): save it with "
                "lozo_kernels.export_lora() and load it as an adapter of the copy, which is made before patching"
            )
        if self._applied is not None:
            raise RuntimeError(
                f"the weights are needed ({use}) during an evaluation at a perturbed point, which only forward passes see: do this "
                "outside of the closure, or call rest_() before"
            )
        self.merge()
        if use == "state_dict" and names and not self._warned:
            self._warned = True
            warnings.warn(
                f"state_dict() is without what {len(names)} quantised layers learned (e.g. {names[0]!r}), which cannot be merged "
                "into their weights: save it with lozo_kernels.export_lora(), or with the optimiser's state_dict() to go on later",
                stacklevel=3,
            )
        return learned

    def install(self) -> None:
        """Puts the chosen sides into the model's modules, in place of earlier ones."""
        if any(m.side == "inplace" and m.b is not None for m in self.members):
            self.merge()  # a member in place has no factors
        self.choices += 1
        self._rebuild_groups()
        self._reinstall()
        self._versions.look()

    def _reinstall(self) -> None:
        self.probed.remove()
        self.probed.install(self.before_read)

    def _check_between_steps(self) -> None:
        """Raises RuntimeError if somebody changed weights while a part of what was learned is not in them."""
        if self.probed.learned:
            self._versions.check(
                "between steps, but what was learned lately is not in it yet and would be added to the change: call merge() of the "
                "handle before you change weights. To go on with the sum of both, call step() again"
            )
        self._versions.look()

    def _check_weights(self) -> None:
        self._versions.check("during the evaluations of a step: a probe only reads weights, and so must the closure")

    def _move_to(self, point: Point) -> None:
        self._applied = point if point.scale else None
        self.probed.write([point if point.scale else REST])

    def _check_prepared(self) -> None:
        self._check_usable()
        if not self.prepared:
            raise RuntimeError("the handle does not know yet where weights are used: call prepare(closure) once first")

    def _start(self, step: Step) -> None:
        super()._start(step)
        if self.prepared:
            self.probed.check_forwards()

    def _shards(self) -> list[Tensor]:
        """Blocks of tensor-parallel weights only. Shards of FSDP are looked up when there is something to merge."""
        return [p.storage.present()[0] for p in self._sharded if p.storage.in_blocks]

    def _resample(self, window: int | None, *, reproject: bool) -> None:
        self._merge()  # what was learned belongs to the old V
        if window is not None:
            for state in self._states:
                if state.windows is not None:
                    self.estimator.resample_(state.windows, window=window, reproject=reproject, backend=state.backend)
        in_place = self._groups
        try:
            self._groups = [*in_place, *self._resting]
            super()._resample(window, reproject=reproject)
        finally:
            self._groups = in_place
        for member in self.members:
            if member.local is not None:
                member.local.follow(member.v)

    def _rebuild_groups(self) -> None:
        probed = self.probed
        self._away.clear()
        probed.follow()
        self._v |= {m.name: m.v for m in probed.members if m.v is not None}
        for member in probed.members:
            if member.name in self._momentum:
                self._momentum[member.name] = self._momentum[member.name].to(member.device)
        self._states = make_groups(probed.members, self._momentum, probed.backends, self.estimator, self.config)
        straight = [m for m in probed.members if m.b is None]
        self._groups = self._make_groups(m.index for m in straight if m.side == "inplace")
        self._resting = self._make_groups(m.index for m in straight if m.side != "inplace" and m.storage.resident)
        probed.rebuild()

    def _group_away(self, member: Member, x: Tensor) -> Group:
        """A group for one offloaded weight while it is here. It is used again where the weight is at the same address."""
        known = self._away.get(member)
        if known is not None and known.table.x[0].data_ptr() == x.data_ptr() and known.table.x[0].dtype == x.dtype:
            return known
        p, backend = member.parameter, self.probed.backends[member.device]
        momentum = [self._momentum[p.name]] if self._momentum else None
        index = torch.tensor([member.index], device=member.device, dtype=torch.int64)
        group = Group(p.kind, index, TensorTable([x], [p.tensor_id], n=momentum), backend, self.estimator, self.config)
        self._away[member] = group
        return group

    def _describe(self, p: Parameter, backend: str) -> ParameterReport:
        member = self.probed.member(p)
        return report_of(p, self.config.rank, backend, member.reason or "prepare() will choose a side", member.side)
