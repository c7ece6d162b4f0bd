"""The stepper: evaluates a loss at the points of a step, makes c from the losses, and updates the weights.

Its clients are an optimiser, a captured graph, a loop that calls ``backward()`` and the replay of a journal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from ..errors import NonFiniteLossError
from ..kernels.calls import Step
from ..model.conditions import Conditions
from ..model.guidance import in_one_process
from ..model.handle import Handle, Perturbation
from ..model.interrupts import deferred_interrupt
from ..model.losses import (
    BatchClosure,
    Closure,
    batch_losses,
    batch_totals,
    bind_inputs,
    count_examples,
    mean_loss,
    mean_totals,
)
from ..model.passes import Update
from .flat import FLAT_STEPS, why_flat
from .measuring import evaluate_parts, measure_split
from .normalise import no_moment, normalised
from .parallel import Parallel
from .rate_finder import Measured, RateFinder
from .readback import Readback
from .steps import Rates, StepInfo, StepLog, StepSettings

_LARGEST_DIRECTION = 2.0**20
"""Above the elements of any direction: |u v| < 1537 at rank 64, and SubZero's have a factor of sqrt(rows * columns) besides."""


class Stepper:
    """Takes the steps of one run on one handle, without waiting for a value on a device.

    A step is :meth:`evaluate`, :meth:`conclude`, :meth:`commit`; :meth:`go_back` if one of them raised.

    Attributes:
        handle: moves the weights, or the point where they are evaluated.
        settings: the settings of the steps.
        step: the index of the next step; in a captured step a 0-dim int64 tensor, which is not read.
        parallel: how several processes take the steps together, or None.
        finder: finds the learning rate, or None; measured: what the current step showed it.
        log: the journal that is told of steps, or None.
        info: what the last step saw.
        pending: the update of the last step, if it is left for the next pass over the weights (``fuse_steps``).
        applied: the perturbation that is in the weights now, or None. While an update is pending it is that of the update's step.
        skipped_total, skipped_in_a_row, flat, moment: as in :class:`StepInfo`.
    """

    def __init__(
        self, handle: Handle, settings: StepSettings, parallel: Parallel | None = None, finder: RateFinder | None = None
    ) -> None:
        self.handle = handle
        self.settings = settings
        self.parallel = parallel
        self.finder = finder
        self.measured: list[Measured] = []
        self.step: Step = 0
        self.log: StepLog | None = None
        self.info: StepInfo | None = None
        self.pending: Update | None = None
        self.applied: Perturbation | None = None
        self.skipped_total = torch.zeros((), dtype=torch.int64, device="cpu")
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device="cpu")
        self.flat = torch.zeros((), dtype=torch.int64, device="cpu")
        self.moment = no_moment()
        self._per_example = handle.config.per_example
        self._warned_flat = False
        self._moves, self._measuring = 0, False
        self._batches_checked = False
        self._watched = Readback()
        self._running = threading.Lock()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While the body takes a step or a part of one, no other may. Raises RuntimeError if one is under way."""
        if not self._running.acquire(blocking=False):
            raise RuntimeError(
                "a step of this optimiser is under way: its closure calls step(), or two threads do; take one step at a time"
            )
        try:
            yield
        finally:
            self._running.release()

    def twin(self, step: Tensor) -> Stepper:
        """Makes a stepper for the same steps whose step is a tensor, without a pending update or a journal. Its settings are a copy
        without common random numbers, which its caller has to provide."""
        settings = dataclasses.replace(self.settings, common_random_numbers=False)
        twin = Stepper(self.handle, settings)
        twin.step = step
        return twin

    @property
    def count(self) -> int:
        """The number of steps taken so far, which is the index of the next one."""
        assert not isinstance(self.step, Tensor)
        return self.step

    @property
    def points(self) -> list[Perturbation]:
        """The perturbations, (direction, scale), that the weights go through in a step."""
        return self.points_of(measuring=False)

    def points_of(self, *, measuring: bool) -> list[Perturbation]:
        """As :attr:`points`, of a step that measures for ``lr="auto"``, which goes to both sides in any case, or of another."""
        eps = self.settings.eps
        scales = (eps, -eps) if self.settings.two_sided or measuring else (eps,)
        return [(direction, scale) for direction in range(self.settings.directions) for scale in scales]

    @property
    def parts(self) -> int:
        """The parts of a batch that have directions of their own, which are then the directions of a step; 1 without."""
        return self.settings.directions if self._splits else 1

    @property
    def _splits(self) -> bool:
        return self._per_example or self.settings.evaluation == "split"

    @property
    def last_point(self) -> Perturbation:
        """The perturbation that is in the weights after all evaluations."""
        return self.settings.directions - 1, -self.settings.eps if self.settings.two_sided else self.settings.eps

    def evaluate(
        self, closures: Sequence[Any], batches: Sequence[Any] | None = None, *, measuring: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Evaluates F(+) and F(-) (or F at the unperturbed weights) of every direction, and leaves the weights at the last point.

        Args:
            closures: micro-batches, whose mean is the loss.
            batches: what each closure is called with; None: nothing.
            measuring: measure for the learning rate too. There are several closures then, or several processes with examples.

        Returns:
            (directions,) fp64 each, on the device of the loss; with ``parallel`` those of all processes.
        """
        settings, splits = self.settings, self._splits
        alone = self._bound(closures, batches, splits=splits)
        if not isinstance(self.step, Tensor):
            self.guide(alone)
        conditions = self.handle.conditions(randomness=settings.common_random_numbers)
        self.measured, self._measuring = [], measuring
        if not isinstance(self.step, Tensor):  # otherwise prepare() was called
            self.handle.prepare(alone, conditions, step=self.step)
        try:
            if splits:
                assert batches is not None
                plus, minus = self._evaluate_split(closures, batches, conditions, measuring=measuring)
            elif measuring:
                plus, minus, self.measured = evaluate_parts(self, alone, conditions)
            elif settings.evaluation == "batched":
                assert batches is not None
                plus, minus = self._evaluate_together(closures, batches, conditions)
            else:
                plus, minus = self._evaluate_in_turn(alone, conditions)
        except BaseException:
            conditions.put_back()  # the step was not taken
            raise
        if self.parallel is None:
            return torch.stack(plus), torch.stack(minus)
        return self.parallel.combine(self.count, plus, minus, settings.directions)

    def prepare(self, closures: Sequence[Any], batches: Sequence[Any] | None = None) -> None:
        """Makes what :meth:`evaluate` makes before its evaluations, for the steps of a :meth:`twin`, which read no value."""
        alone = self._bound(closures, batches, splits=self._splits)
        self.guide(alone)
        self.handle.enter_window(self.count)
        conditions = self.handle.conditions(randomness=self.settings.common_random_numbers)
        try:
            self.handle.prepare(alone, conditions, step=self.count)
            if self.settings.by_example:
                assert batches is not None
                self._check_batches(closures, batches, conditions)
        finally:
            conditions.put_back()

    def guide(self, closures: Sequence[Closure]) -> None:
        """With AGZO, makes the V of a window that begins with this step; see :meth:`Handle.guide`."""
        guidance = self.handle.guidance
        if guidance is None or guidance.window == self.count // self.handle.config.interval:
            return
        spread = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if spread and self.handle.backward is not None:
            raise RuntimeError(
                "several processes with drive='backward' would each make a V of their own, and AGZO needs one: use LOZO, or "
                "step(closure) with parallel='examples'"
            )
        if self.pending is not None:
            self.make(self.pending)  # no pass belongs to two windows, so that it would be a pass of its own in any case
        together = in_one_process if self.parallel is None else self.parallel.agree
        self.handle.guide(closures, step=self.count, together=together)

    def differences(self, plus: Tensor, minus: Tensor) -> Tensor:
        """Returns c, the projected gradients, (directions,) fp64."""
        # Divide by a tensor: a GPU divides by a number by multiplying with its reciprocal, which rounds differently.
        distance = 2 * self.settings.eps if self.settings.two_sided else self.settings.eps
        return (plus - minus) / torch.full((), distance, dtype=torch.float64, device=plus.device)

    def mean(self, plus: Tensor, minus: Tensor) -> Tensor:
        """Returns the loss of the step, 0-dim fp64."""
        return (plus + minus).mean() / 2 if self.settings.two_sided else minus[0]

    def estimate(self, closures: Sequence[Any], batches: Sequence[Any] | None = None) -> tuple[Tensor, Tensor]:
        """Evaluates at the points of the next step without taking it, and puts the weights back.

        Args:
            closures, batches: as for :meth:`evaluate`.

        Returns:
            (3, directions) fp64: c, F(+) and F(-); and the loss of the step.
        """
        with deferred_interrupt(), self.alone():
            try:
                plus, minus = self.evaluate(closures, batches)
            finally:
                self.go_back()
        return torch.stack((self.differences(plus, minus), plus, minus)), self.mean(plus, minus)

    def conclude(self, c: Tensor, plus: Tensor, minus: Tensor, rates: Rates) -> tuple[Update, StepInfo]:
        """Returns the update that a step's losses ask for. No value is read, since a skipped update is an update by zero. It is
        skipped if c is not finite, or what it does to weights would not be in fp32.

        Args:
            c: as :meth:`differences` makes it; a number that is not finite skips the update.
            plus, minus: what :meth:`evaluate` returned.
        """
        along, moment = c, self.moment.to(c.device, non_blocking=True)
        if self.settings.normalise is not None:
            along, taken = normalised(self.settings.normalise, c, moment)
        moved = along * torch.clamp(rates.lr.max() * _LARGEST_DIRECTION, min=1.0)
        good = torch.isfinite(moved.to(torch.float32)).all()  # kernels compute in fp32: a loss of 1e38 is finite, its update is not
        flat = self.flat.to(c.device, non_blocking=True)
        flat = torch.where(c.any(), flat - 1, flat + 1).clamp(min=0)  # a c that is not a number is not zero
        c, along = torch.where(good, c, 0.0), torch.where(good, along, 0.0)
        if self.settings.normalise is not None:
            moment = torch.where(good, taken, moment)
        beta = None
        if self.settings.momentum or self.handle.estimator.carries:  # rounded to fp32, whatever torch's default dtype is
            momentum = torch.full((), self.settings.momentum, dtype=torch.float32, device=c.device)
            beta = torch.where(good, momentum, 1.0).to(torch.float64)
        update = Update(self.step, list(along.unbind()), torch.where(good, rates.lr, 0.0), rates.weight_decay, beta)
        total = self.skipped_total.to(c.device, non_blocking=True) + ~good
        in_a_row = (self.skipped_in_a_row.to(c.device, non_blocking=True) + 1) * ~good
        number = -1 if isinstance(self.step, Tensor) else self.step
        return update, StepInfo(number, self.mean(plus, minus), plus, minus, c, ~good, total, in_a_row, flat, moment)

    def commit(self, update: Update, info: StepInfo) -> None:
        """Takes the step: makes the update or leaves it pending. A journal records the step before the weights change."""
        with deferred_interrupt():
            if self.log is not None:
                self.log.add_step(info)
            try:
                if self.settings.fuse_steps:
                    self.pending = update
                else:
                    self.make(update)
            except BaseException:
                if self.log is not None:
                    self.log.take_back()
                raise
            self._count(info)

    def make(self, update: Update, perturb_next: float | None = None) -> None:
        """Updates the weights, takes the applied perturbation out and, if asked, makes that of the next step, in one pass."""
        self.handle.take(update, 0.0 if self.applied is None else self.applied[1], perturb_next)
        self.pending, self.applied = None, None if perturb_next is None else (0, perturb_next)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """While the body runs, its caller handles what is pending and applied. If the body raises, both are restored."""
        before = self.pending, self.applied
        self.pending, self.applied = None, None
        try:
            yield
        except BaseException:
            self.pending, self.applied = before
            raise

    def took(self, info: StepInfo, pending: Update | None) -> None:
        """Records a step that a captured graph took.

        Args:
            pending: the update that the graph left pending, or None.
        """
        if pending is not None:
            self.pending, self.applied = pending, self.last_point
        self._count(info)
        if self.log is not None:
            self.log.add_step(info)

    def flush(self) -> bool:
        """Makes an update that is pending. Returns whether there was one."""
        if self.pending is None:
            return False
        with torch.no_grad(), deferred_interrupt():
            if self.log is not None:
                self.log.add_flush()
            self.make(self.pending)
        return True

    def go_back(self) -> None:
        """Takes the perturbation of a step that is not taken, or not yet, out of the weights."""
        with deferred_interrupt():
            self.move(None)
            if self._moves and self.log is not None:
                self.log.add_detour(self._moves, measuring=self._measuring)
            self._moves = 0

    def visit(self, points: Sequence[Perturbation]) -> None:
        """Moves the weights through some points without an evaluation, as a replay has to: every move rounds the weights.

        If evaluations move no weights, only the last point is noted.
        """
        with deferred_interrupt():
            if not self.settings.two_sided:
                self.flush()
            if self.handle.moves_weights:
                for point in points:
                    self.move(point)
            else:
                self.applied = points[-1]

    def leave(self) -> None:
        """Takes out of the weights the perturbation that :meth:`visit` left."""
        if self.handle.moves_weights:
            self.move(None)
        else:
            self.applied = None

    def move(self, target: Perturbation | None) -> None:
        """Moves the weights from the applied perturbation to another one of the current step, or to none."""
        self._moves += target is not None
        if self.pending is not None:
            if target is not None:
                assert target[0] == 0
                self.make(self.pending, perturb_next=target[1])
            return  # without a target there is nothing to undo: the weights are where the step before left them
        if not _same_point(target, self.applied):
            self.handle.move(self.step, self.applied, target)
            self.applied = target

    def watch(self, loss: Tensor) -> None:
        """Warns if losses were not finite, and raises NonFiniteLossError after ``max_nonfinite`` in a row. Warns once if F(+) and
        F(-) are equal step after step. On a GPU this is some steps late, because it does not wait for the device."""
        counts = self._watched.read(lambda: torch.stack((self.skipped_in_a_row, self.skipped_total, self.flat)))
        if counts is None:
            return
        in_a_row, total, flat = counts
        if flat >= FLAT_STEPS and not self._warned_flat and self.info is not None:
            self._warned_flat = True
            warnings.warn(why_flat(self.info, self.handle, self.settings.eps), stacklevel=4)
        if in_a_row >= self.settings.max_nonfinite:
            self.flush()
            raise NonFiniteLossError(
                f"the loss, or the step that it asks for, was not finite {in_a_row} steps in a row (last loss: {float(loss)}, at "
                f"step {self.count - 1}); the weights are those of the last good step. Lower lr or eps, look for overflow in "
                "half precision, or, if closures return (sum, weight), for weights that are no counts"
            )
        if in_a_row:
            warnings.warn(
                f"step {self.count - 1}: the loss, or the step that it asks for, was not finite; update skipped ({total} in all)",
                stacklevel=4,
            )

    def _count(self, info: StepInfo) -> None:
        self.step = self.count + 1
        if self.finder is not None and self.measured:
            self.finder.add(self.measured)
        self.measured = []
        self._moves = 0
        self.info = info
        self.skipped_total, self.skipped_in_a_row, self.flat = info.skipped_total, info.skipped_in_a_row, info.flat
        self.moment = info.moment

    def _check_batches(self, closures: Sequence[BatchClosure], batches: Sequence[Any], conditions: Conditions) -> None:
        if not self._batches_checked:
            parts = self.parts if self._per_example else 1
            self._batches_checked = self.handle.check_batches(closures, batches, conditions, step=self.count, parts=parts)

    def _bound(self, closures: Sequence[Any], batches: Sequence[Any] | None, *, splits: bool) -> Sequence[Closure]:
        """The closures without arguments. Raises TypeError or ValueError if examples cannot have the directions of the step."""
        if splits:
            self._check_parts(batches)
        return closures if batches is None else bind_inputs(closures, batches, self.parts)

    def _check_parts(self, batches: Sequence[Any] | None) -> None:
        """Raises TypeError or ValueError unless each part of the batches can have a direction of its own."""
        if batches is None:
            raise TypeError(
                "each part of a batch has its own direction, so step(closure, inputs) needs a closure that takes the inputs and "
                "returns one loss for each example, or sums and weights"
            )
        for count in map(count_examples, batches):
            if self.finder is not None and count % (2 * self.parts):
                raise ValueError(
                    f"lr='auto' needs both halves of the {self.parts} parts of a batch, of which one has {count} examples here: "
                    f"give a multiple of {2 * self.parts}, another number of directions, or a number for lr"
                )
            if count % self.parts:
                raise ValueError(
                    f"a batch of {count} examples does not divide into directions={self.parts} equal parts: leave such a batch out "
                    "(drop_last=True of a DataLoader, take() of a stream), or give another number of directions"
                )

    def is_mine(self, direction: int) -> bool:
        """Whether this process evaluates a direction."""
        return self.parallel is None or self.parallel.evaluates(direction, self.settings.directions)

    def _evaluate_in_turn(self, closures: Sequence[Closure], conditions: Conditions) -> tuple[list[Tensor], list[Tensor]]:
        plus: list[Tensor] = []
        minus: list[Tensor] = []
        evaluate = mean_loss if self.parallel is None else mean_totals
        directions, two_sided, eps = self.settings.directions, self.settings.two_sided, self.settings.eps
        if not two_sided:
            self.enter()
            minus = [evaluate(closures, conditions)] * sum(map(self.is_mine, range(directions)))
        for d in range(directions):
            # Other processes' directions are moved along too: every move rounds the weights, and all processes have to round alike.
            mine = self.is_mine(d)
            self.move((d, eps))
            if mine:
                plus.append(evaluate(closures, conditions))
            if two_sided:
                self.move((d, -eps))
                if mine:
                    minus.append(evaluate(closures, conditions))
        return plus, minus

    def enter(self) -> None:
        """Before F(0): makes what is pending, and what a window's begin does to the weights, which the other evaluations see too. A
        merge rounds: F(+) after it less F(0) before it would have that in c."""
        if self.pending is not None:
            self.make(self.pending)
        if not isinstance(self.step, Tensor):  # otherwise prepare() and every replay enter it
            self.handle.enter_window(self.step)

    def _evaluate_together(
        self, closures: Sequence[BatchClosure], batches: Sequence[Any], conditions: Conditions
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Makes all evaluations in one call of each closure."""
        handle, two_sided = self.handle, self.settings.two_sided
        examples = _examples_of(batches)
        if not isinstance(self.step, Tensor):
            self._check_batches(closures, batches, conditions)
        offsets = [point for point in self.points if self.is_mine(point[0])]
        if not two_sided:
            offsets.append((0, 0.0))
        try:
            handle.spread_(self.step, offsets, examples)
            evaluate = batch_losses if self.parallel is None else batch_totals
            losses = evaluate(closures, batches, len(offsets), conditions)
        finally:
            handle.rest_()
        if two_sided:
            return list(losses[0::2]), list(losses[1::2])
        return list(losses[:-1]), [losses[-1]] * (len(offsets) - 1)

    def _evaluate_split(
        self, closures: Sequence[BatchClosure], batches: Sequence[Any], conditions: Conditions, *, measuring: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Evaluates each part of the batch along its own direction, all of them at once, on one side and on the other; to measure
        also at the weights, and each part in halves."""
        handle, parts, eps = self.handle, self.parts, self.settings.eps
        examples = _examples_of(batches)
        if parts > 1 and not isinstance(self.step, Tensor):
            self._check_batches(closures, batches, conditions)
        evaluate = batch_losses if self.parallel is None else batch_totals
        sides = []
        try:
            for scale in (eps, -eps, 0.0) if measuring else (eps, -eps):
                if self._per_example:  # one draw, to which every part adds its own signs
                    handle.spread_(self.step, [(0, scale)], examples, parts)
                else:
                    handle.spread_(self.step, [(d, scale) for d in range(parts)], examples // parts)
                sides.append(evaluate(closures, batches, 2 * parts if measuring else parts, conditions, apart=True))
        finally:
            handle.rest_()
        if measuring:
            self.measured = measure_split(sides, self.parallel, eps=eps)
            sides = [halves.view(parts, 2, *halves.shape[1:]).mean(1) for halves in sides]
        return list(sides[0]), list(sides[1])


def _examples_of(batches: Sequence[Any]) -> int:
    """The examples of each of the batches. Raises ValueError if they have several numbers."""
    examples = {count_examples(inputs) for inputs in batches}
    if len(examples) > 1:
        raise ValueError(f"micro-batches that are evaluated together have one number of examples, not {sorted(examples)}")
    return examples.pop()


def _same_point(a: Perturbation | None, b: Perturbation | None) -> bool:
    """Whether two perturbations are the same. 0.0 and -0.0 differ, so that a warm-up with eps = 0 makes every pass of a step."""
    return a == b and (a is None or b is None or math.copysign(1.0, a[1]) == math.copysign(1.0, b[1]))
