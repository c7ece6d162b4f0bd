"""LOZO on a model that an engine serves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import EngineError
from ..journal import Journal
from ..kernels.checks import as_integer
from ..model.config import check_names
from ..model.report import Report
from ..optim import methods
from ..optim.measuring import has_parts
from ..optim.parallel import Parallel
from . import export
from .handle import EngineHandle
from .objectives import Objective

_KEYWORDS = ("weight_decay", "max_nonfinite", "normalise")


class LOZO(methods.LOZO):
    """LOZO (with ``momentum`` LOZO-M) on a vLLM engine, whose weights are only read.

    All points of a step are requests of the same batches. What is learned is in factors beside the weights: every request of the
    engine sees it at once. The steps are those of ``lozo_kernels.LOZO(model, placement="probe")`` on the Hugging Face model.

    Args:
        llm: a ``vllm.LLM`` built with :func:`~lozo_kernels.vllm.engine_options`, which has rank, interval and seed.
        lr, eps, momentum, weight_decay, directions, two_sided, normalise, max_nonfinite, parallel: as for
            :class:`lozo_kernels.LOZO`. With ``parallel`` each process has an engine of its own.
        journal: a file that the run is recorded in (:mod:`lozo_kernels.journal`), from which it can be resumed, replayed and saved.
        resume: go on with the run of a journal that is there; without one, begin it.
        max_windows: with a journal, :meth:`reload` when so many windows have factors beside the weights, which cost ``rank`` more
            columns each.

    Raises:
        EngineError: the engine was not built for this, or something in it cannot be trained.
    """

    def __init__(
        self,
        llm: Any,
        *,
        lr: float | Tensor | str = 1e-6,
        eps: float = 1e-3,
        momentum: float = 0.0,
        directions: int = 1,
        two_sided: bool = True,
        parallel: Parallel | str | None = None,
        journal: str | os.PathLike[str] | None = None,
        resume: bool = False,
        max_windows: int = 32,
        **options: Any,
    ) -> None:
        check_names("lozo_kernels.vllm.LOZO", options, _KEYWORDS)
        self._max_windows = as_integer("max_windows", max_windows, 1)
        if resume and journal is None:
            raise TypeError("resume=True goes on with a journal: give its file")
        handle = EngineHandle(llm, momentum=momentum > 0)
        super().__init__(
            handle, lr=lr, eps=eps, momentum=momentum, directions=directions, two_sided=two_sided, parallel=parallel,
            common_random_numbers=False, **options,
        )  # fmt: skip
        self._recorded: Journal | None = None
        if journal is not None:
            with handle.checkpoint_lent(export.checkpoint_weights(handle)):
                if resume and Path(journal).exists():
                    Journal.resume(journal, self)
                else:
                    Journal.create(journal, self)
            self._recorded = self.journal  # type: ignore[assignment]

    @property
    def handle(self) -> EngineHandle:
        """The handle of the engine."""
        return self.stepper.handle  # type: ignore[return-value]

    def report(self) -> Report:
        """Returns where each parameter of the Hugging Face model is reached, or why it is not."""
        return self.handle.report()

    def step(self, closure: Any = None, inputs: Any = None) -> Tensor:  # type: ignore[override]
        """Takes a step on an objective, :func:`~lozo_kernels.vllm.nll` or :func:`~lozo_kernels.vllm.rewards`.

        Returns:
            The loss, 0-dim fp64: the mean over both sides, or that at rest if the step is one-sided.
        """
        measuring = self.measures_next
        self._expect(closure, inputs, measuring=measuring)
        parts = closure.halves() if measuring and not has_parts(self.stepper.parallel) else [closure]
        bound = [_Bound(self.handle, part) for part in parts]
        loss = super().step(bound if len(bound) > 1 else bound[0])
        if self.handle.windows >= self._max_windows and self._recorded is not None:
            self.reload()
        return loss

    def estimate(self, closure: Any, inputs: Any = None) -> tuple[Tensor, Tensor]:
        """Evaluates an objective at the points of the next step without taking it; returns as :meth:`Stepper.estimate` does."""
        self._expect(closure, inputs, measuring=False)
        bound: Any = _Bound(self.handle, closure)
        return super().estimate(bound)

    def _expect(self, objective: Objective, inputs: Any, *, measuring: bool) -> None:
        """Says which points the next step evaluates, and checks the places before the first."""
        if not isinstance(objective, Objective) or inputs is not None:
            raise TypeError("step() of an engine takes an objective: nll(texts) or rewards(prompts, params, score)")
        stepper = self.stepper
        points = [p for p in stepper.points_of(measuring=measuring) if stepper.is_mine(p[0])]
        if measuring or not self.two_sided:
            points.append((0, 0.0))
        self.handle.expect(self.steps_done, points)
        if not self.handle.prepared:
            self.handle.check(objective)

    def state_dict(self) -> dict[str, Any]:
        raise EngineError("the state of a run in an engine is its journal: give journal=, and resume=True to go on")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: ARG002
        raise EngineError("a run in an engine goes on from its journal: give journal= and resume=True")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tuned model, as :meth:`weights` returns it, with configuration and tokenizer."""
        export.save(self.handle, self._journal_file(), Path(folder))

    def export_lora(self, folder: str | os.PathLike[str]) -> None:
        """Writes what was learned as an adapter of PEFT, whose rank grows with every window.

        Raises:
            EngineError: it has no place for a vector, or for weight decay.
        """
        export.export_lora(self.handle, Path(folder))

    def reload(self) -> None:
        """Lets the engine load the tuned weights, as a window of a probe ends by a merge: they are rounded into its dtype.

        It needs the journal, and disk and host memory for the weights.
        """
        self._journal_file()  # before anything is recorded
        if self.handle.on_merge is not None:
            self.handle.on_merge()
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            self.handle.reload(Path(folder))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, weight) of the tuned Hugging Face model: the journal, replayed on the checkpoint."""
        model = export.tuned_model(self.handle, self._journal_file())
        yield from ((name, p.detach()) for name, p in model.named_parameters())

    def remove(self) -> None:
        """Gives the engine back as it was before it was trained, and closes the journal."""
        if self._recorded is not None:
            self._recorded.close()
        self.handle.restore()

    def _journal_file(self) -> Path:
        if self._recorded is None:
            raise EngineError("the tuned weights follow from the journal of the run: give journal= to LOZO")
        return self._recorded.path


class _Bound:
    """An objective as a closure of the stepper: its loss at the point where the handle is."""

    def __init__(self, handle: EngineHandle, objective: Objective) -> None:
        self._handle, self._objective = handle, objective

    def __call__(self) -> tuple[float, int]:
        return self._handle.loss_at(self._objective)  # type: ignore[no-any-return]
