"""One row of the table of tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from ...errors import InputError, require

Row = dict[str, Any]

KINDS = ("classification", "choice", "generation", "causal_lm", "image")


@dataclasses.dataclass(frozen=True)
class Hub:
    """Where the Hub keeps a data set.

    Attributes:
        path, config: its name and configuration, for ``datasets.load_dataset``.
        train, dev: the splits' names.
        revision: "refs/convert/parquet" for a data set whose main branch is a script.
        label_field: the field of its labels, where that is not the task's.
        labels: the classes that its labels 0, 1, ... stand for, where their order is not the task's.
    """

    path: str
    config: str | None = None
    train: str = "train"
    dev: str = "validation"
    revision: str | None = None
    label_field: str | None = None
    labels: tuple[str, ...] = ()

    def load(self, task: str, **options: Any) -> Any:
        """What ``datasets.load_dataset`` returns for the data set of a task, with these options.

        Raises:
            InputError: the library is not installed, or the data set cannot be had.
        """
        datasets = require("datasets")
        try:
            return datasets.load_dataset(self.path, self.config, revision=self.revision, **options)
        except Exception as e:  # offline, renamed, gated: the library raises many kinds, and each is the user's to know
            reason = " ".join(str(e).split())
            raise InputError(f"task {task}: {self.path} could not be had from the Hub ({reason}); use --data-dir") from None


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: where its examples are, how a model is asked, and how its answers are scored.

    Attributes:
        kind: "classification" (classes that all examples share), "choice" (each example has options of its own), "generation"
            (the answer is written), "causal_lm" or "image" (classes of images, which are those of the data).
        fields: the text fields in the order of the model's input; of the names of each, the first that a row has is read.
        labels: class names; a row's label is a name, an index into them, or a boolean for ("false", "true").
        prompt: how a causal model is asked, see :mod:`lozo_kernels.hf.tasks.prompts`.
        words: the answer of each class; they follow the prompt directly, so they start with a space unless it ends a line.
        masked: how a masked model is asked; {mask} is where it answers.
        masked_words: its answer for each class.
        chat: the prompt is messages as JSON, which the model's chat template writes.
        answer: how the answer of a generation follows the prompt: {0} is the answer, {eos} the model's end token.
        unpack: the examples in a row of a file, as rows with ``fields``; a choice has ``options`` (continuations of the prompt)
            and ``right`` (indices of the right ones), a generation ``answers`` (all that count as right; the first is trained).
        metrics: "accuracy", or names in :mod:`lozo_kernels.hf.tasks.metrics`, the main one first.
        objective: what "auto" takes on a causal model.
        source, masked_source: who asked like this.
        hub: where the Hub keeps it.
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
    chat: bool = False
    answer: str = " {0}\n"
    masked: str = ""
    masked_words: tuple[str, ...] = ()
    unpack: Callable[[Row], Iterable[Row]] | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    objective: str = "prompt"
    source: str = ""
    masked_source: str = ""
