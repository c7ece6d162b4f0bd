"""What is minimised, and how it is scored: a classification head, the label words of a causal model, or language modelling."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .data import Example
from .tasks import Task

IGNORED = -100

Encoded = dict[str, list[int]]
"""One example as the model takes it; ``labels`` holds one class or one target per token."""

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over a batch, so that batches of unequal size add up.

    Attributes:
        loss: 0-dim.
        count: examples, or target tokens in language modelling; a tensor where only the device knows it.
        correct: right answers, 0-dim; None where there are none.
    """

    loss: Tensor
    count: int | Tensor
    correct: Tensor | None = None


class Objective(abc.ABC):
    """Turns examples into batches and batches into losses.

    Args:
        tokenizer: of the model.
        task: what the examples are of.
        max_length: tokens per example at most.
    """

    name: str
    unit: str
    """What the loss is a mean over."""

    def __init__(self, tokenizer: Any, task: Task, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.task = task
        self.max_length = max_length

    @abc.abstractmethod
    def encode(self, example: Example) -> Encoded | None:
        """One example as token ids and labels; None if nothing of it can be predicted."""

    @abc.abstractmethod
    def totals(self, model: torch.nn.Module, batch: Batch) -> Totals:
        """Loss and right answers of a batch, by one forward pass."""

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded]:
        """All examples.

        Raises:
            InputError: none of them can be predicted.
        """
        encoded = [e for e in map(self.encode, examples) if e is not None]
        if not encoded:
            raise InputError(f"none of the {len(examples)} examples has two tokens or more")
        return encoded

    def collate(self, encoded: Sequence[Encoded], device: torch.device) -> Batch:
        """A batch, padded on the right to its longest example."""
        fill = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORED}
        batch = {}
        for key in encoded[0]:
            longest = max(len(e[key]) for e in encoded)
            rows = [e[key] + [fill.get(key, 0)] * (longest - len(e[key])) for e in encoded]
            batch[key] = torch.tensor(rows).to(device, non_blocking=True)
        return batch

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        totals = self.totals(model, batch)
        return totals.loss / totals.count


class ClassificationObjective(Objective):
    """Cross-entropy of a classification head."""

    name = "classification"
    unit = "example"

    def encode(self, example: Example) -> Encoded | None:
        """The text, or the pair of texts, and the class."""
        inputs = self.tokenizer(*example.texts, truncation=True, max_length=self.max_length)
        return {**inputs, "labels": [_label(example)]}

    def totals(self, model: torch.nn.Module, batch: Batch) -> Totals:
        """See the base class."""
        labels = batch["labels"][:, 0]
        return _classified(model(**_inputs(batch)).logits, labels)


class PromptObjective(Objective):
    """Cross-entropy between the label words as the next token after the task's prompt (MeZO's classification on causal models).

    A label word of several tokens is stood for by its first.

    Raises:
        InputError: the task has no prompt, or two of its label words begin with the same token.
    """

    name = "prompt"
    unit = "example"

    def __init__(self, tokenizer: Any, task: Task, max_length: int) -> None:
        super().__init__(tokenizer, task, max_length)
        if not task.prompt:
            raise InputError(f"--objective prompt: the task {task.name} has no prompt; use classification or lm")
        self._words = torch.tensor([self._first_token(word) for word in task.words])
        if len(set(self._words.tolist())) < len(task.words):
            raise InputError(
                f"--objective prompt: two label words of {task.name} ({', '.join(map(repr, task.words))}) begin with the "
                "same token in this tokenizer; use --objective classification"
            )

    def encode(self, example: Example) -> Encoded | None:
        """The prompt, shortened in front if it is too long, and the class."""
        ids = self.tokenizer(self.task.prompt.format(*example.texts))["input_ids"]
        if len(ids) > self.max_length:
            start = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            ids = start + ids[len(ids) - self.max_length + len(start) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [_label(example)]}

    def totals(self, model: torch.nn.Module, batch: Batch) -> Totals:
        """See the base class."""
        last = batch["attention_mask"].sum(1) - 1
        logits = model(**_inputs(batch)).logits
        answers = logits[torch.arange(len(last), device=last.device), last][:, self._words.to(logits.device)]
        return _classified(answers, batch["labels"][:, 0])

    def _first_token(self, word: str) -> int:
        # In context, because some tokenizers treat the start of a text in their own way.
        context = self.task.prompt.format(*("x" for _ in self.task.fields))
        before, after = (self.tokenizer(text)["input_ids"] for text in (context, context + word))
        return next(b for a, b in zip([*before, None], after, strict=False) if a != b)


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

    def totals(self, model: torch.nn.Module, batch: Batch) -> Totals:
        """See the base class."""
        logits = model(**_inputs(batch)).logits
        labels = batch["labels"]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return Totals(loss, (labels != IGNORED).sum())


OBJECTIVES: dict[str, type[Objective]] = {o.name: o for o in (ClassificationObjective, PromptObjective, LanguageModelObjective)}


def choose_objective(name: str, task: Task, causal: bool) -> str:
    """The name of the objective for "auto": as the papers do it, label words on causal models and a head on others."""
    if name != "auto":
        if name != "lm" and task.kind != "classification":
            raise InputError(f"--objective {name} needs a task with classes, and {task.name} has none")
        return name
    if task.kind == "causal_lm":
        return LanguageModelObjective.name
    return PromptObjective.name if causal and task.prompt else ClassificationObjective.name


def _inputs(batch: Batch) -> Batch:
    return {k: v for k, v in batch.items() if k != "labels"}


def _label(example: Example) -> int:
    assert example.label is not None
    return example.label


def _classified(logits: Tensor, labels: Tensor) -> Totals:
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return Totals(loss, len(labels), (logits.argmax(-1) == labels).sum())
