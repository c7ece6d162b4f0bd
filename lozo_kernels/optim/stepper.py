"""The step machine: evaluates a loss at the points of a step, makes c of the losses, and updates the weights.

An optimiser, a captured graph, a loop that calls ``backward()`` and the replay of a journal are its clients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteLossError
from ..kernels.calls import Step
from ..model.handle import Handle, Perturbation
from ..model.interrupts import deferred_interrupt
from ..model.losses import (
    BatchClosure,
    Closure,
    Randomness,
    batch_losses,
    batch_totals,
    bind_inputs,
    count_examples,
    mean_loss,
    mean_totals,
)
from ..model.passes import Update
from .parallel import Parallel
from .readback import Readback
from .steps import Rates, StepInfo, StepLog, StepSettings


class Stepper:
    """Takes the steps of one run on one handle, and waits for no value on a device.

    A step is :meth:`evaluate`, :meth:`conclude`, :meth:`commit`; :meth:`go_back` if one of them raised.

    Attributes:
        handle: what moves the weights, or the point where they are evaluated.
        settings: of the steps.
        step: the index of the next step; in a captured step a 0-dim int64 tensor, which is not read.
        parallel: how several processes take the steps together, or None.
        log: who is told of steps, or None.
        info: what the last step saw.
        pending: the update of the last step, where it is left for the next pass over the weights (``fuse_steps``).
        applied: the perturbation that the weights have now, None for none. Under a pending update it is still that of its step.
        skipped_total, skipped_in_a_row: 0-dim integers, as in :class:`StepInfo`.
    """

    def __init__(self, handle: Handle, settings: StepSettings, parallel: Parallel | None = None) -> None:
        self.handle = handle
        self.settings = settings
        self.parallel = parallel
        self.step: Step = 0
        self.log: StepLog | None = None
        self.info: StepInfo | None = None
        self.pending: Update | None = None
        self.applied: Perturbation | None = None
        self.skipped_total = torch.zeros((), dtype=torch.int64, device="cpu")
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device="cpu")
        self._moves = 0
        self._batches_checked = False
        self._watched = Readback()

    def twin(self, step: Tensor) -> Stepper:
        """A stepper for the same steps that has their number in a tensor, with nothing pending, nobody to tell, and settings of
        its own: common random numbers are for its caller to see to."""
        settings = dataclasses.replace(self.settings, common_random_numbers=False)
        twin = Stepper(self.handle, settings)
        twin.step = step
        return twin

    @property
    def count(self) -> int:
        """Steps taken so far, which is the index of the next one."""
        assert not isinstance(self.step, Tensor)
        return self.step

    @property
    def points(self) -> list[Perturbation]:
        """The (direction, scale) that the weights go through in a step."""
        eps = self.settings.eps
        scales = (eps, -eps) if self.settings.two_sided else (eps,)
        return [(direction, scale) for direction in range(self.settings.directions) for scale in scales]

    @property
    def last_point(self) -> Perturbation:
        """Where the weights are when all evaluations are made."""
        return self.settings.directions - 1, -self.settings.eps if self.settings.two_sided else self.settings.eps

    def evaluate(self, closures: Sequence[Any], batches: Sequence[Any] | None = None) -> tuple[Tensor, Tensor]:
        """F(+) and F(-) (or F at the unperturbed weights) of every direction; leaves the weights at the last point.

        Args:
            closures: micro-batches, whose mean is the loss.
            batches: what each closure is called with; None: nothing.

        Returns:
            (directions,) fp64 each, on the device of the loss; with ``parallel`` those of all processes.
        """
        settings = self.settings
        randomness = Randomness(self.handle.devices) if settings.common_random_numbers else None
        alone = closures if batches is None else bind_inputs(closures, batches)
        self.handle.prepare(alone, randomness, step=0 if isinstance(self.step, Tensor) else self.step)
        if settings.evaluation == "batched":
            assert batches is not None
            plus, minus = self._evaluate_together(closures, batches, randomness)
        else:
            plus, minus = self._evaluate_in_turn(alone, randomness)
        if self.parallel is None:
            return torch.stack(plus), torch.stack(minus)
        return self.parallel.combine(self.count, plus, minus, settings.directions)

    def differences(self, plus: Tensor, minus: Tensor) -> Tensor:
        """c: the projected gradients, (directions,) fp64."""
        # By a tensor: a GPU divides by a number as a multiplication by its reciprocal, which rounds differently.
        distance = 2 * self.settings.eps if self.settings.two_sided else self.settings.eps
        return (plus - minus) / torch.full((), distance, dtype=torch.float64, device=plus.device)

    def mean(self, plus: Tensor, minus: Tensor) -> Tensor:
        """The loss of the step, 0-dim fp64."""
        return (plus + minus).mean() / 2 if self.settings.two_sided else minus[0]

    def estimate(self, closures: Sequence[Closure]) -> tuple[Tensor, Tensor]:
        """Evaluates at the points of the next step without taking it; the weights are then back where they were.

        Returns:
            (3, directions) fp64: c, F(+) and F(-); and the loss of the step.
        """
        with deferred_interrupt():
            try:
                plus, minus = self.evaluate(closures)
            finally:
                self.go_back()
        return torch.stack((self.differences(plus, minus), plus, minus)), self.mean(plus, minus)

    def conclude(self, c: Tensor, plus: Tensor, minus: Tensor, rates: Rates) -> tuple[Update, StepInfo]:
        """The update that a step's losses ask for. Reads no value: a skipped update is an update by zero, so nothing waits.

        Args:
            c: as :meth:`differences` makes it; a number that is not finite skips the update.
            plus, minus: what :meth:`evaluate` returned.
        """
        good = torch.isfinite(c).all()
        c = torch.where(good, c, 0.0)
        beta = None
        if self.settings.momentum:  # rounded to fp32, whatever torch's default dtype is
            momentum = torch.full((), self.settings.momentum, dtype=torch.float32, device=c.device)
            beta = torch.where(good, momentum, 1.0).to(torch.float64)
        update = Update(self.step, list(c.unbind()), torch.where(good, rates.lr, 0.0), rates.weight_decay, beta)
        total = self.skipped_total.to(c.device, non_blocking=True) + ~good
        in_a_row = (self.skipped_in_a_row.to(c.device, non_blocking=True) + 1) * ~good
        number = -1 if isinstance(self.step, Tensor) else self.step
        return update, StepInfo(number, self.mean(plus, minus), plus, minus, c, ~good, total, in_a_row)

    def commit(self, update: Update, info: StepInfo) -> None:
        """Takes the step: makes the update or leaves it pending. A journal has it before the weights do."""
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
        """Updates the weights, takes out what is applied, and perturbs for the next step in the same pass if that is asked for."""
        self.handle.take(update, 0.0 if self.applied is None else self.applied[1], perturb_next)
        self.pending, self.applied = None, None if perturb_next is None else (0, perturb_next)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """What is pending and applied is seen to by somebody else in the body; it is back if the body raises."""
        before = self.pending, self.applied
        self.pending, self.applied = None, None
        try:
            yield
        except BaseException:
            self.pending, self.applied = before
            raise

    def took(self, info: StepInfo, pending: Update | None) -> None:
        """Notes a step that a captured graph took.

        Args:
            pending: the update that it left, or None.
        """
        if pending is not None:
            self.pending, self.applied = pending, self.last_point
        self._count(info)
        if self.log is not None:
            self.log.add_step(info)

    def flush(self) -> None:
        """Makes an update that is pending; otherwise does nothing."""
        if self.pending is None:
            return
        with torch.no_grad(), deferred_interrupt():
            if self.log is not None:
                self.log.add_flush()
            self.make(self.pending)

    def go_back(self) -> None:
        """Takes the perturbations of a step that is not taken, or not yet, out of the weights."""
        with deferred_interrupt():
            self.move(None)
            if self._moves and self.log is not None:
                self.log.add_detour(self._moves)
            self._moves = 0

    def visit(self, points: Sequence[Perturbation]) -> None:
        """Moves the weights through some points without an evaluation, as a replay does: moved weights round at each.

        Where evaluations move no weights, only the last point is noted.
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
        """The inverse of :meth:`visit`: the weights as they are without a perturbation."""
        if self.handle.moves_weights:
            self.move(None)
        else:
            self.applied = None

    def move(self, target: Perturbation | None) -> None:
        """Brings the weights from where they are to a perturbation of the present step, or to none."""
        self._moves += target is not None
        if self.pending is not None:
            if target is not None:
                assert target[0] == 0
                self.make(self.pending, perturb_next=target[1])
            return  # where a step is given up there is nothing of it to undo: the weights are still at the update before
        if not _same_point(target, self.applied):
            self.handle.move(self.step, self.applied, target)
            self.applied = target

    def watch(self, loss: Tensor) -> None:
        """Warns or raises about losses that were not finite; on a GPU some steps late, because it does not wait for the device.

        Raises:
            NonFiniteLossError: ``max_nonfinite`` in a row.
        """
        counts = self._watched.read(lambda: torch.stack((self.skipped_in_a_row, self.skipped_total)))
        if counts is None:
            return
        in_a_row, total = counts
        if in_a_row >= self.settings.max_nonfinite:
            self.flush()
            raise NonFiniteLossError(
                f"the loss was not finite {in_a_row} steps in a row (last: {float(loss)} at step {self.count - 1}); "
                "the weights are those of the last good step. Lower lr or eps, or look for overflow in half precision"
            )
        if in_a_row:
            warnings.warn(
                f"step {self.count - 1}: the loss was not finite; update skipped ({total} in all)",
                stacklevel=4,
            )

    def _count(self, info: StepInfo) -> None:
        self.step = self.count + 1
        self._moves = 0
        self.info = info
        self.skipped_total, self.skipped_in_a_row = info.skipped_total, info.skipped_in_a_row

    def _is_mine(self, direction: int) -> bool:
        """Whether this process evaluates a direction."""
        return self.parallel is None or self.parallel.evaluates(direction, self.settings.directions)

    def _evaluate_in_turn(self, closures: Sequence[Closure], randomness: Randomness | None) -> tuple[list[Tensor], list[Tensor]]:
        plus: list[Tensor] = []
        minus: list[Tensor] = []
        evaluate = mean_loss if self.parallel is None else mean_totals
        directions, two_sided, eps = self.settings.directions, self.settings.two_sided, self.settings.eps
        if not two_sided:
            if self.pending is not None:
                self.make(self.pending)
            minus = [evaluate(closures, randomness)] * sum(map(self._is_mine, range(directions)))
        for d in range(directions):
            # Also along directions that other processes evaluate: weights that are moved round, and have to round alike.
            mine = self._is_mine(d)
            self.move((d, eps))
            if mine:
                plus.append(evaluate(closures, randomness))
            if two_sided:
                self.move((d, -eps))
                if mine:
                    minus.append(evaluate(closures, randomness))
        return plus, minus

    def _evaluate_together(
        self, closures: Sequence[BatchClosure], batches: Sequence[Any], randomness: Randomness | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """In one call of each closure."""
        handle, two_sided = self.handle, self.settings.two_sided
        examples = {count_examples(inputs) for inputs in batches}
        if len(examples) > 1:
            raise ValueError(f"micro-batches that are evaluated together have one number of examples, not {sorted(examples)}")
        if not self._batches_checked:
            handle.check_batches(closures, batches, randomness, step=self.count)
            self._batches_checked = True
        offsets = [point for point in self.points if self._is_mine(point[0])]
        if not two_sided:
            offsets.append((0, 0.0))
        try:
            handle.spread_(self.step, offsets, examples.pop())
            evaluate = batch_losses if self.parallel is None else batch_totals
            losses = evaluate(closures, batches, len(offsets), randomness)
        finally:
            handle.rest_()
        if two_sided:
            return list(losses[0::2]), list(losses[1::2])
        return list(losses[:-1]), [losses[-1]] * (len(offsets) - 1)


def _same_point(a: Perturbation | None, b: Perturbation | None) -> bool:
    """Whether two perturbations are one. 0.0 and -0.0 are not: a warm-up with eps = 0 makes every pass that a step makes."""
    return a == b and (a is None or b is None or math.copysign(1.0, a[1]) == math.copysign(1.0, b[1]))
