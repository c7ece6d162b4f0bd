"""Prompts of causal models: demonstrations, the prompt, and what follows it, within the length that there is."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from typing import Any

from ...errors import InputError
from ..data.examples import Example
from ..tasks import Task
from ..tasks.prompts import render
from .base import Objective, right_options

SEPARATOR = "\n\n"
"""Between demonstrations, as in MeZO."""


class PromptedObjective(Objective):
    """An objective that asks a causal model by the task's prompt.

    What is too long is shortened in front, as in MeZO: first whole demonstrations go, then tokens of the prompt.

    Attributes:
        shown: how many demonstrations went with how many prompts.

    Raises:
        InputError: the prompt leaves no room for what it asks about.
    """

    def __init__(self, tokenizer: Any, task: Task, max_length: int, demonstrations: Sequence[Example] = ()) -> None:
        super().__init__(tokenizer, task, max_length, demonstrations)
        empty = len(self._ids(render(task.prompt, [""] * len(task.fields)) + max(task.words, key=len, default="")))
        check_room(f"prompt of the task {task.name}", empty, max_length)
        self.shown: collections.Counter[int] = collections.Counter()
        self._shown = [self.solved(e) for e in self.demonstrations]
        self._shown_lengths = [len(self._ids(text + SEPARATOR)) for text in self._shown]

    def prompt(self, example: Example) -> str:
        """What the model is asked."""
        if self.task.chat:
            return self._chat(json.loads(example.texts[0]), open_answer=True)
        return render(self.task.prompt, example.texts)

    def continuations(self, example: Example) -> tuple[str, ...]:
        """What can follow the prompt: the options of the example, or the words of the classes; of a generation, its answer."""
        if example.answers and self.task.chat:
            return (self._chat_answer(example),)
        if example.answers:
            form = self.task.answer.replace("{eos}", self.tokenizer.eos_token or "")
            return (form.replace("{0}", example.answers[0]),)
        return example.options or self.task.words

    def solved(self, example: Example) -> str:
        """The prompt with its right answer."""
        return (self.prompt(example) + self.continuations(example)[right_options(example)[0]]).strip()

    def place(self, prompt: str, continuation: str = "", room: int | None = None) -> tuple[list[int], int]:
        """Token ids of demonstrations, prompt and continuation.

        Args:
            room: tokens at most, if other than ``max_length``.

        Returns:
            The ids, and how many of them at the end belong to the continuation.

        Raises:
            InputError: the continuation alone is too long.
        """
        room = self.max_length if room is None else room
        prompt = self._demonstrated(prompt, continuation, room)
        ids = self._ids(prompt + continuation)
        count = max(1, len(ids) - _common(self._ids(prompt), ids)) if continuation else 0
        start = ids[:1] if ids and ids[0] == self.tokenizer.bos_token_id else []
        if len(ids) > room:
            if count + len(start) >= room:
                raise InputError(
                    f"an answer of {count} tokens ({continuation.strip()[:40]!r} ...) does not fit in {room} "
                    "(--max-length, or the context of the model)"
                )
            ids = start + ids[len(ids) - room + len(start) :]
        return ids, count

    def _demonstrated(self, prompt: str, continuation: str, room: int) -> str:
        if not self._shown:
            return prompt
        first, length = len(self._shown), len(self._ids(prompt + continuation))
        while first and length + self._shown_lengths[first - 1] <= room:
            first -= 1
            length += self._shown_lengths[first]
        self.shown[len(self._shown) - first] += 1
        return "".join(text + SEPARATOR for text in self._shown[first:]) + prompt

    def _chat_answer(self, example: Example) -> str:
        """What follows the prompt where the model's template writes the answer, the end of its turn included."""
        messages = json.loads(example.texts[0])
        prompt = self._chat(messages, open_answer=True)
        whole = self._chat([*messages, {"role": "assistant", "content": example.answers[0]}], open_answer=False)
        if not whole.startswith(prompt):
            raise InputError("the chat template of this model writes an answered prompt otherwise than an open one: use texts")
        return whole[len(prompt) :]

    def _chat(self, messages: list[dict[str, str]], *, open_answer: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError("the data are chats, and this model has no chat template: use a chat model, or prompt and completion")
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)
        except Exception as e:  # a template is a program of the model's, which raises what it likes
            raise InputError(f"the chat template of this model refuses a chat: {' '.join(str(e).split())}") from None
        return text

    def _ids(self, text: str) -> list[int]:
        # A chat template writes the special tokens itself.
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self.task.chat)["input_ids"]
        return ids


def check_room(prompt: str, tokens: int, max_length: int) -> None:
    """Raises InputError if a prompt without the texts that it asks about takes all the tokens that fit."""
    if tokens >= max_length:
        limit = "--max-length, or the context of the model"
        raise InputError(f"the {prompt} alone takes {tokens} tokens, and {max_length} fit ({limit})")


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
