"""The handle of a model, which perturbs and updates its weights in place. A pass is one call of an op for each kind and device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from ..kernels import reference
from ..kernels.calls import Draw, Step
from ..kernels.checks import check_range, check_scale
from ..kernels.noise import MAX_DIRECTION, MAX_DRAW, dense
from ..kernels.registry import choose_backend
from ..kernels.table import TensorTable
from .backward import Backward
from .conditions import Buffers, Conditions
from .config import PatchConfig
from .estimators import ESTIMATORS, Estimator, FactorSpec, Guided
from .guidance import Guidance, Together, in_one_process
from .interrupts import deferred_interrupt
from .losses import BatchClosure, Closure, mean_loss
from .momentum import piece_of, spread
from .overriding import Overrides
from .parameters import LeftAlone, Parameter, find_parameters
from .passes import Group, Scalar, Term, Update, check_update, run_pass, run_update
from .reading import ReadHooks
from .registered import forget_handle
from .report import ParameterReport, Report, report_of
from .sharding import reshard
from .storage import Storage
from .structure import Structure
from .watching import StorageWatch, WeightVersions

_ONE_POINT = "weights that are moved are at one point at a time: evaluations in one forward pass need placement='probe'"

Perturbation = tuple[int, float]
"""(direction, scale): a perturbation within the current step."""


class Handle:
    """Owns V, the momentum and the tables of one patched model, and moves its weights. Made by :func:`patch`.

    The handle keeps no step counter and no perturbation state: each call says which step it means, and an optimiser
    (:mod:`lozo_kernels.optim`) or the caller keeps the sequence. A direction D is U V^T (times 1/r under
    ``scaling="card"``) for low-rank parameters and Z for dense ones.

    Attributes:
        model, config: what was patched, and how.
        guidance: makes V from inputs (AGZO); None with other estimators.
        trained: the trained parameters; per-parameter scalars follow their order.
        backward: makes calls of the model evaluate by themselves (``drive=``); None without.
        on_merge: called just before a merge that does not come with a new V, or None.
        on_guides: called with a window and its V (:attr:`Guidance.vs`) just before a V that was made from inputs is used, or None.
            If either raises, what it is called before is not done.
        probes: evaluations only read the weights.
        state_in_pieces: a process has the momentum of its shards only.
        elsewhere: the storage of the parameters, if another program has the weights; None: the model has them.
        precision: the coarsest dtype that evaluations are known to compute with.
        choices: how often a probe chose sides, so that others see that it did again.

    Args:
        estimator: makes the directions; None: the one that the config names.
    """

    probes: ClassVar[bool] = False
    state_in_pieces: ClassVar[bool] = True
    elsewhere: ClassVar[type[Storage] | None] = None

    def __init__(self, model: nn.Module, config: PatchConfig, estimator: Estimator | None = None) -> None:
        self.model = model
        self.config = config
        self.estimator = ESTIMATORS[config.estimator](config) if estimator is None else estimator
        self.trained: list[Parameter]
        self._left: list[LeftAlone]
        self.trained, self._left = find_parameters(model, config, self.elsewhere)
        self.guidance = Guidance(self.trained, self.estimator) if isinstance(self.estimator, Guided) else None
        self.backward: Backward | None = None
        self.on_merge: Callable[[], None] | None = None
        self.on_guides: Callable[[int, dict[str, Tensor]], None] | None = None
        self.precision = torch.float32
        self.choices = 0
        self._aliases = {alias: p for p in self.trained for alias in (p.name, *p.aliases)}
        self._sharded = [p for p in self.trained if p.storage.sharded]
        self._watch = StorageWatch(self.trained)
        self._structure = Structure(model, self.trained, self._left, strict=self.probes)
        self._versions = WeightVersions(self.trained)
        self._buffers = Buffers(model)
        self._v: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._window: int | None = None
        self._checked_at: int | None = None
        self._groups: list[Group] = []
        self._flush: Callable[[], object] | None = None
        self._reads: ReadHooks | None = None
        self._restored = False
        self._begin()

    def _begin(self) -> None:
        """Finishes the construction, once the parameters are known."""
        self._refresh_groups()

    @property
    def names(self) -> list[str]:
        """Canonical names of the trained parameters; per-parameter scalars follow this order."""
        return [p.name for p in self.trained]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters as they are now, in the order of :attr:`names`."""
        return [p.tensor for p in self.trained]

    @property
    def devices(self) -> list[torch.device]:
        """The devices of the trained parameters at the last pass, each once."""
        return list(dict.fromkeys(group.device for group in self._groups))

    @property
    def groups(self) -> list[Group]:
        """The groups that passes work on. The list is another one after storage moved."""
        return self._groups

    @property
    def momentum(self) -> dict[str, Tensor]:
        """Momentum by name, fp32: (batch, rows, rank) for low-rank parameters, (batch, rows, cols) for dense ones, for a shard
        its part of that; empty before :meth:`enable_momentum`."""
        return dict(self._momentum)

    @property
    def momentum_state(self) -> dict[str, Tensor]:
        """As :attr:`momentum`, but the same for any number of processes: that of sharded parameters is a DTensor."""
        found = self.momentum
        if self.state_in_pieces and self._sharded:
            self._refresh_groups()
            found = {p.name: spread(p, found[p.name]) for p in self.trained if p.name in found}
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user on how the model is treated."""
        return () if self.guidance is None else self.guidance.notes

    @property
    def window(self) -> int | None:
        """The window (step // interval) of the V in memory, None before the first use. Momentum is expressed in this V."""
        return self._window

    @property
    def sharded(self) -> bool:
        """Whether some parameter is spread over processes, which then have to take every step together."""
        return bool(self._sharded)

    @property
    def moves_weights(self) -> bool:
        """Whether evaluations move weights, which rounds them. A probe does so for parameters that fell back to it."""
        return True

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors B of a probe, by name: what was learned since the last merge."""
        return {}

    @property
    def undecaying(self) -> list[str]:
        """Names of parameters that weight decay cannot be applied to."""
        return []

    @property
    def past(self) -> dict[str, dict[str, Any]]:
        """What quantised layers learned in earlier windows of a probe, by name. No weight can hold it."""
        return {}

    @property
    def history(self) -> list[tuple[int, dict[str, Tensor]]]:
        """With ``keep_factors``: (window, merged B by name) of every window so far, on the CPU."""
        return []

    def load_learned(self, past: Mapping[str, Mapping[str, Any]], history: Sequence[tuple[int, dict[str, Tensor]]]) -> None:
        """Loads :attr:`past` and :attr:`history` of another handle. In place both are empty.

        Raises:
            ValueError: names or shapes differ; nothing was changed.
        """

    def describe_sides(self) -> dict[str, Any] | None:
        """How a probe treats every parameter, as plain JSON for :meth:`adopt_sides`; None in place, and before sides are chosen."""
        return None

    def adopt_sides(self, described: dict[str, Any], *, install: bool) -> None:
        """Takes over what :meth:`describe_sides` of another handle of the same model returned. In place this does nothing."""

    def enable_momentum(self) -> None:
        """Allocates momentum, filled with zeros. A second call changes nothing."""
        self._check_usable()
        if not self._momentum:
            for p in self.trained:
                batch, rows, cols = p.storage.shard().x.shape if self.state_in_pieces else p.extent
                shape = (batch, rows, self.config.rank if p.low_rank else cols)
                self._momentum[p.name] = torch.zeros(shape, dtype=torch.float32, device=self.device_of(p))
            self._rebuild_groups()

    def device_of(self, p: Parameter) -> torch.device:
        """The device on which a parameter's state lies and its noise is made."""
        return p.tensor.device

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
        check_range("direction", direction, MAX_DIRECTION)
        self.move(step, None, (direction, scale))

    @torch.no_grad()
    def shift_(self, step: Step, remove: Perturbation, add: Perturbation) -> None:
        """Replaces one perturbation of a step by another in one pass.

        Args:
            step: as in :meth:`perturb_`.
            remove: (direction, scale) of the perturbation that is applied now.
            add: (direction, scale) of the one that is to be applied.
        """
        for direction, scale in (remove, add):
            check_scale(scale)
            check_range("direction", direction, MAX_DIRECTION)
        self.move(step, remove, add)

    def move(self, step: Step, before: Perturbation | None, after: Perturbation | None) -> None:
        """As :meth:`shift_`, without checks of arguments. None stands for no perturbation."""
        if before is not None:
            self._check_weights()
        self._start(step)
        self._move_groups(step, before, after)
        self._versions.look()

    def _move_groups(self, step: Step, before: Perturbation | None, after: Perturbation | None) -> None:
        if before is not None and after is not None and before[0] != after[0]:
            terms = [Term(Draw(step, before[0]), perturb=-before[1]), Term(Draw(step, after[0]), perturb=after[1])]
        else:
            (direction, scale), removed = after or (before[0], 0.0), before[1] if before else None  # type: ignore[index]
            terms = [Term(Draw(step, direction), perturb=scale if removed is None else scale - removed)]
        run_pass(self._groups, terms)

    def spread_(self, step: Step, offsets: Sequence[Perturbation], examples: int, parts: int = 1) -> None:  # noqa: ARG002
        """Lets evaluations of a probe share the next forward passes, with ``examples`` of the batch at each offset, in order.

        Args:
            parts: with directions per example there is one offset, which stands for as many directions: each of these equal parts
                of the examples is at its own, from that of the offset on.
        """
        raise RuntimeError(_ONE_POINT)

    def rest_(self) -> None:
        """Takes any perturbation of a probe out. In place this raises: the caller has to undo it with :meth:`perturb_`."""
        raise RuntimeError(_ONE_POINT)

    def check_batches(
        self,
        closures: Sequence[BatchClosure],  # noqa: ARG002  (for probes, as all of them)
        batches: Sequence[Any],  # noqa: ARG002
        conditions: Conditions,  # noqa: ARG002
        *,
        step: int,  # noqa: ARG002
        parts: int,  # noqa: ARG002
    ) -> bool:
        """Checks that evaluations of a probe which share a forward pass give the losses that they give one by one: those of several
        copies of a batch or, with directions per example, those of ``parts`` of it.

        Returns:
            Whether that proves something, which it does if some loss is finite and moves.

        Raises:
            BatchSplitError: they do not.
        """
        raise RuntimeError(_ONE_POINT)

    @torch.no_grad()
    def update_(
        self,
        step: Step,
        c: Scalar | Sequence[Scalar],
        lr: Scalar,
        *,
        weight_decay: Scalar = 0.0,
        beta: float | Tensor | None = None,
        applied: float = 0.0,
        perturb_next: float | None = None,
    ) -> None:
        """X <- (1 - lr * weight_decay) X - lr * mean over directions of c D / r, and changes of the perturbation in the same pass.

        With momentum: N <- beta N + (1 - beta) mean of c U, and N V^T in place of the mean (LOZO, Algorithm 2). Up to two draws
        share one pass over the weights. A probe updates B instead of X.

        Args:
            step: the step whose directions were evaluated; a tensor as in :meth:`perturb_`, and then ``perturb_next`` is for a step
                of the same window.
            c: projected gradient (F(+) - F(-)) / (2 eps), one per direction; numbers or 0-dim tensors, which are not read here.
            lr, weight_decay: numbers, 0-dim tensors, or one value per trained parameter.
            beta: momentum coefficient; None for no momentum. Needs :meth:`enable_momentum`.
            applied: scale of the perturbation along the last direction that is still in the weights; it is taken out.
            perturb_next: scale of the perturbation along direction 0 of ``step + 1`` that is put in; None for none.

        Raises:
            ValueError, RuntimeError: an argument does not fit, or under a probe an evaluation changed weights; nothing was changed.
        """
        update = Update(step, list(c) if isinstance(c, Sequence) else [c], lr, weight_decay, beta)
        check_update(update, len(self.trained))
        check_scale(applied)
        if beta is None and self.estimator.carries:
            raise ValueError(f"updates of {self.config.estimator!r} are made of momentum: give beta, 0.0 for none")
        if beta is not None and not self._momentum:
            raise RuntimeError("momentum was not enabled: call enable_momentum() first")
        if perturb_next is not None:
            if self.probes:
                raise ValueError("a probe makes no pass that a perturbation could share: leave perturb_next out")
            check_scale(perturb_next)
            if not isinstance(step, Tensor):
                check_range("step", step, MAX_DRAW - 2)  # step + 1 has to be in range too
        self.take(update, applied, perturb_next)

    def take(self, update: Update, applied: float = 0.0, perturb_next: float | None = None) -> None:
        """As :meth:`update_`, without checks of arguments."""
        if applied:
            self._check_weights()
        self._start(update.step)
        fits = perturb_next is None or self._same_window(update.step)
        run_update(self._groups, update, applied, perturb_next if fits else None)
        self._versions.look()
        if not fits:
            assert not isinstance(update.step, Tensor) and perturb_next is not None
            self.move(update.step + 1, None, (0, perturb_next))

    def check_capturable(self) -> None:
        """Raises ValueError if a captured graph cannot take steps on this handle."""

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """While the body runs, passes only warm up: a probe forgets afterwards that they were made. In place this does nothing:
        passes with scales of 0 leave the weights as they are."""
        yield

    @property
    def in_use(self) -> list[object]:
        """Memory besides the weights that evaluations use, which a captured graph needs for as long as it is there."""
        return []

    def begin_replay(self, step: int) -> None:
        """Called before a captured graph takes a step."""
        self.enter_window(step)

    def end_replay(self, step: int, *, decays: bool) -> None:
        """Notes the update that a captured graph made. ``decays``: with weight decay."""

    def _same_window(self, step: Step) -> bool:
        """Whether the next step has the same V. It has for a step that is a tensor, by the contract of :meth:`update_`."""
        return isinstance(step, Tensor) or (step + 1) // self.config.interval == step // self.config.interval

    @torch.no_grad()
    def materialize(self, name: str, step: int, *, direction: int = 0) -> Tensor:
        """Returns one parameter's direction D(step, direction): ``perturb_(step, s)`` adds s times this.

        Args:
            name: the parameter's name, or an alias.

        Returns:
            fp32 of the parameter's shape, on its device.

        Raises:
            KeyError: no trained parameter has this name.
        """
        p = self.find(name)
        check_range("step", step, MAX_DRAW)
        device, shape = self.device_of(p), p.storage.shape
        if not p.low_rank:
            more: dict[str, Any] = {
                "direction": 0 if self.config.per_example else direction,
                "law": self.config.directions_law,
                "device": device,
            }
            return dense(self.config.seed, shape.numel(), p.tensor_id, step, **more).view(shape)
        spec = FactorSpec(p.tensor_id, p.extent, choose_backend(device, self.config.backend).backend, device)
        return (self.estimator.direction(spec, Draw(step, direction)) * self.config.perturb_factor).view(shape)

    def report(self) -> Report:
        """Returns how every parameter of the model is treated. ``print(handle.report())`` shows a table."""
        self._refresh_groups()
        serving = {device: choose_backend(device, self.config.backend) for device in map(self.device_of, self.trained)}
        rows = [self._describe(p, serving[self.device_of(p)].backend.name) for p in self.trained]
        if self.guidance is not None:
            rows = [self.guidance.describe(row) for row in rows]
        for left in self._left:
            t = left.tensor
            rows.append(ParameterReport(left.name, (), tuple(t.shape), t.dtype, t.device, "left alone", None, left.reason))
        return Report(tuple(rows), {str(device): choice.rejected for device, choice in serving.items()}, self.notes)

    @torch.no_grad()
    def guide(
        self,
        closures: Closure | Sequence[Closure],
        *,
        step: int,
        together: Together = in_one_process,
    ) -> None:
        """With AGZO, makes V of a step's window from the inputs that layers are given by the closures, unless it is there already.

        An optimiser does this before the first evaluation of a window. Buffers and random numbers are put back.

        Args:
            closures: as :meth:`lozo_kernels.LOZO.step` takes them.
            together: makes one V of what several processes saw.

        Raises:
            ValueError: no layer was given finite inputs.
        """
        self._check_usable()
        check_range("step", step, MAX_DRAW - 1)
        guidance, window = self.guidance, step // self.config.interval
        if guidance is None or guidance.window == window:
            return
        some = [closures] if callable(closures) else list(closures)
        conditions = self.conditions(randomness=True)
        try:
            vs = guidance.look(lambda: mean_loss(some, conditions), window, together)
        finally:
            conditions.put_back()
        with deferred_interrupt():
            if self.on_guides is not None:
                self.on_guides(window, vs)
            guidance.take(window, vs)

    def load_guides(self, window: int | None = None, vs: Mapping[str, Tensor] | None = None) -> None:
        """Makes the V of another AGZO handle of the same model (:attr:`Guidance.vs`) that of a window; None: there is none yet.
        Other estimators have none, and this does nothing.

        Raises:
            ValueError: it does not fit; nothing was changed.
        """
        self._check_usable()
        if self.guidance is None:
            return
        self.guidance.check(vs or {})
        self.merge()  # what was learned belongs to the old V
        self.guidance.take(window, vs or {})
        self._refresh_groups()
        self._resample(window, reproject=False)

    def prepare(self, closures: Closure | Sequence[Closure], conditions: Conditions | None = None, *, step: int = 0) -> None:
        """Called before the first step with what it will evaluate. In place there is nothing to prepare."""

    def conditions(self, *, randomness: bool) -> Conditions:
        """What evaluations that begin now start from: buffers as they are now, and with ``randomness`` the same random numbers."""
        return Conditions(self.devices, self._buffers, randomness=randomness)

    def merge(self) -> None:
        """Merges what a probe learned into the weights. In place they are always up to date."""

    def guard(self, flush: Callable[[], object]) -> None:
        """Calls ``flush`` before weights of the model are read: by a forward pass, ``state_dict()``, a copy, ...

        An optimiser that leaves a perturbation in the weights between steps needs this.
        """
        self._check_usable()
        if self._flush is not None:
            raise RuntimeError("the handle is guarded already; use one optimiser per handle")
        self._flush = flush
        self._reads = ReadHooks(self.model, self.before_read, Overrides(), forwards=True)

    def before_read(self, use: str) -> bool:  # noqa: ARG002  (for probes)
        """Brings the weights up to date before something reads them (:data:`~lozo_kernels.model.reading.BeforeRead`)."""
        return self._flush is not None and bool(self._flush())

    def restore(self) -> None:
        """Undoes the patch: applies pending updates and removes hooks. The trained weights stay. A second call does nothing."""
        if self._restored:
            return
        if self._flush is not None:
            self._flush()
            self._flush = None  # it would keep the optimiser alive, which holds the model
        if self._reads is not None:
            self._reads.remove()
            self._reads = None  # it holds this handle: their memory would wait for the garbage collector
        if self.backward is not None:
            self.backward.remove()
        self._restored = True
        forget_handle(self.model, self)

    def load_momentum(self, momentum: dict[str, Tensor], window: int | None) -> None:
        """Loads :attr:`momentum_state` of another handle of the same model, which is expressed in the V of ``window``.

        Raises:
            ValueError: names or shapes differ; nothing was changed.
        """
        self._check_usable()
        if not isinstance(momentum, dict) or not all(isinstance(n, Tensor) for n in momentum.values()):
            raise TypeError(f"the saved momentum is tensors by name, not {momentum!r:.200}")
        if window is not None:
            check_range("window", window, MAX_DRAW)
        odd = sorted(set(self.names).symmetric_difference(momentum))
        if odd:
            raise ValueError(f"the saved momentum is of other parameters; differing: {', '.join(odd[:5])}")
        self.merge()  # what was learned belongs to the old V
        self.enable_momentum()
        self._refresh_groups()
        own, pieces = self._momentum, self.state_in_pieces
        loaded = {p.name: piece_of(p, momentum[p.name], own[p.name], pieces) for p in self.trained}
        for name, value in loaded.items():
            own[name].copy_(value)
        self._resample(window, reproject=False)

    def find(self, name: str) -> Parameter:
        """Returns the trained parameter with a name or alias. Raises KeyError if there is none."""
        if not isinstance(name, str) or name not in self._aliases:
            raise KeyError(f"no trained parameter is named {name!r}; there are {', '.join(map(repr, self.names[:5]))}, ...")
        return self._aliases[name]

    def enter_window(self, step: int) -> None:
        """Makes V that of a step's window, and re-projects the momentum to the new V (LOZO-M, Algorithm 2, line 6).

        Passes whose step is a number do this themselves.
        """
        self._check_usable()
        check_range("step", step, MAX_DRAW - 1)
        self._refresh_groups(step)
        window = step // self.config.interval
        if window != self._window:
            self._resample(window, reproject=bool(self._momentum) and self._window is not None)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a handle cannot be copied or pickled, because its model would not be patched again: copy the model, which copies its "
            "weights as they are now without the patch, and patch the copy"
        )

    def _check_usable(self) -> None:
        if self._restored:
            raise RuntimeError("this handle was restored; patch the model again")

    def _check_weights(self) -> None:
        """Raises RuntimeError, once, if weights changed since our last pass, which left a perturbation in them."""
        self._versions.check(
            "while it is perturbed, and evaluations must only read weights. If its module changes it (Embedding(max_norm=...)), "
            "exclude it; if the model rescales weights when its mode changes (RWKV), call it once in that mode before step(); if "
            "you change weights between steps with fuse_steps, call flush() first"
        )

    def _start(self, step: Step) -> None:
        torch.clear_autocast_cache()  # it holds casts of weights as they were
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
                    self.estimator.resample_(group.table, window=window, reproject=reproject, backend=group.backend)
        self._window = window

    def _resample_shards(self, group: Group, window: int, reproject: bool) -> None:
        """As the op, for shards: this process may have some matrices or columns only, but re-projection needs all columns."""
        table = group.table
        for t, i in enumerate(group.index.tolist()):
            p, shard = self.trained[i], self.trained[i].storage.shard()
            spec = FactorSpec(p.tensor_id, p.extent, group.backend, group.device)
            mine = slice(shard.first_matrix, shard.first_matrix + len(shard.x))
            new = self.estimator.right(spec, window)[mine]
            if reproject:
                assert table.n is not None and self._window is not None
                old = self.estimator.right(spec, self._window)[mine]
                table.n[t].copy_(reference.reproject(table.n[t], old, new))
            assert table.v is not None
            table.v[t].copy_(new[..., shard.col_offset : shard.col_offset + shard.x.shape[2]])

    def _refresh_groups(self, step: Step | None = None) -> None:
        """Rebuilds the groups if storage moved since the last pass. At the first pass of a step, looks at the structure too."""
        if isinstance(step, int) and step != self._checked_at:
            self._structure.check(flags=self.backward is None)
            self._checked_at = step
        self._watch.look(self._shards(), step, self._rebuild_groups)

    def _shards(self) -> list[Tensor]:
        """The storage of the shards that passes change. Whole weights that FSDP kept, which would be stale, are freed."""
        if not self._sharded:
            return []
        reshard(self.model)
        return [p.storage.shard().x for p in self._sharded]

    def _rebuild_groups(self) -> None:
        self._groups = self._make_groups(range(len(self.trained)))

    def _make_groups(self, positions: Iterable[int]) -> list[Group]:
        """Makes groups over the weights of some parameters, by kind and device."""
        by_place: dict[tuple[str, torch.device], list[int]] = {}
        for i in positions:
            by_place.setdefault((self.trained[i].kind, self.trained[i].tensor.device), []).append(i)
        return [self._make_group(kind, device, index) for (kind, device), index in by_place.items()]

    def _make_group(self, kind: str, device: torch.device, index: list[int]) -> Group:
        some = [self.trained[i] for i in index]
        shards = [p.storage.shard() for p in some]
        for p, shard in zip(some, shards, strict=True):
            if p.name in self._momentum:
                self._momentum[p.name] = self._momentum[p.name].to(device)
            if kind == "lowrank":
                v, (batch, _, cols) = self._v.get(p.name), shard.x.shape
                shape = (batch, self.config.rank, cols)
                self._v[p.name] = torch.zeros(shape, dtype=torch.float16, device=device) if v is None else v.to(device)
        table = TensorTable(
            [shard.x for shard in shards],
            [p.tensor_id for p in some],
            v=[self._v[p.name] for p in some] if kind == "lowrank" else None,
            n=[self._momentum_as(kind, p, shard.x) for p, shard in zip(some, shards, strict=True)] if self._momentum else None,
            row_offsets=[shard.row_offset for shard in shards],
            col_offsets=[shard.col_offset for shard in shards],
            global_cols=[shard.global_cols for shard in shards],
        )
        backend = choose_backend(device, self.config.backend).backend
        return Group(kind, torch.tensor(index, device=device, dtype=torch.int64), table, backend, self.estimator, self.config)

    def _momentum_as(self, kind: str, p: Parameter, x: Tensor) -> Tensor:
        """The momentum of a parameter, seen as its weight is: a vector that is not contiguous is a column."""
        momentum = self._momentum[p.name]
        return momentum if kind == "lowrank" else momentum.view(x.shape)

    def _describe(self, p: Parameter, backend: str) -> ParameterReport:
        return report_of(p, self.config.rank, backend)
