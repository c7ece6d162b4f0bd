"""Tasks of files that people bring: texts, prompts with completions, and chats."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .task import Row, Task

OWN = "this project"
SENTENCE = (("text", "sentence"),)


def _completion(row: Row) -> Iterable[Row]:
    yield {"prompt": row["prompt"], "answers": [row["completion"]]}


def _completion_text(row: Row) -> Iterable[Row]:
    if not (isinstance(row["prompt"], str) and isinstance(row["completion"], str)):
        raise ValueError("prompt and completion are texts")
    yield {"text": row["prompt"] + row["completion"]}


def _chat(row: Row) -> Iterable[Row]:
    """Messages, or a prompt and a completion of messages: what is before the last answer is the prompt, as JSON."""
    messages = [_message(m) for m in (row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]])]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("a chat has two messages or more, the last one of the assistant")
    yield {"prompt": json.dumps(messages[:-1], ensure_ascii=False), "answers": [messages[-1]["content"]]}


def _message(message: Any) -> Row:
    if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
        raise ValueError(f"a message has the texts role and content, this is {message!r:.80}")
    return {"role": message["role"], "content": message["content"]}


TEXT = Task("text", "causal_lm", SENTENCE, objective="lm", metrics=(), source=OWN)
"""Language modelling on one field of any file."""

COMPLETION_TEXT = Task("text", "causal_lm", SENTENCE, objective="lm", metrics=(), source=OWN, unpack=_completion_text)
"""Language modelling on a prompt and its completion, one text."""

COMPLETION = Task(
    "completion",
    "generation",
    (("prompt",),),
    prompt="{0}",
    answer="{0}{eos}",
    unpack=_completion,
    metrics=("f1", "exact_match"),
    objective="answer",
    source=OWN,
)
"""The completion is learned; it follows the prompt directly, and ends with the model's end token."""

CHAT = Task(
    "chat",
    "generation",
    (("prompt",),),
    prompt="{0}",
    chat=True,
    answer="{0}",
    unpack=_chat,
    metrics=("f1", "exact_match"),
    objective="answer",
    source=OWN,
)
"""The last answer is learned, as the chat template of the model writes it."""
