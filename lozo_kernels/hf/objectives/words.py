"""Label words: the next token of a causal model, or the blank of a masked one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..data.examples import Example
from ..tasks import Task
from ..tasks.prompts import render
from .base import Batch, ClassObjective, Encoded, inputs, label_of
from .prompted import PromptedObjective, check_room


class PromptObjective(PromptedObjective, ClassObjective):
    """Cross-entropy between the label words as the next token after the task's prompt (MeZO's classification on causal models).

    A label word of several tokens is stood for by its first. For words of one token this is also MeZO's cross-entropy of the
    log-probabilities of the words, whose common normaliser falls out.

    Raises:
        InputError: the task has no prompt, or two of its label words begin with the same token.
    """

    name = "prompt"

    def __init__(self, tokenizer: Any, task: Task, max_length: int, demonstrations: Sequence[Example] = ()) -> None:
        if not task.prompt:
            raise InputError(f"--objective prompt: the task {task.name} has no prompt; use classification or lm")
        super().__init__(tokenizer, task, max_length, demonstrations)
        self._words = _distinct([self._first_token(word) for word in task.words], self.name, task, task.words, "choice")

    def encode(self, example: Example) -> Encoded | None:
        """The prompt, shortened in front if it is too long, and the class."""
        ids, _ = self.place(self.prompt(example))
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [label_of(example)]}

    def scores(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Logits of the label words after the last token."""
        return _word_logits(model, batch, batch["attention_mask"].sum(1) - 1, self._words)

    def _first_token(self, word: str) -> int:
        # In context, because some tokenizers treat the start of a text in their own way.
        context = render(self.task.prompt, ["x"] * len(self.task.fields))
        before, after = (self._ids(text) for text in (context, context + word))
        return next(b for a, b in zip([*before, None], after, strict=False) if a != b)


class MaskedPromptObjective(ClassObjective):
    """Cross-entropy between the label words at the blank of the task's masked prompt (LM-BFF; the RoBERTa runs of MeZO and LOZO).

    A label word is read as in the middle of a sentence, after a space. Texts that are too long lose their ends, the longest first;
    the prompt itself stays whole.

    Raises:
        InputError: the task has no such prompt, the tokenizer no mask token, two label words begin with the same token, or the
            prompt leaves no room.
    """

    name = "masked"
    auto_model, pipeline = "AutoModelForMaskedLM", "fill-mask"

    def __init__(self, tokenizer: Any, task: Task, max_length: int, demonstrations: Sequence[Example] = ()) -> None:
        if not task.masked:
            raise InputError(f"--objective masked: the task {task.name} has no prompt for masked models; use classification")
        if tokenizer.mask_token_id is None:
            raise InputError("--objective masked: the tokenizer of this model has no mask token; use prompt or classification")
        if demonstrations:
            raise InputError("demonstrations go with causal models, not with masked ones")
        super().__init__(tokenizer, task, max_length)
        words = [tokenizer(" " + word, add_special_tokens=False)["input_ids"][0] for word in task.masked_words]
        self._words = _distinct(words, self.name, task, task.masked_words, "classification")
        check_room(f"masked prompt of the task {task.name}", len(self._whole([""] * len(task.fields))["input_ids"]), max_length)

    def encode(self, example: Example) -> Encoded | None:
        """The prompt with its blank, where it is, and the class."""
        texts = [text.replace(self.tokenizer.mask_token, "") for text in example.texts]
        encoded = self._whole(texts)
        while (excess := len(encoded["input_ids"]) - self.max_length) > 0:
            # A token has a character at least, so this never cuts more than is needed.
            longest = max(range(len(texts)), key=lambda i: len(texts[i]))
            texts[longest] = texts[longest][: -max(1, excess)]
            encoded = self._whole(texts)
        position = encoded["input_ids"].index(self.tokenizer.mask_token_id)
        return {**encoded, "position": [position], "labels": [label_of(example)]}

    def scores(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Logits of the label words at the blank."""
        return _word_logits(model, batch, batch["position"][:, 0], self._words)

    def _whole(self, texts: Sequence[str]) -> Encoded:
        return dict(self.tokenizer(render(self.task.masked, texts, mask=self.tokenizer.mask_token)))


def _word_logits(model: torch.nn.Module, batch: Batch, positions: Tensor, words: Tensor) -> Tensor:
    """(examples, words): the logits of some tokens at one position of each example."""
    logits: Tensor = model(**inputs(batch)).logits
    return logits[torch.arange(len(logits), device=logits.device, dtype=torch.int64), positions][:, words.to(logits.device)]


def _distinct(tokens: list[int], objective: str, task: Task, words: Sequence[str], instead: str) -> Tensor:
    if len(set(tokens)) < len(words):
        raise InputError(
            f"--objective {objective}: two label words of {task.name} ({', '.join(map(repr, words))}) begin with the "
            f"same token in this tokenizer; use --objective {instead}"
        )
    return torch.tensor(tokens, dtype=torch.int64, device="cpu")
