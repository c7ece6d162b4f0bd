"""What a model scores on examples: loss and accuracy, or F1 and exact match of the answers that it writes."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch

from ...errors import InputError, require
from ..data.examples import Example
from ..measure import since
from ..objectives import Encoded, Objective, PromptedObjective
from ..tasks.metrics import METRICS
from .records import EvalRecord

_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}
"""A setting that is left out would be the checkpoint's own, and those of many chat models have a penalty."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model scored on some examples.

    Attributes:
        metrics: means over the examples by name, from 0 to 1; the task's main metric comes first.
        loss: mean of the objective's loss.
        answers: what the model wrote, in the order of the examples; empty where it chose.
    """

    metrics: dict[str, float]
    loss: float
    examples: int
    answers: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the answers."""
        return {"metrics": self.metrics, "loss": self.loss, "examples": self.examples}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, objective: Objective, examples: Sequence[Encoded], step: int, batch_size: int, device: torch.device
) -> EvalRecord:
    """Mean loss and accuracy over examples, after so many steps."""
    start = time.perf_counter()
    totals = [objective.totals(model, objective.collate(b, device)) for b in objective.batches(examples, batch_size)]
    loss = sum(float(t.loss) for t in totals) / sum(int(t.count) for t in totals)
    correct = [int(t.correct) for t in totals if t.correct is not None]
    asked = [t.examples for t in totals if t.correct is not None]
    return EvalRecord(step, loss, sum(correct) / sum(asked) if asked else None, len(examples), since(start))


def score(
    model: torch.nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
) -> Scores:
    """Scores the examples by the metrics of the objective's task.

    Raises:
        InputError: an example does not fit, or none of them can be predicted.
    """
    encoded = check_examples(objective, examples, max_new_tokens)
    record = evaluate(model, objective, encoded, 0, batch_size, device)
    if _writes(objective):
        answers = generate_answers(model, objective, examples, batch_size, max_new_tokens, device)
        metrics = {
            name: statistics.fmean(METRICS[name](answer, e.answers) for answer, e in zip(answers, examples, strict=True))
            for name in objective.task.metrics
        }
        return Scores(metrics, record.loss, len(examples), answers)
    return Scores({} if record.accuracy is None else {"accuracy": record.accuracy}, record.loss, len(encoded))


def check_examples(objective: Objective, examples: Sequence[Example], max_new_tokens: int) -> list[Encoded]:
    """The examples as the model takes them. Called before a run, so that it does not end with an error in place of its scores.

    Raises:
        InputError: as :func:`score`.
    """
    if _writes(objective):
        _room(objective, max_new_tokens)
    return objective.encode_all(examples, evaluation=True)


@torch.no_grad()
def generate_answers(
    model: torch.nn.Module,
    objective: PromptedObjective,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
) -> list[str]:
    """What a causal model writes after the prompts, greedily, up to the end of the line (MeZO's generation) where answers have one.

    Raises:
        InputError: the prompt and ``max_new_tokens`` do not fit in the objective's length together.
    """
    room = _room(objective, max_new_tokens)
    tokenizer = objective.tokenizer
    one_line = objective.task.answer.endswith("\n")
    ends = [t for t in (tokenizer.eos_token_id, _line_end(tokenizer) if one_line else None) if t is not None]
    config = require("transformers").GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id, **_GREEDY
    )
    padding = {"padding_side": "left", "return_attention_mask": True, "return_tensors": "pt"}
    answers = []
    for start in range(0, len(examples), batch_size):
        prompts = [objective.place(objective.prompt(e), room=room)[0] for e in examples[start : start + batch_size]]
        padded = tokenizer.pad({"input_ids": prompts}, **padding).to(device)
        written = model.generate(**padded, generation_config=config)  # type: ignore[operator]
        texts = tokenizer.batch_decode(written[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [(text.split("\n")[0] if one_line else text).strip() for text in texts]
    return answers


def _writes(objective: Objective) -> TypeGuard[PromptedObjective]:
    """Whether the model writes the answers."""
    return objective.task.kind == "generation" and isinstance(objective, PromptedObjective)


def _room(objective: Objective, max_new_tokens: int) -> int:
    room = objective.max_length - max_new_tokens
    if room < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in {objective.max_length} tokens")
    return room


def _line_end(tokenizer: Any) -> int | None:
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return ids[-1] if ids and tokenizer.decode(ids[-1:]) == "\n" else None
