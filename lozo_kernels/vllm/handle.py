"""The handle of a model that an engine serves: it tells the engine which points there are and what to learn."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError
from ..model.config import PatchConfig
from ..model.handle import Handle, Perturbation
from ..model.parameters import Parameter
from ..model.passes import Update
from ..model.report import ParameterReport, Report, report_of
from ..model.storage import layer_kind
from .options import KEY, without
from .shadow import InEngine, shadow_of

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""How far a layer's outputs may be from those that the checkpoint's matrix gives, beside their norm. Other matrices are 1 away."""


_TRAINS = "_lozo_kernels_handle"
"""The attribute of an engine that has the handle that trains it."""


class EngineHandle(Handle):
    """As :class:`~lozo_kernels.model.probe.handle.ProbeHandle`, of an engine. The model is a shadow without weights.

    Attributes:
        llm: the engine.
        prepared: the places were checked.
        capacity: the points that one batch can hold.
        checkpoint: the engine's model, its revision and dtype, and whether code that comes with it is trusted.
        superseded: another handle trains the engine now.
        windows: how many earlier windows have factors of their own, beside the weights.
        scores_in_worker: workers make losses of prompts, so that no dict of log-probabilities is passed on for each token.
    """

    probes = True
    state_in_pieces = False
    elsewhere = InEngine

    def __init__(self, llm: Any, *, momentum: bool) -> None:
        self.llm = llm
        engine = llm.llm_engine.vllm_config
        options = (engine.additional_config or {}).get(KEY)
        if options is None:
            raise EngineError("this engine cannot be trained: build it with vllm.LLM(model, **lozo_kernels.vllm.engine_options())")
        self._check_idle()
        before = getattr(llm, _TRAINS, None)
        if before is not None:
            before.superseded = True  # its factors are forgotten now
        reports = self.call("lozo_begin", momentum)
        if reports[0]["reloaded"]:
            raise EngineError(
                "this engine has the weights of an earlier run, which reloaded them: build it anew, on what was saved"
            )
        model = llm.llm_engine.model_config
        keys = ("model", "revision", "dtype", "trust_remote_code")
        self.checkpoint: dict[str, Any] = {key: getattr(model, key) for key in keys}
        names = {tuple(report["names"]) for report in reports}
        if len(names) != 1:
            raise EngineError("the ranks of this engine have places for different parameters: it cannot be trained")
        self.places: dict[str, tuple[str, str]] = reports[0]["places"]
        self.not_placed: dict[str, str] = reports[0]["left"]
        self.scores_in_worker = all(report["scores"] for report in reports)
        self.capacity, self.prepared, self.windows = options["points"], False, 0
        self.compiled = reports[0]["compiled"]
        self.device = torch.device(reports[0]["device"])
        self._run, self._points, self._step = uuid.uuid4().hex[:12], [], 0  # type: ignore[var-annotated]
        self.superseded = False
        self._current: Perturbation = (0, 0.0)
        self._losses: dict[Perturbation, Any] = {}
        self._slots: list[Perturbation] = []
        config = without(PatchConfig(**options["patch"]), self.not_placed)
        super().__init__(shadow_of(engine.model_config.hf_config, engine.model_config.dtype), config)

        setattr(llm, _TRAINS, self)

    def _begin(self) -> None:
        pass  # the engine has the tables

    def _check_usable(self) -> None:
        super()._check_usable()
        if self.superseded:
            raise EngineError("another optimiser trains this engine now, and what this one learned is in it no longer")

    def call(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of :class:`~.worker.Methods` on every worker."""
        return self.llm.collective_rpc(method, args=args)  # type: ignore[no-any-return]

    @property
    def devices(self) -> list[torch.device]:
        """Where the driver has losses."""
        return [torch.device("cpu")]

    @property
    def moves_weights(self) -> bool:
        return False

    def learned(self) -> dict[str, dict[str, Tensor]]:
        """What was learned, by name, on the CPU: see :meth:`.factors.Factors.described`."""
        from safetensors.torch import load

        found: dict[str, dict[str, Tensor]] = {}
        for path, value in load(self.call("lozo_learned")[0]).items():
            name, _, key = path.rpartition(":")
            found.setdefault(name, {})[key] = value
        return found

    @property
    def factors(self) -> dict[str, Tensor]:
        found = self.learned()
        return {name: found[name]["factor"] for name in self.names}

    @property
    def momentum(self) -> dict[str, Tensor]:
        found = self.learned()
        return {name: found[name]["momentum"] for name in self.names if "momentum" in found[name]}

    def device_of(self, p: Parameter) -> torch.device:  # noqa: ARG002
        return self.device

    def enable_momentum(self) -> None:
        pass  # the run began with it

    def expect(self, step: int, points: Sequence[Perturbation]) -> None:
        """Says which points the next step evaluates at, which then share batches of the engine."""
        self._step, self._points = step, list(dict.fromkeys(points))
        self._losses.clear()

    def loss_at(self, objective: Any) -> Any:
        """The loss of an objective at the point that the model was moved to."""
        key = (id(objective), self._current)
        if key not in self._losses:
            points = self._points if self._current in self._points else [self._current]
            for start in range(0, len(points), self.capacity):
                some = points[start : start + self.capacity]
                self._put(some)
                for point, loss in zip(some, objective.evaluate(self, [*range(1, len(some) + 1)]), strict=True):
                    self._losses[id(objective), point] = loss  # type: ignore[index]
        return self._losses[key]  # type: ignore[index]

    def salt(self, slot: int) -> str:
        """What requests at a slot say, so that the engine's cache of prefixes never mixes points."""
        direction, scale = self._slots[slot - 1]
        return f"{self._run} {self._step} {direction if scale else 0} {scale!r}"

    @property
    def step(self) -> int:
        """The step that is evaluated now."""
        return self._step

    def perturb_(self, step: Any, scale: float, *, direction: int = 0) -> None:  # noqa: ARG002
        raise EngineError("requests of an engine say their points themselves: use step() or estimate() of its optimiser")

    def shift_(self, step: Any, remove: Perturbation, add: Perturbation) -> None:  # noqa: ARG002
        self.perturb_(step, 0.0)

    def check_capturable(self) -> None:
        raise EngineError("the steps of an engine are requests, which no graph captures: take plain steps")

    def move(self, step: Any, before: Perturbation | None, after: Perturbation | None) -> None:  # noqa: ARG002
        self._current = (0, 0.0) if after is None else after

    def rest_(self) -> None:
        self._current = (0, 0.0)

    def take(self, update: Update, applied: float = 0.0, perturb_next: float | None = None) -> None:  # noqa: ARG002
        self._check_usable()
        self._check_idle()
        assert isinstance(update.step, int)
        lr, decay, beta = map(_numbers, (update.lr, update.weight_decay, update.beta))
        c = [float(value) for value in update.c]
        self.windows = self.call(
            "lozo_update", update.step, c, lr, None if decay == [0.0] else decay, None if beta is None else beta[0]
        )[0]
        self._window = update.step // self.config.interval
        self.rest_()
        self._losses.clear()
        self.forget_prefixes()

    def enter_window(self, step: int) -> None:
        self._check_usable()
        if step // self.config.interval != self._window:
            self.call("lozo_window", step)
            self._window = step // self.config.interval

    def merge(self) -> None:
        """Ends the factors of this window, as a probe does that merges them. The engine keeps them beside its weights."""
        self.call("lozo_bank")

    def reload(self, folder: Path) -> None:
        """Lets the engine load weights that have all that was learned, and forgets the factors."""
        self._check_idle()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.call("lozo_forget")
        self.windows = 0
        self.forget_prefixes()

    def guard(self, flush: Any) -> None:  # noqa: ARG002
        raise EngineError("fuse_steps saves a pass over weights, and an engine's are only read: leave it out")

    def forget_prefixes(self) -> None:
        """Empties the engine's cache of prefixes, which is of other weights from now on. Raises EngineError if it is in use."""
        if not self.llm.reset_prefix_cache():
            raise EngineError("the engine's cache of prefixes is in use: finish all requests before the next step")

    def check(self, objective: Any) -> None:
        """Evaluates once at rest, and checks that every place takes part, with the parameter that the checkpoint has there.

        Raises:
            EngineError: a module did not run, or computes something else.
        """
        self.enter_window(self._step)
        self.call("lozo_check", True)
        try:
            self._put([(0, 0.0)])
            objective.evaluate(self, [1])
        finally:
            reports = self.call("lozo_check", False)
        dtype = self.llm.llm_engine.model_config.dtype
        for report in reports:
            idle = next((name for name, (calls, _) in report.items() if not calls), None)
            if idle is not None:
                raise EngineError(
                    f"{idle} took no part in a forward pass of the engine, so that it would not be trained: exclude it in "
                    "engine_options(), or build the engine with enforce_eager=True"
                )
            wrong = next((name for name, (_, error) in report.items() if error is not None and error > _TOLERANCE[dtype]), None)
            if wrong is not None:
                raise EngineError(
                    f"{wrong} does not compute with the checkpoint's matrix in its place (they differ by {report[wrong][1]:.1e}): "
                    "exclude it in engine_options()"
                )
        self.prepared = True

    def describe_sides(self) -> dict[str, Any] | None:
        """The sides of a probe of the Hugging Face model that goes on with this run."""
        rows = []
        for p in self.trained:
            layers = p.low_rank and all(layer_kind(owner) is not None for owner in p.storage.owners)
            rows.append(["activation" if layers else "scratch", None, None])
        return {"sides": rows, "precision": str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")}

    def adopt_sides(self, described: dict[str, Any], *, install: bool) -> None:
        """Does nothing: the engine has places."""

    @contextlib.contextmanager
    def checkpoint_lent(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While the body runs, the parameters are those of the checkpoint, which fingerprints are made of."""
        storages = [(p.storage, weights[p.name]) for p in self.trained]
        try:
            for storage, weight in storages:
                storage.lent = weight  # type: ignore[attr-defined]
            yield
        finally:
            for storage, _ in storages:
                storage.lent = None  # type: ignore[attr-defined]

    def restore(self) -> None:
        """Gives the engine its own modules back: what was learned is in it no longer. A second call does nothing."""
        if not self._restored:
            self._check_idle()
            self.call("lozo_remove")
            self.forget_prefixes()
            super().restore()

    def report(self) -> Report:
        rows = []
        for p in self.trained:
            kind, path = self.places[p.name]
            rows.append(report_of(p, self.config.rank, "engine", f"{kind} of {path}"))
        for left in self._left:
            reason = self.not_placed.get(left.name, left.reason)
            t = left.tensor
            rows.append(ParameterReport(left.name, (), tuple(t.shape), t.dtype, self.device, "left alone", None, reason))
        return Report(tuple(rows), {}, self.notes)

    def _put(self, points: Sequence[Perturbation]) -> None:
        """Puts points into the slots from 1 on."""
        self._check_usable()
        self._check_idle()
        self._slots = list(points)
        self.call("lozo_points", self._step, self._slots)

    def _check_idle(self) -> None:
        if self.llm.llm_engine.has_unfinished_requests():
            raise EngineError(
                "requests of this engine are not finished, and would change their weights half-way: finish them first"
            )

    def _refresh_groups(self, step: Any = None) -> None:
        pass  # nothing moves


def _numbers(value: Any) -> list[float] | None:
    """A setting of an update as plain numbers, one for all parameters or one for each."""
    return None if value is None else torch.as_tensor(value, dtype=torch.float64, device="cpu").flatten().tolist()
