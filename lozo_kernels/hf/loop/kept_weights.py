"""Which weights a run ends with: those of its last step, or of its best evaluation, kept in a file until then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import require
from ...model.files import replacing
from .processes import is_first
from .records import EvalRecord


class KeptWeights:
    """Keeps the weights of the lowest dev loss, as the papers' code does (``load_best_model_at_end``), or those of the last step.

    Args:
        model: what is trained. Looking at its ``state_dict()`` makes a probe merge what it learned.
        folder: the folder of the run.
        best: keep the best; otherwise nothing is written, and the model ends as its last step leaves it.
        earlier: evaluations that a run that goes on has behind it; the file of the best of them is there.

    Attributes:
        step: steps after which the model had these weights; None before the first evaluation.
    """

    def __init__(self, model: torch.nn.Module, folder: Path, *, best: bool, earlier: Sequence[EvalRecord] = ()) -> None:
        self._model, self._path, self._best = model, folder / "best.safetensors", best
        trained = [e for e in earlier if e.step > 0] if best else []
        lowest = min(trained, key=lambda e: e.loss, default=None)
        self._lowest = float("inf") if lowest is None else lowest.loss
        self.step: int | None = None if lowest is None else lowest.step

    def offer(self, evaluation: EvalRecord) -> None:
        """Keeps the weights as they are now if no evaluation was better. Every process calls this; the first one writes."""
        if not self._best:
            self.step = evaluation.step
        elif evaluation.loss < self._lowest:
            self._lowest, self.step = evaluation.loss, evaluation.step
            state = self._model.state_dict()
            if is_first():
                tensors = {name: p.detach().cpu().clone().contiguous() for name, p in state.items()}
                with replacing(self._path) as part:
                    require("safetensors.torch").save_file(tensors, str(part))

    def load(self) -> None:
        """Puts the kept weights into the model of the first process, which saves it."""
        if self._best and self._path.exists() and is_first():
            self._model.load_state_dict(require("safetensors.torch").load_file(str(self._path)))

    def discard(self) -> None:
        """Removes the file, once the model is saved."""
        self._path.unlink(missing_ok=True)
