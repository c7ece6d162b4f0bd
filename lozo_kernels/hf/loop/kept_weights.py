"""Which weights a run ends with: those of its last step, or of its best evaluation, kept in a file until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...errors import require
from ...model.files import replacing
from .folder import BEST
from .processes import is_first
from .records import EvalRecord


class KeptWeights:
    """Keeps the weights of the lowest dev loss, as the papers' code does (``load_best_model_at_end``), or those of the last step.

    Args:
        model: what is trained. Looking at its ``state_dict()`` makes a probe merge what it learned.
        folder: the folder of the run.
        best: keep the best; otherwise nothing is written, and the model ends as its last step leaves it.
        earlier: evaluations that a run that goes on has behind it, see :meth:`complete`.

    Attributes:
        note: what the user should know of the weights that the run ended with; None if they are those that were asked for.
    """

    def __init__(self, model: torch.nn.Module, folder: Path, *, best: bool, earlier: Sequence[EvalRecord] = ()) -> None:
        self._model, self._path, self._best = model, folder / BEST, best
        # Of a model with adapters only these: the rest stays, and quantised weights are no plain tensors.
        self._adapted = hasattr(model, "peft_config")
        self._trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self._lowest = float("inf")
        self._step: int | None = None
        self.note: str | None = None
        for evaluation in earlier:
            self._improves(evaluation)

    def offer(self, evaluation: EvalRecord) -> None:
        """Keeps the weights as they are now if no evaluation was better. Every process calls this; the first one writes."""
        if self._best and self._improves(evaluation):
            self._save(self._model, evaluation.step)

    def complete(self, weights_after: Callable[[int], torch.nn.Module]) -> None:
        """Makes the file again where a run that goes on lacks it, as a finished one does, or has that of another step.

        Args:
            weights_after: gives a model as it was after so many steps.
        """
        if self._best and self._step is not None and is_first() and not self._is_of(self._step):
            self._save(weights_after(self._step), self._step)

    def load(self, steps_done: int) -> int:
        """Puts the kept weights into the model of the first process, which saves it.

        Returns:
            Steps after which the model had the weights that it has now: ``steps_done`` where none are kept.
        """
        if not self._best:
            return steps_done
        if self._step is None:
            self.note = "no dev loss was a finite number, so that none was the best: the weights are those of the last step"
            return steps_done
        if is_first() and not self._is_of(self._step):
            self.note = f"{self._path} was removed: the weights are those of the last step, not of step {self._step}, the best"
            return steps_done
        if is_first():
            self._model.load_state_dict(require("safetensors.torch").load_file(str(self._path)), strict=not self._adapted)
        return self._step

    def discard(self) -> None:
        """Removes the file, once the model is saved and the run is over."""
        self._path.unlink(missing_ok=True)

    def _improves(self, evaluation: EvalRecord) -> bool:
        """Takes note of an evaluation; whether none before had a lower loss. NaN is no loss, and step 0 no training."""
        if evaluation.step == 0 or not evaluation.loss < self._lowest:
            return False
        self._lowest, self._step = evaluation.loss, evaluation.step
        return True

    def _is_of(self, step: int) -> bool:
        """Whether the file has the weights after so many steps."""
        if not self._path.exists():
            return False
        with require("safetensors").safe_open(str(self._path), framework="pt") as file:
            return (file.metadata() or {}).get("step") == str(step)

    def _save(self, model: torch.nn.Module, step: int) -> None:
        state = model.state_dict()
        if is_first():
            trained = {name: p for name, p in state.items() if not self._adapted or name in self._trained}
            tensors = {name: p.detach().cpu().clone().contiguous() for name, p in trained.items()}
            with replacing(self._path) as part:
                require("safetensors.torch").save_file(tensors, str(part), metadata={"step": str(step)})
