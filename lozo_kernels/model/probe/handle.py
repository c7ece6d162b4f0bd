"""The handle of a probed model: it moves the point that the model is evaluated at, and what was learned, but no weight."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.calls import Draw, Rounding, Step
from ...kernels.checks import check_range, check_scale
from ...kernels.noise import MAX_DIRECTION, MAX_DRAW
from ...kernels.registry import Choice, choose_backend
from ...kernels.table import TensorTable
from ..config import PatchConfig
from ..handle import Handle
from ..interrupts import deferred_interrupt
from ..losses import Closure, Randomness
from ..offload import find_homes, home_of
from ..parameters import Slot, canonical
from ..passes import Group, Scalar, StepUpdate, Term, check_update, run_pass, run_update
from ..report import ParameterReport
from ..sharding import reshard, running_device, stays_in_blocks
from .choosing import preparation
from .forward.guards import Guards
from .forward.install import Installation
from .forward.swapping import Arena
from .forward.weights import PerturbedWeights
from .learned.factors import StateGroup, make_groups, update_factors
from .learned.ledger import Ledger
from .members import Holder, Member, execution_device, load_weight, offloaded_weight, part_of
from .runtime import REST, Point, Runtime


class ProbeHandle(Handle):
    """A handle whose perturbations do not touch the weights (:class:`~lozo_kernels.PatchConfig`, ``placement="probe"``).

    The model behaves as if its weights were X_t = W + B V^T, plus the perturbation that stands, wherever it is called: in a step,
    in an evaluation, in ``generate``. W itself changes only when B is merged: when V is drawn anew, in :meth:`settle`, before
    ``state_dict()`` and ``load_state_dict()``, and in :meth:`restore`. Methods are those of :class:`Handle`; :meth:`prepare`
    comes first.
    """

    state_in_pieces = False

    def __init__(self, model: nn.Module, config: PatchConfig) -> None:
        self._members: list[Member] = []
        self._states: list[StateGroup] = []
        self._resting: list[Group] = []
        self._runtime = Runtime(config)
        self._arenas: dict[torch.device, Arena] = {}
        self._holders: dict[str, list[Holder]] = {}
        self._installation = Installation()
        self._choices: dict[torch.device, Choice] = {}
        self._standing: Point | None = None
        self._learned = False
        self._last_step = 0
        self._prepared = False
        self._warned = False
        self._notes: list[str] = []
        self.on_settle: Callable[[], None] | None = None
        """Called just before a merge that no change of V implies."""
        self.precision = torch.float32
        """The coarsest dtype that evaluations compute with."""
        self._weights = PerturbedWeights(self._runtime, config.seed)
        super().__init__(model, config)
        self._ledger = Ledger(self._members, config)
        self._watch = Guards(model, self._members)
        self._watch.check_adapters()

    @property
    def prepared(self) -> bool:
        """Whether :meth:`prepare` has chosen sides."""
        return self._prepared

    @property
    def devices(self) -> list[torch.device]:
        """Where the trained parameters' state is, each device once."""
        return list(dict.fromkeys(member.device for member in self._members))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the check of :meth:`prepare` found."""
        return tuple(self._notes)

    @property
    def members(self) -> list[Member]:
        """What is known of every trained parameter, in the order of :attr:`names`."""
        return self._members

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory held."""
        return sum(arena.nbytes for arena in self._arenas.values())

    def prepare(self, closures: Closure | Sequence[Closure], randomness: Randomness | None = None, *, step: int = 0) -> None:
        """Looks where an evaluation uses each weight, chooses sides, and checks one loss both ways. A second call does nothing.

        An optimiser does this in its first step. It costs three evaluations, and some more where a weight has to be treated in
        another way than expected; :meth:`report` says which those were.

        Args:
            closures: as :meth:`lozo_kernels.LOZO.step` takes them.
            randomness: what every evaluation draws.
            step: the step that follows.
        """
        if self._prepared:
            return
        self.enter_window(step)
        self.precision, notes = preparation.prepare(self, [closures] if callable(closures) else list(closures), randomness)
        self._notes += notes
        self._prepared = True

    @torch.no_grad()
    def perturb_(self, step: Step, scale: float, *, direction: int = 0) -> None:
        """The model is evaluated at scale * D(step, direction) from where it is. Arguments as :meth:`Handle.perturb_`.

        Raises:
            RuntimeError: not prepared, or a perturbation along another direction stands (use :meth:`shift_`).
        """
        check_scale(scale)
        check_range("direction", direction, MAX_DIRECTION)
        self._check_prepared()
        self._start(step)
        standing = self._standing
        if standing is None:
            self._watch.look()
        if standing is not None and ((standing.step is not step and standing.step != step) or standing.direction != direction):
            raise RuntimeError("a perturbation along another direction stands: a probe holds one at a time; use shift_()")
        if self._groups:
            run_pass(self._groups, self.config, [Term(Draw(step, direction), perturb=scale)])
        self._move_to(Point(step, direction, scale + (standing.scale if standing else 0.0)))

    @torch.no_grad()
    def shift_(self, step: Step, remove: tuple[int, float], add: tuple[int, float]) -> None:
        """From a perturbation along one direction of a step to one along another. Arguments as :meth:`Handle.shift_`."""
        for direction, scale in (remove, add):
            check_scale(scale)
            check_range("direction", direction, MAX_DIRECTION)
        self._check_prepared()
        if self._groups:
            super().shift_(step, remove, add)
        else:
            self._start(step)
        self._move_to(Point(step, add[0], add[1]))

    @torch.no_grad()
    def spread_(self, step: Step, offsets: Sequence[tuple[int, float]], examples: int) -> None:
        """Several evaluations share the next forward passes: ``examples`` of the batch at each (direction, scale), in order.

        Raises:
            RuntimeError: not prepared, or a parameter is perturbed in place.
        """
        for direction, scale in offsets:
            check_scale(scale)
            check_range("direction", direction, MAX_DIRECTION)
        self._check_prepared()
        self._start(step)
        if self._groups:
            name = self._members[int(self._groups[0].index[0])].name
            raise RuntimeError(f"{name!r} is perturbed in place, which one forward pass can do in one way only: see report()")
        self._watch.look()
        self._standing = Point(step, 0, 0.0)
        self._write([Point(step, direction, scale) for direction, scale in offsets], examples)

    @torch.no_grad()
    def rest_(self) -> None:
        """Takes any perturbation out."""
        standing = self._standing
        if standing is not None and self._groups and standing.scale:
            run_pass(self._groups, self.config, [Term(Draw(standing.step, standing.direction), perturb=-standing.scale)])
        self._standing = None
        self._write([REST])

    @torch.no_grad()
    def update_(
        self,
        step: Step,
        c: Scalar | Sequence[Scalar],
        lr: Scalar,
        *,
        weight_decay: Scalar = 0.0,
        beta: float | Tensor | None = None,
        standing: float = 0.0,
        perturb_next: float | None = None,
    ) -> None:
        """X <- (1 - lr * weight_decay) X - lr * mean over directions of c D / r, into B. Arguments as :meth:`Handle.update_`.

        Raises:
            RuntimeError: an evaluation changed weights.
        """
        if perturb_next is not None:
            raise ValueError("a probe makes no pass that a perturbation could share: leave perturb_next out")
        if beta is not None and not self._momentum:
            raise RuntimeError("momentum was not enabled: call enable_momentum() first")
        self._check_prepared()
        self._watch.check_weights()
        update = StepUpdate(step, list(c) if isinstance(c, Sequence) else [c], lr, weight_decay, beta)
        check_update(update, len(self._slots))
        check_scale(standing)
        self._start(step)
        for group in self._states:
            update_factors(group, update, self.config)
        if self._resting:
            run_update(self._resting, self.config, update)
        for member in self._members:
            if member.b is None and member.slot.out_of_reach is not None:
                with offloaded_weight(member, member.device) as x:
                    run_update([self._group_away(member, x)], self.config, update)
        if self._groups:
            run_update(self._groups, self.config, update, standing)
        self._last_step = self._last_step + 1 if isinstance(step, Tensor) else step
        self._learned = self._learned or bool(self._states)
        self._watch.look()  # weights that are updated in place changed
        self._standing = None
        self._write([REST])

    def settle(self) -> None:
        """Merges what was learned into the weights: they become X_t, rounded once into their dtype.

        Rounds once more than a run that merges only when V is drawn anew. What quantised layers learned stays in factors, which
        their forwards add: r more ranks with every V.
        """
        self._settle(self.on_settle)

    @torch.no_grad()
    def _settle(self, before: Callable[[], None] | None = None) -> None:
        if not self._learned:
            return
        if any(member.swapped for member in self._members):
            raise RuntimeError("the weights cannot be brought up to date while a forward pass of the model runs")
        with deferred_interrupt():
            if self._standing is not None:
                self.rest_()
            self.check_decay()
            if any(slot.out_of_reach == "sharded" for slot in self._slots):
                reshard(self.model)
            assert self._window is not None
            if before is not None:
                before()
            rounding = Rounding(self._last_step) if self.config.rounding == "stochastic" else None
            for group in self._states:
                self._ledger.merge(group, self._window, rounding)
            self._watch.look()  # these changes are our own
            self._learned = False
            self._write([REST])

    @property
    def undecaying(self) -> list[str]:
        """Names of parameters that cannot decay: quantised ones, and with ``keep_factors`` all low-rank ones."""
        return self._ledger.undecaying

    def check_decay(self) -> None:
        """Raises RuntimeError if a parameter has decayed whose factors are kept, because they cannot say that."""
        self._ledger.check_decay()

    @property
    def history(self) -> list[tuple[int, dict[str, Tensor]]]:
        """With ``keep_factors``: (window, merged B by name) of every window so far, on the CPU."""
        return self._ledger.history

    @history.setter
    def history(self, history: list[tuple[int, dict[str, Tensor]]]) -> None:
        self._ledger.history = history

    @property
    def past(self) -> dict[str, dict[str, Any]]:
        """What quantised layers learned in windows that are over, by name, as no weight holds it.

        Factors ``b`` (rows, ranks) and ``v`` (ranks, cols), fp32, and the last ``window``.
        """
        return self._ledger.past

    @torch.no_grad()
    def load_past(self, past: dict[str, dict[str, Any]]) -> None:
        """The inverse of :attr:`past`.

        Raises:
            ValueError: names or shapes differ; nothing was changed.
        """
        self._check_usable()
        self._ledger.check_past(past)
        self.settle()
        self._ledger.load_past(past)
        self._write([REST])

    def write_perturbed(self, name: str, out: Tensor) -> None:
        """The weight that the model behaves as having, rounded into its dtype: what the weight side computes with.

        Args:
            name: any of a parameter's names.
            out: of its shape and dtype, contiguous.

        Raises:
            KeyError: no trained parameter has this name.
            TypeError: it is quantised: no weight holds what the layer computes with.
            ValueError: ``out`` does not fit.
        """
        slot = self._find(name)
        if slot.out_of_reach == "quantised":
            raise TypeError(f"{name!r} is quantised and has no perturbed weight")
        member = self._member_of(slot)
        if slot.out_of_reach == "sharded":
            reshard(self.model)
        base = None if slot.out_of_reach is None else load_weight(member, member.device)  # in blocks: gathered as well
        self._weights.fill(member, out, 0, self._choices[member.device].backend, base)

    def enter_window(self, step: int) -> None:
        """Makes V that of a step. What was learned under another V is merged first."""
        self._check_usable()
        check_range("step", step, MAX_DRAW - 1)
        if self._window is not None and step // self.config.interval != self._window:
            self._settle()
        super().enter_window(step)

    def restore(self, *, discard: bool = False) -> None:
        """Merges, and gives the model its own forwards back. A second call does nothing.

        Args:
            discard: give up what quantised layers learned, which no weight can hold.

        Raises:
            RuntimeError: quantised layers learned something, and ``discard`` is False; nothing was changed.
        """
        if self._restored:
            return
        names = self._ledger.unmergeable(self._learned)
        if names and not discard:
            raise RuntimeError(
                f"what {len(names)} quantised layers learned (e.g. {names[0]!r}) cannot be merged into their weights and would be "
                "lost: save it with lozo_kernels.export_lora() and call restore(discard=True)"
            )
        self.rest_()
        self.settle()
        self._installation.remove()
        super().restore()

    def before_state_dict(self) -> None:
        """Merges, and warns once if there is something that the model's ``state_dict()`` cannot have."""
        self.settle()
        names = self._ledger.unmergeable(self._learned)
        if names and not self._warned:
            self._warned = True
            warnings.warn(
                f"state_dict() is without what {len(names)} quantised layers learned (e.g. {names[0]!r}), which cannot be merged "
                "into their weights: save it with lozo_kernels.export_lora(), or with the optimiser's state_dict() to go on later",
                stacklevel=3,
            )

    def install(self) -> None:
        """Puts the chosen sides into the model's modules."""
        self._installation.remove()
        self._rebuild_groups()
        self._installation.add(self.model, self._members, self._runtime, self._arenas, self._fill, self._choices, weakref.ref(self))
        self._watch.installed(self._installation)

    def _fill(self, member: Member, out: Tensor, group: int) -> None:
        self._weights.fill(member, out, group, self._choices[member.device].backend)

    def _write(self, points: Sequence[Point], examples: int | None = None) -> None:
        """Moves to other points; copies and shifts follow."""
        self._runtime.live = self._learned or any(m.past is not None for m in self._members) or any(p.scale for p in points)
        self._runtime.write(points, examples)
        self._weights.refresh()

    def _move_to(self, point: Point) -> None:
        self._standing = point if point.scale else None
        self._write([point if point.scale else REST])

    def _check_prepared(self) -> None:
        self._check_usable()
        if not self._prepared:
            raise RuntimeError("the handle does not know yet where weights are used: call prepare(closure) once first")

    def _start(self, step: Step) -> None:
        super()._start(step)
        if self._prepared:
            self._watch.check_modules()

    def _shards(self) -> list[Tensor]:
        """Blocks of tensor-parallel weights. FSDP's are looked for when there is something to merge."""
        if not self._members:
            self._members = self._find_members()
        return [member.present[0] for member in self._members if member.in_blocks]

    def _device(self, slot: Slot) -> torch.device:
        p = slot.parameter
        return execution_device(self._holders[slot.name]) if p.device.type == "meta" else running_device(p)

    def _resample(self, window: int | None, *, reproject: bool) -> None:
        if window is not None:
            for group in self._states:
                if group.windows is not None:
                    self.estimator.resample_(group.windows, window=window, reproject=reproject, backend=group.choice.backend)
        in_place = self._groups
        try:
            self._groups = [*in_place, *self._resting]
            super()._resample(window, reproject=reproject)
        finally:
            self._groups = in_place
        for member in self._members:
            if member.part is not None:
                member.part.follow(member.v)

    def _rebuild_groups(self) -> None:
        self._check_shapes()
        if not self._members:
            self._members = self._find_members()
        for member in self._members:
            self._follow(member)
        self._choices = {d: choose_backend(d, self.config.backend) for d in self.devices}
        self._states = make_groups(self._members, self._momentum, self._choices, self.estimator)
        straight = [m for m in self._members if m.b is None]
        self._groups = self._make_groups(m.index for m in straight if m.side == "inplace")
        self._resting = self._make_groups(m.index for m in straight if m.side != "inplace" and m.slot.out_of_reach is None)
        self._weights.rebuild(self._members, self._choices, self.estimator)
        self._weights.refresh()

    def _group_away(self, member: Member, x: Tensor) -> Group:
        """A table over one offloaded weight while it is here."""
        momentum = [self._momentum[member.name]] if self._momentum else None
        index = torch.tensor([member.index], device=member.device)
        table = TensorTable([x], [member.slot.tensor_id], n=momentum)
        return Group(member.slot.kind, index, table, self._choices[member.device], self.estimator)

    def _find_holders(self) -> dict[str, list[Holder]]:
        """The modules that have each trained parameter, by its canonical name."""
        holders: dict[str, list[Holder]] = {}
        homes = find_homes(self.model)
        for name, module in self.model.named_modules():
            for attribute in module._parameters:
                slot = self._aliases.get(canonical(f"{name}.{attribute}" if name else attribute))
                if slot is not None:
                    holder = Holder(module, name, attribute, home_of(homes, module, attribute))
                    if holder.home is not None and slot.out_of_reach == "offloaded":
                        holder.home.check_writable()
                    holders.setdefault(slot.name, []).append(holder)
        return holders

    def _find_members(self) -> list[Member]:
        self._holders = self._find_holders()
        members = []
        for i, slot in enumerate(self._slots):
            member = Member(slot, i, self._extent(slot), self._device(slot), self._holders[slot.name])
            member.in_blocks = slot.out_of_reach == "sharded" and stays_in_blocks(self.model, slot.parameter)
            members.append(member)
        return members

    def _follow(self, member: Member) -> None:
        """State where the parameter is now, made at the first call."""
        member.device = device = self._device(member.slot)
        batch, rows, cols = member.extent
        if member.slot.kind == "lowrank":
            if member.v is None:
                member.v = torch.zeros(batch, self.config.rank, cols, dtype=torch.float16, device=device)
            member.v = member.v.to(device)
            self._v[member.name] = member.v
        if member.side == "inplace":
            member.b = None
        elif self.estimator.low_rank:
            if member.b is None:
                member.b = torch.zeros(batch, rows, self.config.rank if member.v is not None else cols, device=device)
            member.b = member.b.to(device)
        member.point = self._runtime.on(device)
        if member.in_blocks:
            member.part = part_of(member, member.slot.piece())
        if member.v is not None and member.b is not None and batch == 1:
            v, b = (member.v, member.b) if member.part is None else (member.part.v, member.part.b)
            assert v is not None
            member.factors = v[0], b[0]
        if member.past is not None:
            member.past.to(device)
        if member.name in self._momentum:
            self._momentum[member.name] = self._momentum[member.name].to(device)

    def _member_of(self, slot: Slot) -> Member:
        return next(m for m in self._members if m.slot is slot)

    def _describe(self, slot: Slot, choice: Choice) -> ParameterReport:
        member = self._member_of(slot)
        treatment = f"low-rank {self.config.rank}" if slot.kind == "lowrank" else "dense"
        p = slot.parameter
        note = member.reason or "prepare() will choose a side"
        return ParameterReport(
            *(slot.name, slot.aliases, tuple(p.shape), p.dtype, p.device, treatment, choice.backend.name, note),
            side=member.side,
        )
