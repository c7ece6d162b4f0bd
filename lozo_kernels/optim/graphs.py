"""Captures a whole optimiser step, forward passes included, as one CUDA graph: Python launches nothing and waits for nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.interrupts import deferred_interrupt
from ..model.losses import Closure, bind_inputs, pair_closures
from ..model.passes import Update
from ..model.weighed import StepClosure
from .groups import rates_of
from .optimizer import ZerothOrderOptimizer
from .steps import Rates, StepInfo

_WARM_UPS = 2  # runs before the capture, which compile kernels and upload constants


def capture_step(optimizer: ZerothOrderOptimizer, closure: Any, inputs: Any = None) -> CapturedStep:
    """Captures ``optimizer.step(closure, inputs)`` for replay. When it returns, weights and optimiser are as before.

    The closure must be capturable: fixed shapes, no value read on the host, its batch in tensors that the caller overwrites
    (``batch.copy_(...)``) before each replay. The learning rate may change between replays, the storage of the model may not.
    The projected gradient stays on the device; V is redrawn between two replays when its window ends. On the CPU the same code
    runs without a graph. A probe chooses sides and checks itself before the capture, as it does in a first step. AGZO makes V
    between two replays, in forward passes of their own; if there is none yet, from the batch that is in the tensors at the capture.

    A replay gives the bits of ``optimizer.step(closure)`` if the forward pass gives the same bits inside a capture as outside of
    one. Two that do not are known. transformers drops an attention mask of ones after reading it, which a capture forbids: it is
    kept there, and attention takes another path, so leave a mask without padding out. And cuBLAS may choose another algorithm.

    Args:
        optimizer: of a model on one device.
        closure, inputs: as for :meth:`ZerothOrderOptimizer.step`. New values are copied into the tensors of ``inputs``.

    Returns:
        A callable that takes one step and returns the loss, a tensor that the next step overwrites.

    Raises:
        TypeError: ``evaluation="batched"`` or "split" without inputs.
        ValueError: the model is on several devices, a probe has weights that are not always here, or the closure draws random
            numbers although the optimiser promises all evaluations the same ones (dropout: call ``model.eval()`` or give
            ``common_random_numbers=False``).
    """
    return CapturedStep(optimizer, closure, inputs)


class CapturedStep:
    """A captured step, made by :func:`capture_step`; call it to take one. The next step overwrites the tensors of
    ``optimizer.info``.

    Its own stepper makes the passes that the optimiser's would make, with the step's number and rates in tensors.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer, closure: Any, inputs: Any = None) -> None:
        handle, stepper = optimizer.handle, optimizer.stepper
        if stepper.finder is not None:
            raise ValueError("a captured step measures no learning rate: give a number, e.g. what optimizer.learning_rates says")
        self._closures, self._batches = pair_closures(closure, inputs)
        if stepper.settings.by_example and self._batches is None:
            raise TypeError(
                f"evaluation={optimizer.evaluation!r} needs capture_step(optimizer, closure, inputs), with a closure that takes "
                "the inputs"
            )
        handle.check_capturable()
        if stepper.parallel is not None:
            raise ValueError("a captured step does not wait for other processes: leave parallel out; sharded models have it always")
        if len(handle.devices) != 1:
            raise ValueError(f"a step is captured on one device, and the trained parameters are on {len(handle.devices)}")
        self._optimizer = optimizer
        self._stepper = stepper
        self._device = handle.devices[0]
        stepper.flush()
        stepper.prepare(self._step_closures, self._batches)
        self._groups = handle.groups
        rates = rates_of(optimizer.param_groups, handle, self._device)
        self._rates = Rates(rates.lr.clone(), rates.weight_decay.clone() if isinstance(rates.weight_decay, Tensor) else 0.0)
        self._twin = stepper.twin(torch.zeros((), dtype=torch.int64, device=self._device))
        self._captured = self._settings()
        self._uploaded: object = None
        self._left: Update | None = None
        self._recorder, self._warming_up = _Recorder(self._device), False
        with handle.rehearsal():
            self._info, self._pending = self._warm_up()
            self._from_rest = self._record(None)
            self._from_pending = self._from_rest if self._pending is None else self._record(self._pending)
            self._in_use = handle.in_use

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Takes one step.

        Raises:
            RuntimeError: storage of the model moved, or a setting that was captured changed: capture again.
            NonFiniteLossError: as in :meth:`ZerothOrderOptimizer.step`.
        """
        stepper, handle = self._stepper, self._stepper.handle
        step = stepper.count
        if self._settings() != self._captured:
            raise RuntimeError("eps, momentum or another setting of the optimiser changed since the capture; capture again")
        if handle.window != step // handle.config.interval:
            stepper.flush()
            stepper.guide(self._bound_closures)
        handle.begin_replay(step)
        if handle.groups is not self._groups:
            raise RuntimeError("storage of the model moved since the capture; capture again")
        self._fill(step)
        with deferred_interrupt():
            pending = stepper.pending
            if pending is not None and pending is not self._left:  # left by a step outside of the graphs
                self._keep(pending)
            with stepper.lent():
                (self._from_rest if pending is None else self._from_pending)()
            handle.end_replay(step, decays=self._captured["decays"])
            self._left = None if self._pending is None else dataclasses.replace(self._pending, step=step)
            stepper.took(dataclasses.replace(self._info, step=step), self._left)
        stepper.watch(self._info.loss)
        return self._info.loss

    def _settings(self) -> dict[str, Any]:
        """The settings that the graphs hold, which no later step may change."""
        decays = any(isinstance(g["weight_decay"], Tensor) or g["weight_decay"] != 0.0 for g in self._optimizer.param_groups)
        return self._stepper.settings.of_run | {"decays": decays}

    def _fill(self, step: int) -> None:
        """Uploads the values that differ from those of the last step."""
        assert isinstance(self._twin.step, Tensor)
        self._twin.step.fill_(step)
        stepper, info = self._stepper, self._info
        if stepper.skipped_total is not info.skipped_total:  # steps were taken outside of the graphs
            info.skipped_total.copy_(stepper.skipped_total, non_blocking=True)
            info.skipped_in_a_row.copy_(stepper.skipped_in_a_row, non_blocking=True)
            info.flat.copy_(stepper.flat, non_blocking=True)
            info.moment.copy_(stepper.moment, non_blocking=True)
        values = [(group["lr"], group["weight_decay"]) for group in self._optimizer.param_groups]
        if any(isinstance(v, Tensor) for pair in values for v in pair) or values != self._uploaded:
            rates = rates_of(self._optimizer.param_groups, stepper.handle, self._device)
            self._rates.lr.copy_(rates.lr)
            if isinstance(self._rates.weight_decay, Tensor):
                self._rates.weight_decay.copy_(rates.weight_decay)  # type: ignore[arg-type]
            self._uploaded = values

    def _run(self, pending: Update | None) -> tuple[Update, StepInfo]:
        """Makes a pending update and the evaluations of a step. Returns the step's update and what it saw."""
        twin = self._twin
        twin.pending, twin.applied = pending, None
        if pending is not None:
            twin.pending = dataclasses.replace(pending, step=twin.step - 1)
            twin.applied = twin.last_point
        plus, minus = twin.evaluate(self._step_closures, self._batches)
        c = twin.differences(plus, minus)
        return twin.conclude(c * float("nan") if self._warming_up else c, plus, minus, self._rates)

    @property
    def _step_closures(self) -> list[StepClosure]:
        return [StepClosure(closure) for closure in self._closures]

    @property
    def _bound_closures(self) -> Sequence[Closure]:
        closures = self._step_closures
        return closures if self._batches is None else bind_inputs(closures, self._batches)

    @torch.no_grad()
    def _warm_up(self) -> tuple[StepInfo, Update | None]:
        """Runs every pass. The update is skipped, because c is not a number. Where evaluations move weights, which rounds them,
        eps is 0; a probe has other kernels for a scale of 0. Returns the tensors that the graphs write a step's results to."""
        settings, before = self._stepper.settings, _random_state(self._device)
        self._warming_up = True
        if not self._stepper.handle.probes:
            self._twin.settings.eps = 0.0
        with _side_stream(self._device):
            pending = None
            for _ in range(_WARM_UPS):
                pending, info = self._run(pending)
                if not settings.fuse_steps:
                    self._twin.make(pending)
                    pending = None
            static = StepInfo(info.step, *(value.clone() for value in _tensors(info)))
        self._twin.settings.eps, self._warming_up = settings.eps, False
        if settings.common_random_numbers and _random_state(self._device) != before:
            raise ValueError(
                "the closure draws random numbers (dropout?), which a captured step cannot repeat for each evaluation: call "
                "model.eval(), or give the optimiser common_random_numbers=False"
            )
        self._twin.skipped_total, self._twin.skipped_in_a_row = static.skipped_total, static.skipped_in_a_row
        self._twin.flat, self._twin.moment = static.flat, static.moment
        return static, None if pending is None else _clone(pending)

    def _record(self, pending: Update | None) -> Callable[[], None]:
        """Records the step as a graph: with an update that the last step left pending, or from weights that are up to date."""

        @torch.no_grad()
        def body() -> None:
            made, info = self._run(pending)
            if self._pending is None:
                self._twin.make(made)
            else:
                self._keep(made)
            for static, value in zip(_tensors(self._info), _tensors(info), strict=True):
                static.copy_(value)

        return self._recorder.record(body)

    def _keep(self, pending: Update) -> None:
        """Copies an update to where the next step reads it."""
        assert self._pending is not None
        for static, value in zip(_update_tensors(self._pending), _update_tensors(pending), strict=True):
            static.copy_(value)


class _Recorder:
    """Records the graphs of one step. They share their memory, which they may because no two of them run at once and nothing
    that a graph leaves there is read by another: results are in tensors from before the capture."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            # A stream of this device: torch's own for captures belongs to the device that first needed one.
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """Returns what replays the body: its graph, or on the CPU the body itself."""
        if self._device.type != "cuda":
            return body
        graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile: that of a loader which pins memory does.
        capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            body()
        return graph.replay


def _tensors(info: StepInfo) -> list[Tensor]:
    return [value for value in vars(info).values() if isinstance(value, Tensor)]


def _update_tensors(update: Update) -> list[Tensor]:
    """The tensors of an update, except for its step, which is the captured one."""
    return [x for x in (*update.c, update.lr, update.weight_decay, update.beta) if isinstance(x, Tensor)]


def _clone(update: Update) -> Update:
    """A copy of an update, with tensors of its own."""

    def clone(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) else x

    return Update(update.step, list(map(clone, update.c)), clone(update.lr), clone(update.weight_decay), clone(update.beta))


def _random_state(device: torch.device) -> bytes:
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return bytes(state.tolist())


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Runs the body on a stream of its own, which warm-ups for a capture need, ordered after and before the current one."""
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
