"""Tasks whose answer is written by the model."""

from __future__ import annotations

from collections.abc import Iterable

from .classification import MEZO
from .task import Hub, Row, Task


def _squad(row: Row) -> Iterable[Row]:
    """Answers as a list of texts, or as the Hub's {"text": [...]}. A title, where the row has one, heads the passage."""
    title = f"Title: {row['title']}\n" if row.get("title") else ""
    answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
    yield {"document": f"{title}Context: {row['context']}", "question": row["question"], "answers": list(answers)}


def _drop(row: Row) -> Iterable[Row]:
    """Answers as a list of texts, or as the Hub's {"spans": [...]}."""
    answers = row["answers_spans"]["spans"] if "answers_spans" in row else row["answers"]
    yield {"passage": row["passage"], "question": row["question"], "answers": list(answers)}


ROWS = (
    Task(
        "squad",
        "generation",
        (("document",), ("question",)),
        prompt="{0}\nQuestion: {1:strip}\nAnswer:",
        unpack=_squad,
        metrics=("f1", "exact_match"),
        objective="answer",
        source=MEZO,
        hub=Hub("rajpurkar/squad"),
    ),
    Task(
        "drop",
        "generation",
        (("passage",), ("question",)),
        prompt="Passage: {0}\nQuestion: {1:strip}\nAnswer:",
        unpack=_drop,
        metrics=("f1", "exact_match"),
        objective="answer",
        source=MEZO,
        hub=Hub("ucinlp/drop"),
    ),
)
