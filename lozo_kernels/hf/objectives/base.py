"""What every objective is: examples to batches, batches to losses."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ..data.examples import Example
from ..tasks import Task

IGNORED = -100

Encoded = dict[str, Any]
"""One example as the model takes it: lists of numbers by name; ``labels`` holds one class or one target per token."""

Batch = dict[str, Tensor]

TARGETS = frozenset({"labels", "position", "row", "target", "slot", "right", "answer"})
"""What a batch holds beside the model's inputs."""


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over a batch, so that batches of unequal size add up.

    Attributes:
        loss: 0-dim.
        count: what the loss is a sum over: examples, or target tokens; 0-dim.
        correct: right answers, 0-dim; None where there are none.
        examples: how many answers ``correct`` counts.
    """

    loss: Tensor
    count: Tensor
    correct: Tensor | None
    examples: int


@dataclasses.dataclass(frozen=True)
class Losses:
    """What a forward pass says of each example of a batch; all are (examples,).

    Attributes:
        sums: losses.
        counts: what each loss is a sum over: 1, or target tokens.
        correct: whether the answer is right; None where there are no answers.
    """

    sums: Tensor
    counts: Tensor
    correct: Tensor | None = None


class Objective(abc.ABC):
    """Turns examples into batches and batches into losses.

    Args:
        tokenizer: the tokenizer of the model.
        task: the task of the examples.
        max_length: tokens per example at most.
        demonstrations: solved examples to put before each one, where there is room (in-context learning); the objectives
            of causal models take them.

    Raises:
        InputError: task, tokenizer and objective do not go together.
    """

    name: str
    unit: str
    """What the loss is a mean over: "example" or "token"."""
    auto_model = "AutoModelForCausalLM"
    """The class of transformers that loads a model for it."""
    pipeline = "text-generation"
    """What the Hub calls models for it."""
    fresh_head = False
    """Whether a model without a head for the task gets one with random weights."""

    def __init__(self, tokenizer: Any, task: Task, max_length: int, demonstrations: Sequence[Example] = ()) -> None:
        self.tokenizer = tokenizer
        self.task = task
        self.max_length = max_length
        self.demonstrations = tuple(demonstrations)

    @abc.abstractmethod
    def encode(self, example: Example) -> Encoded | None:
        """One example as token ids and labels; None if nothing of it can be predicted."""

    def encode_for_evaluation(self, example: Example) -> Encoded | None:
        """An example as :meth:`encode` makes it, with what is needed to tell right answers from wrong ones."""
        return self.encode(example)

    @abc.abstractmethod
    def losses(self, model: torch.nn.Module, batch: Batch) -> Losses:
        """Loss and right answers of each example of a batch, by one forward pass."""

    def totals(self, model: torch.nn.Module, batch: Batch) -> Totals:
        """Loss and right answers of a batch, by one forward pass."""
        each = self.losses(model, batch)
        correct = None if each.correct is None else each.correct.sum()
        return Totals(each.sums.sum(), each.counts.sum(), correct, len(each.sums))

    def encode_all(self, examples: Sequence[Example], *, evaluation: bool = False) -> list[Encoded]:
        """All examples, for training or for evaluation.

        Raises:
            InputError: none of them can be predicted.
        """
        encode = self.encode_for_evaluation if evaluation else self.encode
        encoded = [e for e in map(encode, examples) if e is not None]
        if not encoded:
            raise InputError(f"none of the {len(examples)} examples has two tokens or more")
        return encoded

    def collate(self, encoded: Sequence[Encoded], device: torch.device) -> Batch:
        """A batch, padded on the right to its longest example."""
        fills = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORED}
        return {name: pad([e[name] for e in encoded], fills.get(name, 0)).to(device, non_blocking=True) for name in encoded[0]}

    def batches(self, encoded: Sequence[Encoded], rows: int) -> Iterator[Sequence[Encoded]]:
        """The examples in order, in batches of so many rows of the model's input at most (of one example at least)."""
        batch: list[Encoded] = []
        for e in encoded:
            if batch and sum(map(self.rows, batch)) + self.rows(e) > rows:
                yield batch
                batch = []
            batch.append(e)
        if batch:
            yield batch

    def rows(self, encoded: Encoded) -> int:
        """Rows of the model's input that an example takes: one for each of its options, where it has some."""
        return len(encoded.get("options", (None,)))

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        totals = self.totals(model, batch)
        return totals.loss / totals.count


class ClassObjective(Objective):
    """An objective whose model gives a score to each class of the task: cross-entropy of the scores."""

    unit = "example"

    @abc.abstractmethod
    def scores(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """(examples, classes), from one forward pass."""

    def losses(self, model: torch.nn.Module, batch: Batch) -> Losses:
        scores, labels = self.scores(model, batch).float(), batch["labels"][:, 0]
        return Losses(F.cross_entropy(scores, labels, reduction="none"), torch.ones_like(labels), scores.argmax(-1) == labels)


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token that has a label: the sums of each example, and of how many tokens they are, (examples,) each."""
    each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return each.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


def inputs(batch: Batch) -> Batch:
    """The part of a batch that the model takes."""
    return {k: v for k, v in batch.items() if k not in TARGETS}


def pad(rows: Sequence[list[int]], fill: int) -> Tensor:
    """(rows, longest) from lists of unequal length."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.int64, device="cpu")


def right_options(example: Example) -> tuple[int, ...]:
    """Which of the continuations of its prompt are right; the first of them is trained."""
    return example.right or ((0,) if example.answers else (label_of(example),))


def label_of(example: Example) -> int:
    """The class of a labelled example."""
    assert example.label is not None
    return example.label
