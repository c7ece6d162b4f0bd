"""LOZO, LOZO-M, MeZO and MeZO-M as ``torch.optim.Optimizer`` subclasses that never call backward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteLossError
from ..kernels.checks import check_count, check_flag, check_number
from ..model.backward import Drive, drive_of
from ..model.handle import Handle
from ..model.interrupts import as_interruptible, deferred_interrupt
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
    pair_closures,
)
from ..model.patching import patch
from ..model.probe import ProbeHandle, check_batches
from .groups import groups_of
from .parallel import Parallel, as_parallel, shared_shards
from .readback import Readback
from .stepper import EstimatingOptimizer
from .steps import Pending, StepInfo, StepInputs, StepLog

EVALUATIONS = ("sequential", "batched")


class ZerothOrderOptimizer(EstimatingOptimizer):
    """Two-point (or one-sided) estimates along directions that are regenerated, never stored. Use a subclass.

    ``step(closure)`` evaluates the closure without a graph at perturbed weights and updates them in place; a step costs two
    forward passes per direction (one more forward in all when one-sided) and three passes over the weights, or two with
    ``fuse_steps``.

    Args:
        target: a model, which is patched with ``patch_options``, or the :class:`Handle` of one that is.
        params: parameter groups as torch takes them (parameters, named parameters, or dicts with "params" and "lr" or
            "weight_decay"); they must cover the patched parameters. None: one group of all.
        lr: learning rate alpha; may be a 0-dim tensor.
        eps: perturbation scale epsilon.
        momentum: beta of LOZO-M / MeZO-M; 0 for none.
        weight_decay: decoupled: X is multiplied by 1 - lr * weight_decay at each update.
        directions: directions per step, whose estimates are averaged.
        two_sided: (F(+) - F(-)) / (2 eps); False: (F(+) - F) / eps.
        fuse_steps: leave the update of a step pending and make it in the same pass as the next perturbation. The weights are
            brought up to date before any forward pass, ``state_dict()`` or ``load_state_dict()`` of the model outside ``step``;
            call :meth:`flush` before reading ``param.data`` directly. In half precision the fused pass rounds once where two
            passes round twice, so evaluating between steps changes low-order bits of the run.
        evaluation: "sequential", one forward pass after the other; or "batched", all evaluations of a step in one forward pass
            that reads the weights once, for few tokens. The latter needs a probe, ``step(closure, inputs)`` and memory for the
            activations of all; dropout then differs between evaluations.
        common_random_numbers: give every evaluation of a step the same state of torch's generators (dropout, sampling).
        max_nonfinite: raise :class:`NonFiniteLossError` after this many steps in a row with a loss that is not finite.
        parallel: several processes take each step together: "examples", each evaluates its own, "directions", each evaluates some
            of them, or a :class:`~lozo_kernels.Parallel`, whose page says what is exchanged and compared. None: this
            process is alone, or others see to it; "examples" if the model is sharded over all.
        patch_options: see :func:`patch`; only with a model as target. ``drive="backward"`` is for loops that call
            ``loss.backward()`` and ``step()``.

    Raises:
        TypeError, ValueError: an argument does not fit; the model is untouched.
    """

    _estimator = "lowrank"

    def __init__(
        self,
        target: nn.Module | Handle,
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-6,
        eps: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        directions: int = 1,
        two_sided: bool = True,
        fuse_steps: bool = False,
        evaluation: str = "sequential",
        common_random_numbers: bool = True,
        max_nonfinite: int = 10,
        parallel: Parallel | str | None = None,
        **patch_options: Any,
    ) -> None:
        check_number("lr", lr, low=0.0)
        check_number("eps", eps, low=0.0, open_low=True)
        check_number("momentum", momentum, low=0.0, high=1.0)
        check_number("weight_decay", weight_decay, low=0.0)
        check_count("directions", directions)
        check_count("max_nonfinite", max_nonfinite)
        for name, flag in (("two_sided", two_sided), ("fuse_steps", fuse_steps), ("common_random_numbers", common_random_numbers)):
            check_flag(name, flag)
        self.parallel = as_parallel(parallel)
        if evaluation not in EVALUATIONS:
            raise ValueError(f"evaluation is one of {', '.join(map(repr, EVALUATIONS))}, not {evaluation!r}")
        if isinstance(target, Handle) and patch_options:
            raise TypeError(f"the handle is configured already; give {', '.join(patch_options)} to patch()")
        handle = target if isinstance(target, Handle) else patch(target, estimator=self._estimator, **patch_options)
        try:
            if handle.config.estimator != self._estimator:
                raise ValueError(
                    f"{type(self).__name__} needs a handle with estimator={self._estimator!r}, "
                    f"and this one has {handle.config.estimator!r}"
                )
            self._check_placement(handle, fuse_steps, evaluation)
            if self.parallel is None and drive_of(handle) is None:
                self.parallel = shared_shards(handle.model)
            if self.parallel is not None and drive_of(handle) is not None:
                raise ValueError("with drive='backward' DistributedDataParallel averages over processes: leave parallel out")
            self.handle = handle
            self._drive: Drive | None = None
            super().__init__(groups_of(handle, params), {"lr": lr, "weight_decay": weight_decay})
            self._check_cover()
        except BaseException:
            if handle is not target:
                handle.restore()
            raise
        self.eps = eps
        self.momentum = momentum
        self.directions = directions
        self.two_sided = two_sided
        self.common_random_numbers = common_random_numbers
        self.max_nonfinite = max_nonfinite
        self.fuse_steps = fuse_steps
        self.evaluation = evaluation
        self._batches_checked = False
        self.info: StepInfo | None = None
        self.journal: StepLog | None = None
        self._step = 0
        self._moves = 0
        self._inputs: StepInputs | None = None
        self._standing: tuple[int, float] | None = None
        self._pending: Pending | None = None
        self._skipped_total = torch.zeros((), dtype=torch.int64)
        self._skipped_in_a_row = torch.zeros((), dtype=torch.int64)
        self._watched = Readback()
        if momentum:
            handle.enable_momentum()
        if self.parallel is not None:
            try:
                self.parallel.connect(handle, directions, self._facts())
            except BaseException:
                if handle is not target:
                    handle.restore()
                raise
        if fuse_steps:
            handle.guard(self.flush)
        self._drive = drive_of(handle)
        if self._drive is not None:
            self._drive.connect(self)

    @property
    def steps_done(self) -> int:
        """Steps taken so far, which is the index of the next one."""
        return self._step

    @property
    def projected_gradient(self) -> Tensor | None:
        """(directions,) fp64: with ``drive="backward"``, c as backward has accumulated it since the last step, or None."""
        gradient = None if self._drive is None else self._drive.gradient
        return None if gradient is None else gradient[0]

    @torch.no_grad()
    def step(self, closure: Any = None, inputs: Any = None) -> Tensor:  # type: ignore[override]
        """One step of the algorithm.

        Args:
            closure: returns the loss of a batch as a one-element tensor or a number, without calling backward; it is called
                once per evaluation and must mean the same batch each time. Several closures are micro-batches: their mean is
                the objective of the step.
            inputs: what the closure is called with, a tensor or any nest of tensors, examples first; one for each of several
                closures. The closure may then return one loss per example, or (sums, weights) of the examples, and must for
                ``evaluation="batched"``, where it gets the examples once for each evaluation. None: it is called without.

        With ``drive="backward"``, step() uses what backward has accumulated; a closure is called once and does that first.

        Returns:
            0-dim fp64 tensor, on the device of the loss: :attr:`StepInfo.loss`.

        Raises:
            TypeError: no closure, or one that does not return a loss.
            RuntimeError: with ``drive="backward"``, nothing was backpropagated since the last step.
            BatchSplitError: the model cannot evaluate several points in one forward pass.
            NonFiniteLossError: see ``max_nonfinite``.
            PeerLostError, DivergenceError: with ``parallel``, a process is gone, or its run is another.
            Exception: whatever the closure raises; the weights are then back where they were (in place, up to one rounding of
                the weight's dtype), and the step was not taken.
        """
        if self._drive is not None:
            return self._step_after_backward(self._drive, closure, inputs)
        closures, batches = pair_closures(closure, inputs)
        if self.evaluation == "batched" and batches is None:
            raise TypeError("evaluation='batched' needs step(closure, inputs), with a closure that takes the inputs")
        closures = [as_interruptible(one) for one in closures]
        one_by_one = closures if batches is None else bind_inputs(closures, batches)
        with deferred_interrupt():
            try:
                randomness = Randomness(self.handle.devices) if self.common_random_numbers else None
                self.handle.prepare(one_by_one, randomness, step=self._step)
                if self.evaluation == "batched":
                    assert batches is not None
                    pending, info = self._estimate(*self._evaluate_together(closures, batches, randomness))
                else:
                    pending, info = self._estimate(*self._evaluate(one_by_one, randomness))
                self._commit(pending, info)
            except BaseException:
                self._go_back()
                raise
            if self.parallel is not None:
                settings = [float(group[key]) for group in self.param_groups for key in ("lr", "weight_decay")]
                self.parallel.committed(info, settings)
        self._watch_losses(info.loss)
        return info.loss

    def _step_after_backward(self, drive: Drive, closure: Any, inputs: Any) -> Tensor:
        if inputs is not None:
            raise TypeError("with drive='backward' the model is called with its inputs before step()")
        if closure is not None:
            with torch.enable_grad():
                closure()
        pending, info = self._conclude(*drive.take())
        self._commit(pending, info)
        self._watch_losses(info.loss)
        return info.loss

    @torch.no_grad()
    def estimate(self, closure: Closure) -> tuple[Tensor, Tensor]:
        """Evaluates a loss at the points of the next step, which it does not take; the weights are then back where they were.

        Returns:
            (3, directions) fp64: projected gradients, F(+) and F(-); and the loss of the step, 0-dim fp64.
        """
        closures = [as_interruptible(closure)]
        with deferred_interrupt():
            try:
                randomness = Randomness(self.handle.devices) if self.common_random_numbers else None
                self.handle.prepare(closures, randomness, step=self._step)
                plus, minus = self._losses(*self._evaluate(closures, randomness))
            finally:
                self._go_back()
        return torch.stack((self._differences(plus, minus), plus, minus)), self._mean(plus, minus)

    def flush(self) -> None:
        """Makes an update that ``fuse_steps`` left pending; otherwise does nothing."""
        with deferred_interrupt():
            if self._pending is not None and self.journal is not None:
                self.journal.add_flush()
            self._make_pending()

    def _make_pending(self) -> None:
        pending = self._pending
        if pending is not None:
            with torch.no_grad(), deferred_interrupt():
                self._update(pending, perturb_next=None)
                self._pending, self._standing = None, None

    @staticmethod
    def _check_placement(handle: Handle, fuse_steps: bool, evaluation: str) -> None:
        probing = isinstance(handle, ProbeHandle)
        if drive_of(handle) is not None and (fuse_steps or evaluation == "batched"):
            which = "fuse_steps leaves weights perturbed" if fuse_steps else "evaluation='batched' needs the loss of each example"
            raise ValueError(f"{which}, which drive='backward' does not allow: leave it out, or use step(closure)")
        if fuse_steps and probing:
            raise ValueError("fuse_steps saves a pass over the weights, and a probe makes none: leave it out")
        if fuse_steps and handle.sharded:
            raise ValueError("fuse_steps makes updates during forward passes, when weights are not in shards: leave it out")
        if evaluation == "batched" and not probing:
            raise ValueError("evaluation='batched' needs placement='probe': weights that are moved can be at one point only")

    def _evaluate(self, closures: Sequence[Closure], randomness: Randomness | None) -> tuple[list[Tensor], list[Tensor]]:
        """F(+) and F(-) (or F(0)) of each direction; leaves the weights at the last point that was evaluated."""
        plus: list[Tensor] = []
        minus: list[Tensor] = []
        evaluate = mean_loss if self.parallel is None else mean_totals
        mine = [self.parallel is None or self.parallel.evaluates(d, self.directions) for d in range(self.directions)]
        if not self.two_sided:
            self._make_pending()
            minus = [evaluate(closures, randomness)] * sum(mine)
        for d in range(self.directions):
            # Also along directions that other processes evaluate: weights that are moved round, and have to round alike.
            self._move((d, self.eps))
            if mine[d]:
                plus.append(evaluate(closures, randomness))
            if self.two_sided:
                self._move((d, -self.eps))
                if mine[d]:
                    minus.append(evaluate(closures, randomness))
        return plus, minus

    def _evaluate_together(
        self, closures: Sequence[BatchClosure], batches: Sequence[Any], randomness: Randomness | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As :meth:`_evaluate`, in one call of each closure."""
        handle = self.handle
        assert isinstance(handle, ProbeHandle)
        examples = {count_examples(inputs) for inputs in batches}
        if len(examples) > 1:
            raise ValueError(f"micro-batches that are evaluated together have one number of examples, not {sorted(examples)}")
        if not self._batches_checked:
            check_batches(handle, closures, batches, randomness, step=self._step)
            self._batches_checked = True
        sides = (self.eps, -self.eps) if self.two_sided else (self.eps,)
        mine = [d for d in range(self.directions) if self.parallel is None or self.parallel.evaluates(d, self.directions)]
        offsets = [(d, side) for d in mine for side in sides]
        if not self.two_sided:
            offsets.append((0, 0.0))
        try:
            handle.spread_(self._noise_step, offsets, examples.pop())
            evaluate = batch_losses if self.parallel is None else batch_totals
            losses = evaluate(closures, batches, len(offsets), randomness)
        finally:
            handle.rest_()
        if self.two_sided:
            return list(losses[0::2]), list(losses[1::2])
        return list(losses[:-1]), [losses[-1]] * len(mine)

    def _facts(self) -> dict[str, Any]:
        """What processes have to agree on besides the weights."""
        groups = [[len(g["params"]), *(float(g[key]) for key in ("lr", "weight_decay"))] for g in self.param_groups]
        return {
            "method": type(self).__name__,
            **{key: str(value) for key, value in self.handle.config.to_dict().items()},
            **self._settings(),
            "common_random_numbers": self.common_random_numbers,
            "max_nonfinite": self.max_nonfinite,
            "parameter groups (parameters, lr, weight_decay)": groups,
            "groups of parameters": self._trained_names(),
        }

    def _commit(self, pending: Pending, info: StepInfo) -> None:
        """Takes the step: makes the update or leaves it pending. A journal has it before the weights do."""
        with deferred_interrupt():
            if self.journal is not None:
                self.journal.add_step(self, info)
            try:
                if not self.fuse_steps:
                    self._update(pending, perturb_next=None)
                    self._standing = None
                else:
                    self._pending = pending
            except BaseException:
                if self.journal is not None:
                    self.journal.take_back()
                raise
            self._step += 1
            self._moves = 0
            self.info = info
            self._skipped_total, self._skipped_in_a_row = info.skipped_total, info.skipped_in_a_row

    def _watch_losses(self, loss: Tensor) -> None:
        """Warns or raises about losses that were not finite; on a GPU some steps late, because it does not wait for the device."""
        counts = self._watched.read(lambda: torch.stack((self._skipped_in_a_row, self._skipped_total)))
        if counts is None:
            return
        in_a_row, total = counts
        if in_a_row >= self.max_nonfinite:
            self.flush()
            raise NonFiniteLossError(
                f"the loss was not finite {in_a_row} steps in a row (last: {float(loss)} at step {self._step - 1}); "
                "the weights are those of the last good step. Lower lr or eps, or look for overflow in half precision"
            )
        if in_a_row:
            warnings.warn(
                f"step {self._step - 1}: the loss was not finite; update skipped ({total} in all)",
                stacklevel=4,
            )

    def _go_back(self) -> None:
        """Takes the perturbations of a step that is not taken, or not yet, out of the weights."""
        self._move(None)
        if self._moves and self.journal is not None:
            self.journal.add_detour(self._moves)
        self._moves = 0

    def _move(self, target: tuple[int, float] | None) -> None:
        """Brings the weights from where they are to a perturbation (direction, scale) of the current step, or to none."""
        with deferred_interrupt():
            self._moves += target is not None
            if self._pending is not None and target is not None:
                self._update(self._pending, perturb_next=target[1])
                self._pending, self._standing = None, target
                return
            if _same_point(target, self._standing) or self._pending is not None:
                return  # there already, or still at the pending update of the step before: nothing of this step to undo
            if self._standing is None:
                assert target is not None
                self.handle.perturb_(self._noise_step, target[1], direction=target[0])
            elif target is None:
                direction, scale = self._standing
                self.handle.perturb_(self._noise_step, -scale, direction=direction)
            else:
                self.handle.shift_(self._noise_step, self._standing, target)
            self._standing = target

    def _update(self, pending: Pending, perturb_next: float | None) -> None:
        assert self._standing is not None or self.evaluation == "batched" or self._drive is not None
        self.handle.update_(
            pending.step,
            pending.c,
            pending.lr,
            weight_decay=pending.weight_decay,
            beta=pending.beta,
            standing=0.0 if self._standing is None else self._standing[1],
            perturb_next=perturb_next,
        )


class LOZO(ZerothOrderOptimizer):
    """Low-rank zeroth-order SGD (Chen et al., ICLR 2025, Algorithm 1); with ``momentum`` LOZO-M (Algorithm 2).

    X is probed along +-U V^T, U new every step, V every ``interval`` steps, and moves by -lr c U V^T / r. One-dimensional tensors
    are probed with dense Gaussian noise. A learning rate of the published code, which leaves 1/r out, is ``r`` times smaller:
    use ``scaling="published"`` or multiply it by the rank (see :class:`~lozo_kernels.model.config.PatchConfig`).

    Example::

        optimizer = LOZO(model, lr=1e-6, rank=2, interval=50)
        for batch in loader:
            loss = optimizer.step(lambda: model(**batch).loss)
    """

    _estimator = "lowrank"


class MeZO(ZerothOrderOptimizer):
    """Memory-efficient zeroth-order SGD (Malladi et al., 2023) with dense Gaussian directions; with ``momentum`` MeZO-M.

    MeZO-M keeps an fp32 momentum of the size of the model. Directions are regenerated from the seed at every use.
    """

    _estimator = "dense"


class SubZero(ZerothOrderOptimizer):
    """Zeroth-order SGD in random subspaces (Yu et al., 2024): X is probed along U S V^T sqrt(rows * cols) / rank.

    U and V are orthonormal and drawn every ``interval`` steps (the reference's ``update_interval``), S is new every step; X moves
    by -lr c times the direction. One-dimensional tensors have dense Gaussian directions, and the tensors of PEFT adapters are
    seen as nearly square matrices (``square``). The published settings are rank 8 and an interval of 1000 or 2000. ``momentum`` is
    kept in the left factor, as LOZO-M's.

    Example::

        optimizer = SubZero(model, lr=1e-6, rank=8, interval=1000)
    """

    _estimator = "subspace"


def _same_point(a: tuple[int, float] | None, b: tuple[int, float] | None) -> bool:
    """Whether two perturbations are one. 0.0 and -0.0 are not: a warm-up with eps = 0 makes every pass that a step makes."""
    return a == b and (a is None or b is None or math.copysign(1.0, a[1]) == math.copysign(1.0, b[1]))
