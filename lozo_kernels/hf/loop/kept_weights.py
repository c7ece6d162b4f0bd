"""Which weights a run ends with: those of its last step, or of its best evaluation, kept in a file until then."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import require
from .processes import counted
from .records import EvalRecord

FILE = "best.safetensors"


class Last:
    """Keeps nothing: the weights of the last step are the run's."""

    step: int | None = None

    def offer(self, evaluation: EvalRecord) -> None:
        """Notes the step."""
        self.step = evaluation.step

    def load(self) -> None:
        """The model has them."""

    def discard(self) -> None:
        """There is no file."""


class Best:
    """Keeps the weights of the lowest dev loss, as the papers' code does (``load_best_model_at_end``).

    Args:
        model: what is trained. Looking at its ``state_dict()`` makes a probe merge what it learned.
        folder: of the run.
        earlier: evaluations that a run that goes on has behind it; the file of the best of them is there.
    """

    def __init__(self, model: torch.nn.Module, folder: Path, earlier: Sequence[EvalRecord]) -> None:
        self._model, self._path = model, folder / FILE
        trained = [e for e in earlier if e.step > 0]
        best = min(trained, key=lambda e: e.loss) if trained else None
        self._lowest = float("inf") if best is None else best.loss
        self.step: int | None = None if best is None else best.step

    def offer(self, evaluation: EvalRecord) -> None:
        """Keeps the weights as they are now if no evaluation was better. Every process calls this; the first one writes."""
        if not evaluation.loss < self._lowest:
            return
        self._lowest, self.step = evaluation.loss, evaluation.step
        state = self._model.state_dict()
        if counted()[0] > 0:
            return
        unfinished = self._path.with_suffix(".unfinished")
        tensors = {name: p.detach().cpu().clone().contiguous() for name, p in state.items()}
        require("safetensors.torch").save_file(tensors, str(unfinished))
        os.replace(unfinished, self._path)

    def load(self) -> None:
        """Puts the kept weights into the model."""
        if self._path.exists() and counted()[0] == 0:
            self._model.load_state_dict(require("safetensors.torch").load_file(str(self._path)))

    def discard(self) -> None:
        """Removes the file, once the model is saved."""
        self._path.unlink(missing_ok=True)
