"""Prompts as one line of text each: fields in braces, and how a field is to be brought into the sentence."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

PUNCTUATION = ".!?;:,"


def _question(text: str) -> str:
    """The text with a capital at its start and a question mark at its end."""
    text = text if text.endswith("?") else text + "?"
    return text[:1].upper() + text[1:]


def _clause(text: str) -> str:
    """The text without its full stop, so that the sentence can go on."""
    return text.rstrip().removesuffix(".")


def _open(text: str) -> str:
    """The text without the mark that ends its sentence; the prompt has one of its own."""
    text = text.rstrip()
    return text[:-1].rstrip() if text.endswith(tuple(PUNCTUATION)) else text


def _before(text: str) -> str:
    """The text up to the blank (_), without the space in front of it, which belongs to what follows."""
    return text.partition("_")[0].rstrip(" ")


FORMS = {
    "question": _question,
    "clause": _clause,
    "open": _open,
    "before": _before,
    "lower": str.lower,
    "small": lambda text: text[:1].lower() + text[1:],
    "strip": str.strip,
}
"""What may follow the colon in a prompt's field: ``{1:question}``. "small" lowers the first letter, "lower" all of them."""


class _Prompt(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        return FORMS[format_spec](value) if format_spec else value


def render(prompt: str, texts: Sequence[str], **named: str) -> str:
    """The prompt with the fields {0}, {1}, ... and {mask} filled in.

    Args:
        prompt: a field may name one of ``FORMS`` after a colon.
        texts: what {0}, {1}, ... stand for; braces in them mean nothing.
    """
    return _Prompt().vformat(prompt, tuple(texts), named)
