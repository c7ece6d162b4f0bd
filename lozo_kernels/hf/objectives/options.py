"""Continuations of a prompt, token by token: options that are compared, and answers that are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ..data.examples import Example
from ..tasks import Task
from .base import Batch, Encoded, Losses, inputs, pad, right_options
from .prompted import PromptedObjective


class OptionsObjective(PromptedObjective):
    """An objective that looks at the log-probability of each token of a continuation of the prompt.

    An example is encoded as one row for each of its continuations. A batch holds their rows one after the other, and

    - ``row``, ``position``, ``target``: (tokens,), where each token of a continuation is predicted and which one it is;
    - ``slot``: (examples, most options), the rows of each example, -1 where it has fewer options;
    - ``right``: (examples, most options), 1 where the option is right;
    - ``answer``: (rows,), 1 for the rows that are taught: the first right option of each example.
    """

    def __init__(self, tokenizer: Any, task: Task, max_length: int, demonstrations: Sequence[Example] = ()) -> None:
        if task.kind == "causal_lm":
            raise InputError(f"--objective {self.name}: the task {task.name} has no answers; use lm")
        if not (task.words or task.unpack):
            raise InputError(f"--objective {self.name}: the task {task.name} has no label words; use classification or lm")
        super().__init__(tokenizer, task, max_length, demonstrations)

    def encode_for_evaluation(self, example: Example) -> Encoded | None:
        return self._encoded(self.prompt(example), self.continuations(example), right_options(example))

    def collate(self, encoded: Sequence[Encoded], device: torch.device) -> Batch:
        options = [option for e in encoded for option in e["options"]]
        lengths = [len(option["input_ids"]) for option in options]
        where = [
            (row, length - count + i - 1, option["input_ids"][length - count + i])
            for row, (option, length) in enumerate(zip(options, lengths, strict=True))
            for count in option["count"]
            for i in range(count)
        ]
        firsts = [sum(len(e["options"]) for e in encoded[:i]) for i in range(len(encoded))]
        taught = {first + e["right"].index(1) for first, e in zip(firsts, encoded, strict=True)}
        row, position, target = torch.tensor(where, dtype=torch.int64, device="cpu").unbind(1)
        batch = {
            "input_ids": pad([option["input_ids"] for option in options], self.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * length for length in lengths], 0),
            "row": row,
            "position": position,
            "target": target,
            "slot": pad([[first + i for i in range(len(e["options"]))] for first, e in zip(firsts, encoded, strict=True)], -1),
            "right": pad([e["right"] for e in encoded], 0),
            "answer": torch.tensor([int(i in taught) for i in range(len(options))], dtype=torch.int64, device="cpu"),
        }
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    def token_log_probabilities(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """(tokens,), from one forward pass."""
        logits = model(**inputs(batch)).logits[batch["row"], batch["position"]].float()
        return -F.cross_entropy(logits, batch["target"], reduction="none")

    def mean_log_probabilities(self, tokens: Tensor, batch: Batch) -> Tensor:
        """(examples, most options): the mean over the tokens of each option, as MeZO scores them; -inf where there is none."""
        sums = tokens.new_zeros(len(batch["input_ids"])).index_add(0, batch["row"], tokens)
        counts = torch.zeros_like(sums).index_add(0, batch["row"], torch.ones_like(tokens))
        return (sums / counts)[batch["slot"].clamp(min=0)].masked_fill(batch["slot"] < 0, float("-inf"))

    def scores(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """(examples, most options): what the options are compared by."""
        return self.mean_log_probabilities(self.token_log_probabilities(model, batch), batch)

    def _encoded(self, prompt: str, continuations: Sequence[str], right: Sequence[int]) -> Encoded:
        options = []
        for continuation in continuations:
            ids, count = self.place(prompt, continuation)
            # Without a prompt and a start token, the first token has nothing that could predict it.
            options.append({"input_ids": ids, "count": [min(count, len(ids) - 1)]})
        return {"options": options, "right": [int(i in right) for i in range(len(options))]}


class ChoiceObjective(OptionsObjective):
    """Cross-entropy of the mean log-probabilities of all options (MeZO's classification for options of several tokens)."""

    name = "choice"
    unit = "example"

    def __init__(self, tokenizer: Any, task: Task, max_length: int, demonstrations: Sequence[Example] = ()) -> None:
        if task.kind == "generation":
            raise InputError(f"--objective choice: the task {task.name} has no options; use answer")
        super().__init__(tokenizer, task, max_length, demonstrations)

    def encode(self, example: Example) -> Encoded | None:
        return self.encode_for_evaluation(example)

    def losses(self, model: torch.nn.Module, batch: Batch) -> Losses:
        scores, answers = self.scores(model, batch), batch["right"].argmax(-1)
        return Losses(F.cross_entropy(scores, answers, reduction="none"), torch.ones_like(answers), _right(scores, batch))


class AnswerObjective(OptionsObjective):
    """Cross-entropy of the tokens of the right answer, given the prompt and the answer so far (teacher forcing).

    MeZO and LOZO train COPA, ReCoRD, SQuAD and DROP so. The answer is the first right option, or the first of the answers of
    a generation and the end of its line. Of a task with options, evaluation reads them all and counts right answers.
    """

    name = "answer"
    unit = "token"

    def encode(self, example: Example) -> Encoded | None:
        """The right answer alone."""
        right = self.continuations(example)[right_options(example)[0]]
        return self._encoded(self.prompt(example), [right], (0,))

    def losses(self, model: torch.nn.Module, batch: Batch) -> Losses:
        tokens = self.token_log_probabilities(model, batch)
        taught = batch["answer"][batch["row"]]
        rows = torch.stack((-tokens * taught, taught.to(tokens.dtype)))
        rows = rows.new_zeros(2, len(batch["input_ids"])).index_add(1, batch["row"], rows)
        slot = batch["slot"]
        sums, counts = (rows[:, slot.clamp(min=0)] * (slot >= 0)).sum(2)
        correct = _right(self.mean_log_probabilities(tokens, batch), batch) if slot.shape[1] > 1 else None
        return Losses(sums, counts, correct)


def _right(scores: Tensor, batch: Batch) -> Tensor:
    return batch["right"].gather(1, scores.argmax(-1, keepdim=True)).squeeze(1)
