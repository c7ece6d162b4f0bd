"""The base of all optimisers, a ``torch.optim.Optimizer`` that never calls backward. :mod:`.methods` has one class a method."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from ..kernels.checks import check_number
from ..model.backward import Backward
from ..model.config import OPTIONS, check_names
from ..model.handle import Handle
from ..model.interrupts import deferred_interrupt
from ..model.losses import pair_closures
from ..model.patching import DriveOptions, check_model, patch
from ..model.weighed import StepClosure
from .advice import DRIVEN, IN_A_CLOSURE, FirstStep, explain
from .groups import check_cover, groups_of, named_group, rates_of, trained_names
from .measuring import has_parts
from .parallel import Parallel, as_parallel, shared_shards
from .rate_finder import AUTO, in_parts, make_finder
from .state import load_state, state_of
from .stepper import Stepper
from .steps import StepInfo, StepLog, StepSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

KEYWORDS = (
    *("params", "lr", "weight_decay", "parallel", "drive"),
    *(field.name for field in dataclasses.fields(StepSettings)),
    *(name for name in OPTIONS if name != "estimator"),
)
"""The names of all keywords that an optimiser takes."""


def _forwarded(holder: str, name: str) -> Any:
    """A property that reads and writes an attribute of the stepper, or of its settings."""

    def read(self: ZerothOrderOptimizer) -> Any:
        return getattr(self.stepper if holder == "stepper" else self.stepper.settings, name)

    def write(self: ZerothOrderOptimizer, value: Any) -> None:
        setattr(self.stepper if holder == "stepper" else self.stepper.settings, name, value)

    return property(read, write)


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """The base of the optimisers: two-point (or one-sided) estimates along directions that are regenerated, never stored.

    ``step(closure)`` evaluates the closure without a graph at perturbed weights and updates them in place; a step costs two
    forward passes per direction (one more forward in all when one-sided) and three passes over the weights, or two with
    ``fuse_steps``.

    Args:
        target: a model, which is patched with ``patch_options``, or the :class:`Handle` of one that is.
        params: parameter groups as torch takes them (parameters, named parameters, or dicts with "params" and "lr" or
            "weight_decay"); they must cover the patched parameters. None: one group of all.
        lr: learning rate alpha; may be a 0-dim tensor. "auto": found from forward passes (:mod:`lozo_kernels.optim.rate_finder`),
            for which step() is called with inputs or with several closures; the "lr" of groups is then a factor.
        eps: perturbation scale epsilon.
        momentum: beta of LOZO-M / MeZO-M; 0 for none.
        weight_decay: decoupled: X is multiplied by 1 - lr * weight_decay at each update.
        directions: directions per step, whose estimates are averaged.
        two_sided: (F(+) - F(-)) / (2 eps); False: (F(+) - F) / eps.
        fuse_steps: leave the update of a step pending and make it in the same pass as the next perturbation. The weights are
            brought up to date before any forward pass, ``state_dict()`` or ``load_state_dict()`` of the model outside ``step``;
            call :meth:`flush` before reading ``param.data`` directly. In half precision the fused pass rounds once where two
            passes round twice, so evaluating between steps changes low-order bits of the run.
        evaluation: "sequential", one forward pass after the other; "batched", all evaluations of a step in one forward pass
            that reads the weights once, for few tokens and with memory for the activations of all; or "split", each direction on
            an equal part of the batch of its own, so that two forward passes serve all ``directions``. The last two need a probe
            and ``step(closure, inputs)``; dropout then differs between evaluations.
        common_random_numbers: give every evaluation of a step the same state of torch's generators (dropout, sampling).
        normalise: divide c, so that a good learning rate does not depend on the scale of the loss: "spread", by its standard
            deviation over the directions of the step (FZOO); "scalar", by the root of a running mean of its square (MEAZO).
        max_nonfinite: raise :class:`NonFiniteLossError` after this many steps in a row with a loss that is not finite.
        parallel: several processes take each step together: "examples", each evaluates its own, "directions", each evaluates some
            of them, or a :class:`~lozo_kernels.Parallel`, whose page says what is exchanged and compared. None: nothing is
            exchanged here, unless the model is sharded over all processes, which means "examples".
        patch_options: see :func:`patch`; only with a model as target. ``drive="backward"`` is for loops that call
            ``loss.backward()`` and ``step()``.

    Attributes:
        stepper: takes the steps.
        info: what the last step saw, None before the first.
        journal: records the run (:mod:`lozo_kernels.journal`), or None.

    Raises:
        TypeError, ValueError: an argument does not fit; the model is untouched.
    """

    estimator: ClassVar[str] = "lowrank"
    dense_share: ClassVar[float] = 1.0
    """What multiplies lr for parameters with dense directions, in groups that have no lr of their own."""

    eps: float = _forwarded("settings", "eps")
    momentum: float = _forwarded("settings", "momentum")
    directions: int = _forwarded("settings", "directions")
    two_sided: bool = _forwarded("settings", "two_sided")
    fuse_steps: bool = _forwarded("settings", "fuse_steps")
    evaluation: str = _forwarded("settings", "evaluation")
    common_random_numbers: bool = _forwarded("settings", "common_random_numbers")
    max_nonfinite: int = _forwarded("settings", "max_nonfinite")
    parallel: Parallel | None = _forwarded("stepper", "parallel")
    info: StepInfo | None = _forwarded("stepper", "info")
    journal: StepLog | None = _forwarded("stepper", "log")

    def __init__(
        self,
        target: nn.Module | Handle,
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor | str = 1e-6,
        eps: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        directions: int = 1,
        two_sided: bool = True,
        fuse_steps: bool = False,
        evaluation: str = "sequential",
        common_random_numbers: bool = True,
        max_nonfinite: int = 10,
        normalise: str | None = None,
        parallel: Parallel | str | None = None,
        **patch_options: Unpack[DriveOptions],
    ) -> None:
        name = type(self).__name__
        check_model(f"{name}(model, lr=...)", target.model if isinstance(target, Handle) else target)
        check_names(name, patch_options, KEYWORDS)
        if isinstance(lr, str) and lr != AUTO:
            raise TypeError(f"lr is a number, a 0-dim tensor or {AUTO!r}, not {lr!r}")
        factor = 1.0 if isinstance(lr, str) else lr
        check_number("lr", factor, low=0.0)
        check_number("weight_decay", weight_decay, low=0.0)
        settings = StepSettings(
            eps=eps,
            momentum=momentum,
            directions=directions,
            two_sided=two_sided,
            fuse_steps=fuse_steps,
            evaluation=evaluation,
            common_random_numbers=common_random_numbers,
            max_nonfinite=max_nonfinite,
            normalise=normalise,
        )
        together = as_parallel(parallel)
        if isinstance(target, Handle) and patch_options:
            raise TypeError(f"the handle is configured already; give {', '.join(patch_options)} to patch()")
        handle = target if isinstance(target, Handle) else patch(target, estimator=self.estimator, **patch_options)  # type: ignore[misc]
        try:
            self._check_handle(handle, settings, together)
            if together is None and handle.backward is None:
                together = shared_shards(handle.model)
            finder = make_finder(handle, settings) if lr is not factor else None
            self.stepper = Stepper(handle, settings, together, finder)
            self._stepped = False
            super().__init__(groups_of(handle, params, factor, self.dense_share), {"lr": factor, "weight_decay": weight_decay})
            check_cover(self.param_groups, handle)
            if settings.momentum or handle.estimator.carries:
                handle.enable_momentum()
                self.defaults |= (
                    {"momentum": momentum} if momentum else {}
                )  # where a scheduler looks for it; rates_of() says that it may not change
            if together is not None:
                together.connect(handle, settings.directions, self._facts())
            if settings.fuse_steps:
                handle.guard(self.stepper.flush)
        except BaseException:
            if handle is not target:
                handle.restore()
            raise
        if handle.backward is not None:
            handle.backward.connect(self, handle.devices[0])

    @property
    def handle(self) -> Handle:
        """The handle of the model that is trained."""
        return self.stepper.handle

    @property
    def steps_done(self) -> int:
        """The number of steps taken so far, which is the index of the next one."""
        return self.stepper.count

    @property
    def learning_rates(self) -> list[float | Tensor]:
        """The learning rate of each group in the next step: with ``lr="auto"``, what was found times the group's factor."""
        finder = self.stepper.finder
        return [group["lr"] if finder is None else group["lr"] * finder.rate for group in self.param_groups]

    @property
    def measures_next(self) -> bool:
        """Whether the next step measures for ``lr="auto"``, and needs its batch in parts."""
        return self.stepper.finder is not None and self.stepper.finder.due(self.steps_done)

    @property
    def parts_next(self) -> int:
        """The closures that the next step needs: two, parts of its batch, where it measures for ``lr="auto"`` and processes are not
        its parts already."""
        return 2 if self.measures_next and not has_parts(self.parallel) else 1

    @property
    def by_example(self) -> bool:
        """Whether a step needs ``inputs`` and the loss of each example: evaluations share a forward pass, or examples have
        directions of their own."""
        return self.stepper.settings.by_example or self.handle.config.per_example

    @property
    def projected_gradient(self) -> Tensor | None:
        """(directions,) fp64: with ``drive="backward"``, c as backward has accumulated it since the last step, or None."""
        gradient = None if self.handle.backward is None else self.handle.backward.gradient
        return None if gradient is None else gradient[0]

    @torch.no_grad()
    def step(self, closure: Any = None, inputs: Any = None) -> Tensor:  # type: ignore[override]
        """Takes one step of the algorithm.

        Args:
            closure: returns the loss of a batch as a one-element tensor or a number, without calling backward; it is called
                once per evaluation and must mean the same batch each time. Several closures are micro-batches: their mean is
                the objective of the step. A closure may also return (sum, weight), a sum of losses and how many they are: their
                quotient is the loss, and the weight is a whole number that is the same at all evaluations.
            inputs: what the closure is called with, a tensor or any nest of tensors, examples first; one for each of several
                closures. The closure may then return one loss per example, or (sums, weights) of the examples, and must for
                "batched", where it gets the examples once for each evaluation, and "split" evaluations. None: it is called without.

        With ``drive="backward"``, step() uses what backward has accumulated; a closure is called once and does that first.

        Returns:
            0-dim fp64 tensor, on the device of the loss: :attr:`StepInfo.loss`.

        Raises:
            TypeError: no closure, or one that does not return a loss.
            ValueError: a closure returned two values, of which the second counts nothing (an accuracy).
            RuntimeError: with ``drive="backward"``, nothing was backpropagated since the last step.
            BatchSplitError: the model cannot evaluate several points in one forward pass.
            NonFiniteLossError: see ``max_nonfinite``.
            PeerLostError, DivergenceError: with ``parallel``, a process is gone, or its run differs.
            Exception: whatever the closure raises; the weights are then back where they were (in place, up to one rounding of
                the weight's dtype), and the step was not taken.
        """
        stepper = self.stepper
        if self.handle.backward is not None:
            return self._step_after_backward(self.handle.backward, closure, inputs)
        closures, batches = pair_closures(closure, inputs)
        if stepper.settings.by_example and batches is None:
            raise self._needs_inputs()
        measuring = self.measures_next
        if measuring and self.evaluation != "split":
            closures, batches = in_parts(closures, batches, of_ranks=has_parts(stepper.parallel)), None
        first = None if self._stepped else FirstStep(self.handle.parameters)
        with deferred_interrupt(), stepper.alone():  # in this order: an interrupt must not leave the stepper taken
            try:
                plus, minus = stepper.evaluate([StepClosure(one) for one in closures], batches, measuring=measuring)
                info = self._conclude(stepper.differences(plus, minus), plus, minus)
            except BaseException as e:
                stepper.go_back()
                explain(e, IN_A_CLOSURE)
                raise
            if stepper.parallel is not None:
                settings = [float(group[key]) for group in self.param_groups for key in ("lr", "weight_decay")]
                settings += [] if stepper.finder is None else [stepper.finder.rate]
                stepper.parallel.committed(info, settings)
        if first is not None:
            first.check()
            self._stepped = True
        stepper.watch(info.loss)
        return info.loss

    def _conclude(self, c: Tensor, plus: Tensor, minus: Tensor) -> StepInfo:
        rates = rates_of(self.param_groups, self.handle, c.device)
        if self.stepper.finder is not None:
            rates = dataclasses.replace(rates, lr=rates.lr * self.stepper.finder.rate)
        update, info = self.stepper.conclude(c, plus, minus, rates)
        self.stepper.commit(update, info)
        return info

    def _step_after_backward(self, backward: Backward, closure: Any, inputs: Any) -> Tensor:
        if inputs is not None:
            raise TypeError("with drive='backward' the model is called with its inputs before step()")
        if closure is not None:
            try:
                with torch.enable_grad():
                    closure()
            except RuntimeError as e:
                explain(e, DRIVEN)
                raise
        info = self._conclude(*backward.take())
        self.stepper.watch(info.loss)
        return info.loss

    @torch.no_grad()
    def estimate(self, closure: Any, inputs: Any = None) -> tuple[Tensor, Tensor]:
        closures, batches = pair_closures(closure, inputs)
        if self.stepper.settings.by_example and batches is None:
            raise self._needs_inputs()
        return self.stepper.estimate([StepClosure(one) for one in closures], batches)

    def _needs_inputs(self) -> TypeError:
        return TypeError(
            f"evaluation={self.evaluation!r} needs step(closure, inputs), with a closure that takes the inputs and returns one "
            "loss for each example, or sums and weights"
        )

    def flush(self) -> None:
        """Makes an update that ``fuse_steps`` left pending. Without one this does nothing."""
        self.stepper.flush()

    def close(self) -> None:
        """Ends the run: finishes its journal, and leaves a plain model with the trained weights."""
        try:
            if self.journal is not None:
                self.journal.finish()
        finally:
            self.handle.restore()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does. The handle has to train its parameters."""
        group = named_group(self.handle, param_group, self.defaults)
        super().add_param_group(group)
        group.pop("momentum", None)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything besides the weights that a run needs to go on bit for bit, keyed by parameter name.

        A pending update is made first. V is not stored, since it follows from seed and step, except for AGZO's. Momentum of shards
        is in DTensors, which ``torch.distributed.checkpoint`` saves, and loads into any other sharding.
        """
        return state_of(self.stepper, self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned.

        Raises:
            ValueError: it is not a whole state, or was saved under other settings, noise or parameters; nothing was changed.
            RuntimeError: the optimiser has a journal; nothing was changed.
        """
        load_state(state_dict, self.stepper, self.param_groups, ("lr", "weight_decay"), kind=type(self).__name__)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an optimiser that is bound to a model cannot be copied or pickled: copy the model, build an optimiser for the copy, "
            "and load state_dict() into it"
        )

    def _check_handle(self, handle: Handle, settings: StepSettings, parallel: Parallel | None) -> None:
        """Raises ValueError if a handle is for another algorithm, or does not allow what the settings ask for."""
        if handle.config.estimator != self.estimator:
            found = handle.config.estimator
            raise ValueError(f"{type(self).__name__} needs a handle with estimator={self.estimator!r}, and this one has {found!r}")
        by_example = f"evaluation={settings.evaluation!r}" if settings.by_example else ""
        if handle.backward is not None and settings.fuse_steps:
            raise ValueError(
                "fuse_steps leaves weights perturbed, which drive='backward' does not allow: leave it out, or use step(closure)"
            )
        if by_example and handle.backward is not None and handle.backward.intercepts:
            raise ValueError(
                f"{by_example} needs the loss of each example, which drive='backward' does not allow: leave it out, or use "
                "step(closure, inputs) or lozo_kernels.hf.ZOTrainer"
            )
        if handle.backward is not None and parallel is not None:
            raise ValueError("with drive='backward' DistributedDataParallel averages over processes: leave parallel out")
        if settings.fuse_steps and handle.probes:
            raise ValueError("fuse_steps saves a pass over the weights, and a probe makes none: leave it out")
        if settings.fuse_steps and handle.sharded:
            raise ValueError("fuse_steps makes updates during forward passes, when weights are not in shards: leave it out")
        if by_example and not handle.probes:
            raise ValueError(f"{by_example} needs placement='probe': weights that are moved can be at one point only")
        if settings.evaluation == "split" and parallel is not None and parallel.mode == "directions":
            raise ValueError("evaluation='split' gives each direction examples of its own: use parallel='examples'")

    def _facts(self) -> dict[str, Any]:
        """What all processes have to agree on besides the weights."""
        groups = [[len(g["params"]), *(float(g[key]) for key in ("lr", "weight_decay"))] for g in self.param_groups]
        return {
            "method": type(self).__name__,
            **{key: str(value) for key, value in self.handle.config.to_dict().items()},
            **self.stepper.settings.of_run,
            "common_random_numbers": self.common_random_numbers,
            "max_nonfinite": self.max_nonfinite,
            "learning rate": "a number" if self.stepper.finder is None else AUTO,
            "parameter groups (parameters, lr, weight_decay)": groups,
            "groups of parameters": trained_names(self.param_groups, self.handle),
        }
