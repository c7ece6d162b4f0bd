"""A classification head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.examples import Example
from .base import Batch, ClassObjective, Encoded, inputs, label_of


class ClassificationObjective(ClassObjective):
    """Cross-entropy of a classification head."""

    name = "classification"

    def encode(self, example: Example) -> Encoded | None:
        """The text, or the pair of texts, and the class. Of three texts or more, the later ones are one."""
        first, *rest = example.texts
        pair = [" ".join(rest)] if rest else []
        encoded = self.tokenizer(first, *pair, truncation=True, max_length=self.max_length)
        return {**encoded, "labels": [label_of(example)]}

    def scores(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """The head's logits."""
        logits: Tensor = model(**inputs(batch)).logits
        return logits
