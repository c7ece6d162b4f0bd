"""The cases of ``bench.passes``: the Llama of ``bench.learning``, a prompted classification, and an encoder with a head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bench.learning import Llama, MiniLM, Row, Top
from lozo_kernels.hf.data.examples import Example
from lozo_kernels.hf.demo import MODEL, language
from lozo_kernels.hf.loop.scoring import evaluate
from lozo_kernels.hf.objectives import PromptObjective
from lozo_kernels.hf.tasks import TASKS

CPU = torch.device("cpu")


class Demo:
    """The embedded model on the prompted task that it does not know; all weights are trained."""

    name, batch = "embedded model on go-again", 16

    def __init__(self) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        self._objective = PromptObjective(transformers.AutoTokenizer.from_pretrained(MODEL), TASKS[language.TASK_NAME], 64)
        encode = self._objective.encode
        parts = ([encode(Example((text,), label)) for text, label in rows] for rows in language.reviews(0, 1000, 500))
        self._train, self._dev = parts
        self.examples = {"train": len(self._train), "dev": len(self._dev)}

    def model(self) -> nn.Module:
        return copy.deepcopy(self._model)

    def losses(self, model: nn.Module, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss of each example, and 1."""
        each = self._objective.losses(model, self._objective.collate([self._train[i] for i in index], CPU))
        return each.sums, each.counts

    def score(self, model: nn.Module) -> Row:
        found = evaluate(model, self._objective, self._dev, 0, 100, CPU)
        return {"loss": found.loss, "accuracy": 100 * (found.accuracy or 0.0)}


class Layer(Top):
    """As :class:`Top`, with a whole layer of the encoder."""

    def outputs(self, hidden: Tensor, mask: Tensor) -> Tensor:
        far = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(mask == 0, torch.finfo(hidden.dtype).min)
        return self.last(hidden, far[:, None, None, :])


class MiniLMLayer(MiniLM):
    """As :class:`MiniLM`; the last layer and the classifier are trained, 1.8M parameters."""

    top = Layer
    name, batch = "MiniLM on SST-2: last layer and classifier", 16

    def last_of(self, encoder: Any) -> nn.Module:
        return encoder.encoder.layer[-1]


CASES: dict[str, type[Llama] | type[Demo] | type[MiniLMLayer]] = {"llama": Llama, "demo": Demo, "minilm": MiniLMLayer}
