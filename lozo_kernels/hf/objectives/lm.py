"""Language modelling."""

from __future__ import annotations

import torch

from ..data.examples import Example
from .base import IGNORED, Batch, Encoded, Losses, Objective, inputs, token_losses


class LanguageModelObjective(Objective):
    """Cross-entropy of each next token of the texts."""

    name = "lm"
    unit = "token"

    def encode(self, example: Example) -> Encoded | None:
        """The texts of the example, one after the other, each token the label of the position before it."""
        ids = self.tokenizer(" ".join(example.texts), truncation=True, max_length=self.max_length)["input_ids"]
        if len(ids) < 2:
            return None
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [*ids[1:], IGNORED]}

    def losses(self, model: torch.nn.Module, batch: Batch) -> Losses:
        return Losses(*token_losses(model(**inputs(batch)).logits, batch["labels"]))
