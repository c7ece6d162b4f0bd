"""A handle on a model's weights that perturbs and updates them in place, one op call a pass."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import noise, reference
from ..kernels.calls import Draw, Step
from ..kernels.checks import check_scale
from ..kernels.registry import Choice, choose_backend
from ..kernels.table import TensorTable
from .config import PatchConfig
from .estimators import ESTIMATORS, Place
from .losses import Closure, Randomness
from .momentum import piece_of, spread
from .parameters import LeftAlone, Slot, find_parameters
from .passes import Group, Scalar, StepUpdate, Term, check_update, run_pass, run_update
from .report import ParameterReport, Report
from .sharding import reshard

_HANDLES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Handle]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def register_handle(model: nn.Module, make: Callable[[], Handle]) -> Handle:
    """Makes a model's handle, which :func:`handle_of` then finds.

    Raises:
        RuntimeError: the model has one already.
    """
    with _LOCK:
        if handle_of(model) is not None:
            raise RuntimeError(
                "this model is patched already: use lozo_kernels.handle_of(model), or call its restore() before patching again"
            )
        handle = make()
        _HANDLES[model] = weakref.ref(handle)
    return handle


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a patched model, or None. A model whose handle is gone is not patched any more."""
    handle = _HANDLES.get(model)
    return None if handle is None else handle()


class Handle:
    """Owns V, the momentum and the tables of one patched model, and moves its weights. Made by :func:`patch`.

    The handle keeps no step counter and no perturbation state: each call says which step it means, and an optimiser
    (:mod:`lozo_kernels.optim.optimizer`) or the caller keeps the sequence. A direction D is U V^T (times 1/r under
    ``scaling="card"``) for low-rank parameters and Z for dense ones.
    """

    state_in_pieces = True
    """Whether a process keeps momentum of its shards only."""

    def __init__(self, model: nn.Module, config: PatchConfig) -> None:
        self.model = model
        self.config = config
        self.estimator = ESTIMATORS[config.estimator](config)
        self._slots: list[Slot]
        self._left: list[LeftAlone]
        self._slots, self._left = find_parameters(model, config)
        self._aliases = {alias: slot for slot in self._slots for alias in (slot.name, *slot.aliases)}
        self._gone: list[object] = []
        self._owners = [weakref.ref(slot.owner(), self._gone.append) for slot in self._slots]  # type: ignore[type-var]
        reachable = [slot for slot in self._slots if slot.out_of_reach is None]
        self._places = [(slot.owner()._parameters, slot.attribute) for slot in reachable]  # type: ignore[union-attr]
        self._sharded = any(slot.out_of_reach == "sharded" for slot in self._slots)
        self._shapes = [slot.parameter.shape for slot in self._slots]
        self._v: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._window: int | None = None
        self._groups: list[Group] = []
        self._addresses: list[int] = []
        self._seen: tuple[list[int], list[bool], list[torch.dtype]] | None = None
        self._seen_at: Step | None = None
        self._flush: Callable[[], None] | None = None
        self._guards: list[torch.utils.hooks.RemovableHandle] = []
        self._restored = False
        self._refresh_groups()

    @property
    def names(self) -> list[str]:
        """Canonical names of the trained parameters; per-parameter scalars follow this order."""
        return [slot.name for slot in self._slots]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters as they are now, in the order of :attr:`names`."""
        return [slot.parameter for slot in self._slots]

    @property
    def devices(self) -> list[torch.device]:
        """Where the trained parameters were at the last pass, each device once."""
        return list(dict.fromkeys(group.table.device for group in self._groups))

    @property
    def groups(self) -> list[Group]:
        """The tables that passes work on; another list once storage moved."""
        return self._groups

    @property
    def momentum(self) -> dict[str, Tensor]:
        """Momentum by name, fp32: (batch, rows, rank) for low-rank parameters, (batch, rows, cols) for dense ones, of a shard what
        goes with it; empty before :meth:`enable_momentum`."""
        return dict(self._momentum)

    @property
    def momentum_state(self) -> dict[str, Tensor]:
        """As :attr:`momentum`, the same for any number of processes: that of shards as DTensors of all of it."""
        found = self.momentum
        if self.state_in_pieces and self._sharded:
            self._refresh_groups()
            found = {slot.name: spread(slot, found[slot.name]) for slot in self._slots if slot.name in found}
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the model is treated."""
        return ()

    @property
    def window(self) -> int | None:
        """step // interval of the V that is in memory, None before the first use. Momentum is expressed in it."""
        return self._window

    def enable_momentum(self) -> None:
        """Allocates momentum, zero; a second call changes nothing."""
        self._check_usable()
        if not self._momentum:
            for slot in self._slots:
                batch, rows, cols = self._state_extent(slot)
                shape = (batch, rows, self.config.rank if slot.kind == "lowrank" else cols)
                self._momentum[slot.name] = torch.zeros(shape, dtype=torch.float32, device=self._device(slot))
            self._rebuild_groups()

    @property
    def sharded(self) -> bool:
        """Whether some parameter is spread over processes, which then take every step together."""
        return self._sharded

    def _extent(self, slot: Slot) -> tuple[int, int, int]:
        batch, rows, cols = slot.view().shape if slot.out_of_reach is None else slot.extent
        return batch, rows, cols

    def _state_extent(self, slot: Slot) -> tuple[int, int, int]:
        """As :meth:`_extent`, of the part whose momentum this process keeps."""
        if not self.state_in_pieces:
            return self._extent(slot)
        batch, rows, cols = slot.piece().x.shape
        return batch, rows, cols

    def _device(self, slot: Slot) -> torch.device:
        """Where a parameter's state lives and its noise is made."""
        return slot.parameter.device

    @torch.no_grad()
    def perturb_(self, step: Step, scale: float, *, direction: int = 0) -> None:
        """X += scale * D(step, direction) for every trained parameter, in one pass.

        Args:
            step: which U and Z, and through ``step // interval`` which V. A 0-dim int64 tensor is not read, so that a captured
                graph can advance it: V is then that of the last :meth:`enter_window`.
            scale: +eps, -2 eps, ...; a finite number.
            direction: index among the directions of the step.

        Raises:
            ValueError: an argument is out of range; nothing was changed.
        """
        check_scale(scale)
        self._start(step)
        run_pass(self._groups, self.config, [Term(Draw(step, direction), perturb=scale)])

    @torch.no_grad()
    def shift_(self, step: Step, remove: tuple[int, float], add: tuple[int, float]) -> None:
        """One pass from a perturbation along one direction of a step to one along another.

        Args:
            step: as in :meth:`perturb_`.
            remove: (direction, scale) of the perturbation that stands now.
            add: (direction, scale) of the one that shall stand.
        """
        check_scale(remove[1])
        check_scale(add[1])
        self._start(step)
        if remove[0] == add[0]:
            run_pass(self._groups, self.config, [Term(Draw(step, add[0]), perturb=add[1] - remove[1])])
        else:
            run_pass(
                self._groups,
                self.config,
                [Term(Draw(step, remove[0]), perturb=-remove[1]), Term(Draw(step, add[0]), perturb=add[1])],
            )

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
        """X <- (1 - lr * weight_decay) X - lr * mean over directions of c D / r, and what goes with it in the same pass.

        With momentum: N <- beta N + (1 - beta) mean of c U, and N V^T in place of the mean (LOZO, Algorithm 2). Up to two draws
        share one pass over the weights.

        Args:
            step: the step whose directions were probed; a tensor as in :meth:`perturb_`, and then ``perturb_next`` is for a step
                of the same window.
            c: projected gradient (F(+) - F(-)) / (2 eps), one per direction; numbers or 0-dim tensors, which are not read here.
            lr, weight_decay: numbers, 0-dim tensors, or one value per trained parameter.
            beta: momentum coefficient; None for no momentum. Needs :meth:`enable_momentum`.
            standing: scale of the perturbation along the last direction that is still in the weights; it is taken out.
            perturb_next: scale of the perturbation along direction 0 of ``step + 1`` that is put in; None for none.

        Raises:
            ValueError, RuntimeError: an argument does not fit; nothing was changed.
        """
        if beta is not None and not self._momentum:
            raise RuntimeError("momentum was not enabled: call enable_momentum() first")
        update = StepUpdate(step, list(c) if isinstance(c, Sequence) else [c], lr, weight_decay, beta)
        check_update(update, len(self._slots))
        check_scale(standing)
        if perturb_next is not None:
            check_scale(perturb_next)
            if not isinstance(step, Tensor):
                noise.check_range("step", step, noise.MAX_DRAW - 2)  # there is a next one
        self._start(step)
        run_update(self._groups, self.config, update, standing, perturb_next if self._same_window(step) else None)
        if perturb_next is not None and not self._same_window(step):
            assert not isinstance(step, Tensor)
            self.perturb_(step + 1, perturb_next)

    def _same_window(self, step: Step) -> bool:
        """Whether the next step has the V of this one. A step that is a tensor says so by being one."""
        return isinstance(step, Tensor) or (step + 1) // self.config.interval == step // self.config.interval

    @torch.no_grad()
    def materialize(self, name: str, step: int, *, direction: int = 0) -> Tensor:
        """One parameter's direction D(step, direction): ``perturb_(step, s)`` adds s times this.

        Args:
            name: any of its names.

        Returns:
            fp32 of the parameter's shape, on its device.

        Raises:
            KeyError: no trained parameter has this name.
        """
        slot = self._find(name)
        noise.check_range("step", step, noise.MAX_DRAW)
        batch, rows, cols = self._extent(slot)
        seed, device = self.config.seed, self._device(slot)
        if slot.kind == "dense":
            z = noise.dense(seed, batch * rows * cols, slot.tensor_id, step, direction=direction, device=device)
            return z.view(slot.parameter.shape)
        backend = choose_backend(device, self.config.backend).backend
        place = Place(slot.tensor_id, (batch, rows, cols), backend, device)
        left, v = self.estimator.left(place, Draw(step, direction)), self.estimator.right(place, step // self.config.interval)
        product = reference.low_rank_product(left, v) * self.config.perturb_factor
        return product[0] if slot.out_of_reach == "quantised" else product.view(slot.parameter.shape)

    def report(self) -> Report:
        """Every parameter of the model and how it is treated. ``print(handle.report())`` shows a table."""
        self._refresh_groups()
        serving = {device: choose_backend(device, self.config.backend) for device in map(self._device, self._slots)}
        rows = [self._describe(slot, serving[self._device(slot)]) for slot in self._slots]
        for left in self._left:
            p = left.tensor
            rows.append(ParameterReport(left.name, (), tuple(p.shape), p.dtype, p.device, "left alone", None, left.reason))
        return Report(tuple(rows), {str(device): choice.rejected for device, choice in serving.items()}, self.notes)

    def prepare(self, closures: Closure | Sequence[Closure], randomness: Randomness | None = None, *, step: int = 0) -> None:
        """What has to be known of the closures before the first step: nothing, where weights are moved in place."""

    def settle(self) -> None:
        """Brings the weights up to date: nothing to do, where they are moved in place."""

    def guard(self, flush: Callable[[], None]) -> None:
        """Has ``flush`` called before any forward pass, ``state_dict()`` or ``load_state_dict()`` of the model or a part of it.

        For an optimiser that leaves a perturbation in the weights between steps.
        """
        self._check_usable()
        if self._flush is not None:
            raise RuntimeError("the handle is guarded already; use one optimiser per handle")
        self._flush = flush
        for module in self.model.modules():
            self._guards += [
                module.register_forward_pre_hook(lambda *_: flush()),
                module.register_state_dict_pre_hook(lambda *_: flush()),
                module.register_load_state_dict_pre_hook(lambda *_: flush()),
            ]

    def restore(self) -> None:
        """Undoes the patch: pending updates are applied, hooks removed; the trained weights stay. A second call does nothing."""
        if self._restored:
            return
        if self._flush is not None:
            self._flush()
            self._flush = None  # with the optimiser that it belongs to, it would hold the model
        for hook in self._guards:
            hook.remove()
        self._guards.clear()
        self._restored = True
        with _LOCK:
            if handle_of(self.model) is self:
                del _HANDLES[self.model]

    def load_momentum(self, momentum: dict[str, Tensor], window: int | None) -> None:
        """Takes :attr:`momentum_state` of another handle of the same model, expressed in the V of ``window``.

        Raises:
            ValueError: names or shapes differ; nothing was changed.
        """
        self._check_usable()
        if not isinstance(momentum, dict) or not all(isinstance(n, Tensor) for n in momentum.values()):
            raise TypeError(f"the saved momentum is tensors by name, not {momentum!r:.200}")
        if window is not None:
            noise.check_range("window", window, noise.MAX_DRAW)
        expected = {slot.name for slot in self._slots}
        if set(momentum) != expected:
            odd = sorted(expected.symmetric_difference(momentum))
            raise ValueError(f"the saved momentum is of other parameters; differing: {', '.join(odd[:5])}")
        self.settle()  # what was learned belongs to the V that is left
        self.enable_momentum()
        self._refresh_groups()
        own, pieces = self._momentum, self.state_in_pieces
        loaded = {s.name: piece_of(s, momentum[s.name], own[s.name], pieces) for s in self._slots}
        for name, value in loaded.items():
            own[name].copy_(value)
        self._resample(window, reproject=False)

    def _check_usable(self) -> None:
        if self._restored:
            raise RuntimeError("this handle was restored; patch the model again")

    def _find(self, name: str) -> Slot:
        if not isinstance(name, str) or name not in self._aliases:
            raise KeyError(f"no trained parameter is named {name!r}; there are {', '.join(map(repr, self.names[:5]))}, ...")
        return self._aliases[name]

    def enter_window(self, step: int) -> None:
        """Makes V that of a step; the momentum is carried over into the new V (LOZO-M, Algorithm 2, line 6).

        Passes that are given a number for the step do this themselves.
        """
        self._check_usable()
        noise.check_range("step", step, noise.MAX_DRAW - 1)
        self._refresh_groups(step)
        window = step // self.config.interval
        if window != self._window:
            self._resample(window, reproject=bool(self._momentum) and self._window is not None)

    def _start(self, step: Step) -> None:
        if not isinstance(step, Tensor):
            self.enter_window(step)
            return
        self._check_usable()
        self._refresh_groups()
        if self._window is None:
            raise RuntimeError("a step that is a tensor does not say which V: call enter_window() first")

    def _resample(self, window: int | None, *, reproject: bool) -> None:
        if window is not None:
            for group in self._groups:
                if group.kind == "lowrank" and self._sharded:
                    self._resample_shards(group, window, reproject)
                elif group.kind == "lowrank":
                    self.estimator.resample_(group.table, window=window, reproject=reproject, backend=group.choice.backend)
        self._window = window

    def _resample_shards(self, group: Group, window: int, reproject: bool) -> None:
        """As the op, where this process may have some matrices or columns only: the momentum is carried by all columns of V."""
        table = group.table
        for t, i in enumerate(group.index.tolist()):
            slot, piece = self._slots[i], self._slots[i].piece()
            place = Place(slot.tensor_id, slot.extent, group.choice.backend, table.device)
            mine = slice(piece.first_matrix, piece.first_matrix + len(piece.x))
            new = self.estimator.right(place, window)[mine]
            if reproject:
                assert table.n is not None and self._window is not None
                old = self.estimator.right(place, self._window)[mine]
                table.n[t].copy_(reference.reproject(table.n[t], old, new))
            assert table.v is not None
            table.v[t].copy_(new[..., piece.col_offset : piece.col_offset + piece.x.shape[2]])

    def _refresh_groups(self, step: Step | None = None) -> None:
        """Follows storage that moved since the last call (``model.to``, ``load_state_dict(assign=True)``, ``param.data = ...``).

        Addresses are compared at every pass, what may lie at them (``model.float().half()`` can come back to the same address)
        at the first of a step: with hundreds of parameters both take longer than launching a kernel.
        """
        again = isinstance(step, int) and step == self._seen_at
        try:
            parameters: list[Any] = [owned[name] for owned, name in self._places]
            parameters += self._shards()
            addresses = list(map(Tensor.data_ptr, parameters))
            gone = bool(self._gone)
        except (KeyError, TypeError):
            gone = True
        if gone:
            parameters = [*self.parameters, *self._shards()]  # raises, naming the one that is gone
            addresses = [p.data_ptr() for p in parameters]
        same = addresses == self._addresses
        if same and again:
            return
        sizes, contiguous = list(map(Tensor.numel, parameters)), list(map(Tensor.is_contiguous, parameters))
        seen = (sizes, contiguous, [p.dtype for p in parameters])
        if not same or seen != self._seen:
            self._rebuild_groups()
            self._addresses, self._seen = addresses, seen
        self._seen_at = step

    def _shards(self) -> list[Tensor]:
        """Storage of the shards that passes change here; what FSDP keeps whole after a forward, which would stay as it was, is
        given up."""
        if not self._sharded:
            return []
        reshard(self.model)
        return [slot.piece().x for slot in self._slots if slot.out_of_reach == "sharded"]

    def _check_shapes(self) -> None:
        for slot, shape in zip(self._slots, self._shapes, strict=True):
            if slot.parameter.shape != shape:
                raise ValueError(
                    f"parameter {slot.name!r} was {tuple(shape)}, now is {tuple(slot.parameter.shape)}: restore() and patch again"
                )

    def _rebuild_groups(self) -> None:
        self._check_shapes()
        self._groups = self._make_groups(range(len(self._slots)))

    def _make_groups(self, positions: Iterable[int]) -> list[Group]:
        """Tables over the weights of some parameters, by kind and device."""
        by_place: dict[tuple[str, torch.device], list[int]] = {}
        for i in positions:
            by_place.setdefault((self._slots[i].kind, self._slots[i].parameter.device), []).append(i)
        return [self._make_group(kind, device, index) for (kind, device), index in by_place.items()]

    def _make_group(self, kind: str, device: torch.device, index: list[int]) -> Group:
        slots = [self._slots[i] for i in index]
        pieces = [slot.piece() for slot in slots]
        xs = [piece.x for piece in pieces]
        for slot, x in zip(slots, xs, strict=True):
            if slot.name in self._momentum:
                self._momentum[slot.name] = self._momentum[slot.name].to(device)
            if kind == "lowrank":
                v = self._v.get(slot.name)
                shape = (x.shape[0], self.config.rank, x.shape[2])
                self._v[slot.name] = torch.zeros(shape, dtype=torch.float16, device=device) if v is None else v.to(device)
        table = TensorTable(
            xs,
            [slot.tensor_id for slot in slots],
            v=[self._v[slot.name] for slot in slots] if kind == "lowrank" else None,
            n=[self._momentum[slot.name] for slot in slots] if self._momentum else None,
            row_offsets=[piece.row_offset for piece in pieces],
            col_offsets=[piece.col_offset for piece in pieces],
            global_cols=[piece.global_cols for piece in pieces],
        )
        choice = choose_backend(device, self.config.backend)
        return Group(kind, torch.tensor(index, device=device), table, choice, self.estimator)

    def _describe(self, slot: Slot, choice: Choice) -> ParameterReport:
        p, (batch, rows, cols) = slot.parameter, self._extent(slot)
        treatment, note = "dense", f"{p.numel()} elements"
        if slot.kind == "lowrank":
            treatment = f"low-rank {self.config.rank}"
            note = f"{rows} x {cols}" if batch == 1 else f"{batch} matrices of {rows} x {cols}"
            if self.config.rank > min(rows, cols):
                note += f"; rank {self.config.rank} is above min(rows, columns), which wastes noise but is exact"
        return ParameterReport(slot.name, slot.aliases, tuple(p.shape), p.dtype, p.device, treatment, choice.backend.name, note)
