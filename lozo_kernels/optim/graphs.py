"""A whole optimiser step, forward passes included, as one CUDA graph: nothing is launched from Python, nothing waits."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.interrupts import deferred_interrupt
from ..model.losses import Closure
from ..model.probe import ProbeHandle
from .optimizer import ZerothOrderOptimizer
from .steps import Pending, StepInfo, StepInputs

_WARM_UPS = 2  # runs before the capture, in which kernels are compiled and constants uploaded


def capture_step(optimizer: ZerothOrderOptimizer, closure: Closure | Sequence[Closure]) -> CapturedStep:
    """Captures ``optimizer.step(closure)`` for replay. Weights and optimiser are as before when it returns.

    The closure must be capturable: fixed shapes, no value read on the host, its batch in tensors that the caller overwrites
    (``batch.copy_(...)``) before each replay. The learning rate may change between replays, the storage of the model may not.
    The projected gradient stays on the device; V is redrawn between two replays when its window ends. On the CPU the same code
    runs without a graph.

    Args:
        optimizer: of a model on one device.
        closure: as for :meth:`ZerothOrderOptimizer.step`.

    Returns:
        A callable that takes one step and returns the loss, a tensor that the next step overwrites.

    Raises:
        ValueError: the handle is a probe, the model is on several devices, or the closure draws random numbers although the
            optimiser promises all evaluations the same ones (dropout: call ``model.eval()`` or give
            ``common_random_numbers=False``).
    """
    return CapturedStep(optimizer, closure)


class CapturedStep:
    """Made by :func:`capture_step`; call it for a step. ``optimizer.info`` then holds tensors that the next step overwrites.

    It is the optimiser's other half: the same methods run, with the step's number and settings in tensors.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer, closure: Closure | Sequence[Closure]) -> None:
        if isinstance(optimizer.handle, ProbeHandle):
            raise ValueError("a captured step moves weights: use placement='inplace' with it")
        if optimizer.parallel is not None:
            raise ValueError("a captured step does not wait for other processes: leave parallel out; sharded models have it always")
        devices = optimizer.handle.devices
        if len(devices) != 1:
            raise ValueError(f"a step is captured on one device, and the trained parameters are on {len(devices)}")
        self._optimizer = optimizer
        self._closures = [closure] if callable(closure) else list(closure)
        self._device = devices[0]
        self._baked = self._settings()
        optimizer.flush()
        optimizer.handle.enter_window(optimizer.steps_done)
        self._groups = optimizer.handle.groups
        self._inputs = StepInputs(
            torch.zeros((), dtype=torch.int64, device=self._device),
            {key: optimizer._per_parameter(key, self._device).clone() for key in ("lr", "weight_decay")},
        )
        self._uploaded: object = None
        self._left: Pending | None = None
        self._info, self._pending = self._warm_up()
        self._from_rest = self._record(pending=None)
        self._from_pending = self._record(pending=self._pending) if optimizer.fuse_steps else None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """One step.

        Raises:
            RuntimeError: storage of the model moved, or a setting that was captured changed: capture again.
            NonFiniteLossError: as in :meth:`ZerothOrderOptimizer.step`.
        """
        optimizer, handle = self._optimizer, self._optimizer.handle
        step = optimizer.steps_done
        if self._settings() != self._baked:
            raise RuntimeError("eps, momentum or another setting of the optimiser changed since the capture; capture again")
        if handle.window != step // handle.config.interval:
            optimizer.flush()
        handle.enter_window(step)
        if handle.groups is not self._groups:
            raise RuntimeError("storage of the model moved since the capture; capture again")
        self._fill(step)
        with deferred_interrupt():
            if self._from_pending is not None and optimizer._pending is not None:
                if optimizer._pending is not self._left:  # left by a step that was not captured
                    self._keep(optimizer._pending)
                self._from_pending()
            else:
                self._from_rest()
            if self._pending is not None:
                optimizer._pending = self._left = dataclasses.replace(self._pending, step=step)
                optimizer._standing = (optimizer.directions - 1, self._last_scale)
            optimizer._step = step + 1
            optimizer.info = dataclasses.replace(self._info, step=step)
            optimizer._skipped_total, optimizer._skipped_in_a_row = self._info.skipped_total, self._info.skipped_in_a_row
            optimizer._moves = 0
            if optimizer.journal is not None:
                optimizer.journal.add_step(optimizer, optimizer.info)
        optimizer._watch_losses(self._info.loss)
        return self._info.loss

    @property
    def _last_scale(self) -> float:
        """Of the perturbation that a fused step leaves in the weights."""
        return -self._optimizer.eps if self._optimizer.two_sided else self._optimizer.eps

    def _settings(self) -> dict[str, Any]:
        return self._optimizer._settings() | {"decays": self._optimizer._decays}

    def _fill(self, step: int) -> None:
        """Uploads what differs from the last step."""
        self._inputs.step.fill_(step)
        optimizer, info = self._optimizer, self._info
        if optimizer._skipped_total is not info.skipped_total:  # steps were taken by other means
            info.skipped_total.copy_(optimizer._skipped_total, non_blocking=True)
            info.skipped_in_a_row.copy_(optimizer._skipped_in_a_row, non_blocking=True)
        values = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        if any(isinstance(v, Tensor) for pair in values for v in pair) or values != self._uploaded:
            for key, tensor in self._inputs.settings.items():
                tensor.copy_(optimizer._per_parameter(key, self._device))
            self._uploaded = values

    def _run(self, pending: Pending | None) -> tuple[Pending, StepInfo]:
        """The evaluations of a step, the update pending before them, and what follows from them."""
        optimizer = self._optimizer
        if pending is not None:
            optimizer._pending = dataclasses.replace(pending, step=self._inputs.step - 1)
            optimizer._standing = (optimizer.directions - 1, self._last_scale)
        return optimizer._estimate(*optimizer._evaluate(self._closures, None))

    @torch.no_grad()
    def _warm_up(self) -> tuple[StepInfo, Pending | None]:
        """Runs every pass with eps = 0, which moves no weight: c is 0 / 0, and the update is skipped as not finite.

        Returns:
            Tensors for what a step leaves behind, which the graphs write.
        """
        optimizer = self._optimizer
        before = _random_state(self._device)
        with _side_stream(self._device), self._borrowed(eps=0.0):
            pending = None
            for _ in range(_WARM_UPS):
                pending, info = self._run(pending)
                if not optimizer.fuse_steps:
                    optimizer._update(pending, None)
                    optimizer._standing = pending = None
            static = StepInfo(info.step, *(value.clone() for value in _tensors(info)))
        if optimizer.common_random_numbers and _random_state(self._device) != before:
            raise ValueError(
                "the closure draws random numbers (dropout?), which a captured step cannot repeat for each evaluation: call "
                "model.eval(), or give the optimiser common_random_numbers=False"
            )
        return static, None if pending is None else _map(pending, Tensor.clone)

    def _record(self, pending: Pending | None) -> Callable[[], None]:
        """The step as a graph: with the update that the last step left pending, or from weights that are up to date."""

        @torch.no_grad()
        def body() -> None:
            with self._borrowed(eps=self._optimizer.eps):
                made, info = self._run(pending)
                if self._pending is None:
                    self._optimizer._update(made, None)
                else:
                    self._keep(made)
                for static, value in zip(_tensors(self._info), _tensors(info), strict=True):
                    static.copy_(value)

        if self._device.type != "cuda":
            return body
        graph = torch.cuda.CUDAGraph()
        # A stream of this device: torch's own for captures belongs to the device that first needed one.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=torch.cuda.Stream(self._device)):
            body()
        return graph.replay

    def _keep(self, pending: Pending) -> None:
        """Puts an update where the next step reads it."""
        assert self._pending is not None
        for static, value in zip(_update_tensors(self._pending), _update_tensors(pending), strict=True):
            static.copy_(value)

    @contextlib.contextmanager
    def _borrowed(self, eps: float) -> Iterator[None]:
        """The optimiser with the captured inputs; its own state is put back."""
        optimizer = self._optimizer
        names = ("eps", "_inputs", "_pending", "_standing", "_skipped_total", "_skipped_in_a_row")
        state = {name: getattr(optimizer, name) for name in names}
        optimizer.eps, optimizer._inputs, optimizer._pending, optimizer._standing = eps, self._inputs, None, None
        if hasattr(self, "_info"):
            optimizer._skipped_total, optimizer._skipped_in_a_row = self._info.skipped_total, self._info.skipped_in_a_row
        try:
            yield
        finally:
            for name, value in state.items():
                setattr(optimizer, name, value)


def _tensors(info: StepInfo) -> list[Tensor]:
    return [value for value in vars(info).values() if isinstance(value, Tensor)]


def _update_tensors(pending: Pending) -> list[Tensor]:
    """The tensors of an update; its step is the captured one."""
    return [x for x in (*pending.c, pending.lr, pending.weight_decay, pending.beta) if isinstance(x, Tensor)]


def _map(pending: Pending, function: Callable[[Tensor], Tensor]) -> Pending:
    """An update with a function applied to its tensors."""

    def apply(x: Any) -> Any:
        return function(x) if isinstance(x, Tensor) else x

    return Pending(pending.step, list(map(apply, pending.c)), apply(pending.lr), apply(pending.weight_decay), apply(pending.beta))


def _random_state(device: torch.device) -> bytes:
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return bytes(state.tolist())


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own, as capturing asks for warm-ups to have; ordered after and before the current one."""
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
