"""One example of a task, and the examples of a run."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from ..tasks import Task

DEV_NAMES = ("dev", "val", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        texts: the text fields of the task, in order.
        label: the index of its class; None where there are no classes.
        options, right: continuations of the prompt that are this example's own, and the indices of the right ones.
        answers: all texts that count as right where the answer is written; the first is trained.
    """

    texts: tuple[str, ...]
    label: int | None = None
    options: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()


def relabelled(examples: Sequence[Example], names: Sequence[str], classes: Sequence[str]) -> list[Example]:
    """Examples whose labels are positions in ``names``, with the positions of the same classes in ``classes``."""
    return [dataclasses.replace(e, label=classes.index(names[e.label])) for e in examples if e.label is not None]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task (one made up for a file without a task included) and its examples; ``test`` is empty unless it was asked for."""

    task: Task
    train: list[Example]
    dev: list[Example]
    source: str
    test: list[Example] = dataclasses.field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Train examples of each class by name; empty for a task without classes, or where labels were not read."""
        counts = collections.Counter(e.label for e in self.train if e.label is not None)
        return {name: counts[i] for i, name in enumerate(self.task.labels)} if counts else {}

    def without_examples(self) -> list[str]:
        """Classes of which no train example is left."""
        return [name for name, count in self.counts().items() if not count]
