"""The table of tasks. A new task is a new row; nothing else in the package knows a task by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .demo import language

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Hub:
    """Where the Hub keeps a data set.

    Attributes:
        path, config: as ``datasets.load_dataset`` takes them.
        train, dev: names of the splits.
        revision: "refs/convert/parquet" for a data set whose main branch is a script.
        label_field: if other than the task's.
        labels: what its integer labels stand for, if other than the task's order.
    """

    path: str
    config: str | None = None
    train: str = "train"
    dev: str = "validation"
    revision: str | None = None
    label_field: str | None = None
    labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        kind: "classification" or "causal_lm".
        fields: the text fields in the order of the model's input; of the names of each, the first that a row has is read.
        labels: class names; a row's label is a name, an index into them, or a boolean for ("false", "true").
        prompt: how a causal model is asked, with the fields as {0} and {1}.
        words: the answer of each class; they follow the prompt directly, so they start with a space.
        generate: (seed) -> train and dev rows, for a task that needs no files.
    """

    name: str
    kind: str
    fields: tuple[tuple[str, ...], ...]
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    prompt: str = ""
    words: tuple[str, ...] = ()
    hub: Hub | None = None
    generate: Callable[[int], tuple[list[Row], list[Row]]] | None = None


def _go_again(seed: int) -> tuple[list[Row], list[Row]]:
    train, dev = language.reviews(seed, train=1000, dev=500)
    return [{"text": t, "label": y} for t, y in train], [{"text": t, "label": y} for t, y in dev]


_TEXT = (("text", "sentence"),)
_PAIR = (("premise", "text_a", "sentence1"), ("hypothesis", "text_b", "sentence2"))
_NLI = ("entailment", "neutral", "contradiction")
_NLI_PROMPT = "{0} Question: {1} Yes, no, or maybe?"
_NLI_WORDS = (" Yes", " Maybe", " No")

TEXT = Task("text", "causal_lm", _TEXT)
"""Language modelling on one field of any file."""

TASKS = {
    t.name: t
    for t in (
        Task(
            language.TASK_NAME,
            "classification",
            _TEXT,
            labels=("no", "yes"),
            prompt="{0}" + language.PROMPT,
            words=language.LABEL_WORDS,
            generate=_go_again,
        ),
        Task(
            "sst2",
            "classification",
            _TEXT,
            labels=("negative", "positive"),
            prompt="{0} It was",
            words=(" terrible", " great"),
            hub=Hub("stanfordnlp/sst2"),
        ),
        Task(
            "trec",
            "classification",
            _TEXT,
            labels=("description", "entity", "abbreviation", "human", "location", "number"),
            prompt="{0} The answer is a kind of",
            words=(" description", " entity", " abbreviation", " person", " location", " number"),
            hub=Hub(
                "CogComp/trec",
                dev="test",
                revision="refs/convert/parquet",
                label_field="coarse_label",
                labels=("abbreviation", "entity", "description", "human", "location", "number"),
            ),
        ),
        Task(
            "rte",
            "classification",
            _PAIR,
            labels=("entailment", "not_entailment"),
            prompt="{0} Does this mean that {1} is true? Yes or no?",
            words=(" Yes", " No"),
            hub=Hub("nyu-mll/glue", "rte"),
        ),
        Task(
            "snli",
            "classification",
            _PAIR,
            labels=_NLI,
            prompt=_NLI_PROMPT,
            words=_NLI_WORDS,
            hub=Hub("stanfordnlp/snli"),
        ),
        Task(
            "mnli",
            "classification",
            _PAIR,
            labels=_NLI,
            prompt=_NLI_PROMPT,
            words=_NLI_WORDS,
            hub=Hub("nyu-mll/glue", "mnli", dev="validation_matched"),
        ),
        Task(
            "cb",
            "classification",
            _PAIR,
            labels=("entailment", "contradiction", "neutral"),
            prompt=_NLI_PROMPT,
            words=(" Yes", " No", " Maybe"),
            hub=Hub("aps/super_glue", "cb", revision="refs/convert/parquet"),
        ),
        Task(
            "boolq",
            "classification",
            (("passage",), ("question",)),
            labels=("false", "true"),
            prompt="{0} {1}? Yes or no?",
            words=(" No", " Yes"),
            hub=Hub("google/boolq", label_field="answer"),
        ),
        TEXT,
    )
}
