"""What an engine has learned, and the directions of the points that its requests are at. Every rank has all of it, whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.calls import Draw
from ..kernels.noise import dense
from ..kernels.registry import choose_backend
from ..model.config import PatchConfig
from ..model.estimators import ESTIMATORS, FactorSpec
from ..model.parameters import Parameter
from ..model.passes import Update
from ..model.probe.learned.factors import make_groups
from ..model.probe.members import Member

Point = tuple[int, float]
"""(direction, scale) within a step."""


@dataclasses.dataclass(eq=False)
class Learned:
    """One parameter: what was learned, and its directions at the points.

    Attributes:
        member: the state of the current window.
        v: (ranks, cols) fp32, V of this window first and then those of earlier ones; b: (rows, ranks) fp32, B likewise. None for a
            vector.
        u: (directions, rows, rank) fp32; for a vector Z, (directions, elements).
        delta: for a vector the sum of its updates, (elements,) fp32.
        gain: what weight decay left of the engine's weight, (1,) fp32, or None for 1.
    """

    member: Member
    v: Tensor | None = None
    b: Tensor | None = None
    u: Tensor | None = None
    delta: Tensor | None = None
    gain: Tensor | None = None
    past: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    decayed: float = 1.0


class Factors:
    """The state of a run in one rank of an engine. The same calls make the same bits in every rank, and in a probe of the model.

    Args:
        parameters: those that are trained. config: of the run.
        device: of the engine.

    Attributes:
        learned: by name. backend: of the ops.
        window: of the V in memory; directions: those of :attr:`Learned.u`.
        slots: the points, by what requests call them. Slot 0 is at rest.
        version, moves: count changes of the factors, and of the points, so that what was made of them can be made anew.
    """

    def __init__(self, parameters: Sequence[Parameter], config: PatchConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._estimator = ESTIMATORS[config.estimator](config)
        self.backend = choose_backend(device, config.backend).backend
        members = self._members = [Member(p, i, p.extent, device) for i, p in enumerate(parameters)]
        for member in members:
            batch, rows, cols = member.extent
            if member.parameter.low_rank:
                member.v = torch.zeros(batch, config.rank, cols, dtype=torch.float16, device=device)
                member.b = torch.zeros(batch, rows, config.rank, dtype=torch.float32, device=device)
            else:
                member.b = torch.zeros(1, 1, rows * cols, dtype=torch.float32, device=device)
        self.learned = {member.name: Learned(member) for member in members}
        self.window: int | None = None
        self.directions: list[int] = []
        self.slots: list[tuple[int, float]] = [(0, 0.0)]
        self.step = self._drawn_at = 0
        self.version = self.moves = 0
        self.live = False
        self.reset(momentum=False)

    def reset(self, *, momentum: bool) -> None:
        """Begins a run, with nothing learned."""
        self.momentum: dict[str, Tensor] = {}
        if momentum:
            self.momentum = {m.name: torch.zeros_like(m.b) for m in self._members if m.b is not None}
        self.window = None
        self._states = make_groups(self._members, self.momentum, {self.device: self.backend}, self._estimator, self.config)
        self.forget()
        self.move(0, [])

    def described(self) -> dict[str, dict[str, Tensor]]:
        """What was learned, on the CPU: by name ``b`` and ``v``, or ``delta``, and ``factor`` and ``momentum`` of this window."""
        found = {}
        for name, learned in self.learned.items():
            own = {"b": learned.b, "v": learned.v, "delta": learned.delta, "factor": learned.member.b, "gain": learned.gain}
            own["momentum"] = self.momentum.get(name)
            found[name] = {key: value.cpu().clone() for key, value in own.items() if value is not None}
        return found

    def enter_window(self, step: int) -> None:
        """Draws V anew if a step begins a window. What was learned in the one before is kept beside it."""
        window = step // self.config.interval
        if window == self.window:
            return
        for learned in self.learned.values():
            self._bank(learned)
        reproject = bool(self.momentum) and self.window is not None
        for state in self._states:
            if state.windows is not None:
                self._estimator.resample_(state.windows, window=window, reproject=reproject, backend=self.backend)
        self.window = window
        self._gather_windows()

    def update(self, update: Update) -> None:
        """Takes up the update of a step, and leaves all points."""
        assert isinstance(update.step, int)
        self.enter_window(update.step)
        for state in self._states:
            state.update(update)
        self.live = True
        self._gather()
        self.rest()

    def rest(self) -> None:
        """Leaves all points."""
        self.move(self.step, [])

    def move(self, step: int, points: Sequence[Point]) -> None:
        """Puts points into the slots from 1 on."""
        if points:
            self.enter_window(step)
        self.step = step
        directions = sorted({direction for direction, scale in points if scale})
        self.slots = [(0, 0.0), *((directions.index(d) if s else 0, s) for d, s in points)]
        self.moves += 1
        if directions != self.directions or step != self._drawn_at:
            self.directions, self._drawn_at = directions, step
            self._draw()

    def forget(self) -> None:
        """Forgets what was learned in all windows, because the engine's weights have it now."""
        for learned in self.learned.values():
            learned.past.clear()
            learned.decayed = 1.0
            assert learned.member.b is not None
            learned.member.b.zero_()
            if learned.member.gain is not None:
                learned.member.gain.fill_(1.0)
                learned.member.gain = None
        self.live = False
        self._gather_windows()

    @property
    def windows(self) -> int:
        """The most earlier windows that a parameter has factors of."""
        return max(len(learned.past) for learned in self.learned.values())

    def bank(self) -> None:
        """Ends the factors of this window: they are kept beside those of the next."""
        for learned in self.learned.values():
            self._bank(learned)
        self._gather_windows()

    def _bank(self, learned: Learned) -> None:
        """Keeps the factors of the window that ends, scaled by what later decay leaves of them."""
        member = learned.member
        assert member.b is not None
        if member.gain is not None:
            gain = float(member.gain)
            learned.past = [(b * gain, v) for b, v in learned.past]
            learned.decayed *= gain
            member.gain.fill_(1.0)
            member.gain = None
        if member.v is not None:
            if bool(member.b.any()):
                learned.past.append((member.b[0].clone(), member.v[0].float()))
            member.b.zero_()

    def _gather_windows(self) -> None:
        """As :meth:`_gather`, after V or the earlier windows changed."""
        for learned in self.learned.values():
            if learned.member.v is not None:
                learned.v = torch.cat([learned.member.v[0].float(), *(v for _, v in learned.past)])
        self._gather()

    def _gather(self) -> None:
        """Makes what places compute with of what was learned."""
        self.version += 1
        for learned in self.learned.values():
            member = learned.member
            assert member.b is not None
            now = 1.0 if member.gain is None else float(member.gain)
            gain = learned.decayed * now
            learned.gain = None if gain == 1.0 else torch.full((1,), gain, dtype=torch.float32, device=self.device)
            if member.v is None:
                learned.delta = member.b.view(-1)
                continue
            past = (b if now == 1.0 else b * now for b, _ in learned.past)
            learned.b = torch.cat([member.b[0], *past], 1)

    def _draw(self) -> None:
        """Makes the directions of the points."""
        self.version += 1
        for learned in self.learned.values():
            p, made = learned.member.parameter, []
            for direction in self.directions:
                if p.low_rank:
                    spec = FactorSpec(p.tensor_id, p.extent, self.backend, self.device)
                    made.append(self._estimator.left(spec, Draw(self.step, direction))[0])
                else:
                    place = {"direction": direction, "law": self.config.directions_law, "device": self.device}
                    made.append(dense(self.config.seed, learned.member.numel, p.tensor_id, self.step, **place))  # type: ignore[arg-type]
            learned.u = torch.stack(made) if made else None
