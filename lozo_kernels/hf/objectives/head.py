"""Classification heads, over texts and over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.examples import Example
from .base import Batch, ClassObjective, Encoded, inputs, label_of


class ClassificationObjective(ClassObjective):
    """Cross-entropy of a classification head."""

    name = "classification"
    auto_model, pipeline = "AutoModelForSequenceClassification", "text-classification"
    fresh_head = True

    def encode(self, example: Example) -> Encoded | None:
        """The text, or the pair of texts, and the class. Of three texts or more, the later ones are one."""
        first, *rest = example.texts
        pair = [" ".join(rest)] if rest else []
        encoded = self.tokenizer(first, *pair, truncation=True, max_length=self.max_length)
        return {**encoded, "labels": [label_of(example)]}

    def scores(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(**inputs(batch)).logits
        return logits


class ImageObjective(ClassObjective):
    """Cross-entropy of a classification head over images, which are read when a batch needs them.

    ``tokenizer`` is an :class:`lozo_kernels.hf.models.image_reader.ImageReader`.
    """

    name = "image"
    auto_model, pipeline = "AutoModelForImageClassification", "image-classification"
    fresh_head = True

    def encode(self, example: Example) -> Encoded | None:
        return {"image": example, "labels": [label_of(example)]}

    def collate(self, encoded: Sequence[Encoded], device: torch.device) -> Batch:
        """Pixels as the model takes them, (examples, channels, height, width), and classes (examples, 1)."""
        pixels = self.tokenizer([e["image"].read() for e in encoded])
        labels = torch.tensor([e["labels"] for e in encoded], dtype=torch.int64, device="cpu")
        return {"pixel_values": pixels.to(device, non_blocking=True), "labels": labels.to(device, non_blocking=True)}

    def scores(self, model: Any, batch: Batch) -> Tensor:
        logits: Tensor = model(pixel_values=batch["pixel_values"].to(model.dtype)).logits
        return logits
