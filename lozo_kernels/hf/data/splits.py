"""Which examples are trained on, which are looked at during training, and which are scored at the end."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Generic, TypeVar

from ...errors import InputError
from ..settings import Settings
from ..tasks import Task

T = TypeVar("T")

TEST_SIZE = 1000
"""Test examples in the papers (MeZO and LOZO; LM-BFF's sets cut to the same number)."""


@dataclasses.dataclass(frozen=True)
class Split(Generic[T]):
    """The three parts, and a note on how they were drawn (empty where nothing was)."""

    train: list[T]
    dev: list[T]
    test: list[T]
    note: str = ""


def split(task: Task, train: Sequence[T], held_out: Sequence[T], labels: Sequence[int | None], settings: Settings) -> Split[T]:
    """Draws the parts that the settings ask for; every draw depends on ``data_seed`` (or ``seed``) alone.

    - Neither k-shot nor num_dev: ``train`` (or num_train of it) and ``held_out`` as dev; the latter's num_eval are the test.
    - num_dev: num_train and num_dev of ``train``, disjoint (MeZO's 1,000 and 500), and num_eval of ``held_out``. Where there are
      not as many, dev has its number and the rest is trained on, as in the published runs on CB and COPA.
    - k_shot: k of each class to train on and the next k as dev (LM-BFF); a class with fewer gives what it has, to train first,
      as happens to TREC's abbreviations with k = 512.

    Args:
        labels: the class of each of ``train``.

    Raises:
        InputError: too few examples, or no classes to take k of.
    """
    seed = settings.drawing_seed
    held = list(held_out)
    if settings.k_shot is not None:
        kept, dev, note = _k_shot(task, train, labels, settings.k_shot, seed)
        return Split(kept, dev, _draw(held, settings.num_eval or TEST_SIZE, seed, "test"), note)
    if settings.num_dev is not None:
        if settings.num_dev >= len(train):
            raise InputError(f"--num-dev {settings.num_dev} of {len(train)} train examples leaves none to train on")
        wanted = len(train) if settings.num_train is None else settings.num_train + settings.num_dev
        drawn = _draw(train, wanted, seed, "train")
        kept, dev = drawn[: -settings.num_dev], drawn[-settings.num_dev :]
        note = f"{len(kept)} and {len(dev)} of its train examples drawn with seed {seed}"
        return Split(kept, dev, _draw(held, settings.num_eval or TEST_SIZE, seed, "test"), note)
    test = _draw(held, settings.num_eval, seed, "test") if settings.num_eval is not None else []
    if settings.num_train is None:
        return Split(list(train), held, test)
    return Split(_draw(train, settings.num_train, seed, "train"), held, test, f"{settings.num_train} drawn with seed {seed}")


def draw_demonstrations(train: Sequence[T], settings: Settings) -> list[T]:
    """The demonstrations of in-context learning: num_shots of the train examples."""
    return _draw(train, settings.num_shots, settings.drawing_seed, "train")


def _k_shot(task: Task, train: Sequence[T], labels: Sequence[int | None], k: int, seed: int) -> tuple[list[T], list[T], str]:
    if task.kind not in ("classification", "image") or None in labels:
        raise InputError(f"--k-shot takes examples of each class, and {task.name} has no classes; use --num-train and --num-dev")
    order = _draw(range(len(train)), len(train), seed, "train")
    kept, dev, short = [], [], []
    for label, name in enumerate(task.labels):
        of_class = [train[i] for i in order if labels[i] == label]
        if not of_class:
            raise InputError(f"--k-shot {k}: no train example is of the class {name}")
        kept += of_class[:k]
        dev += of_class[k : 2 * k]
        if len(of_class) < 2 * k:
            short.append(f"{name} has {len(of_class)}")
    if not dev:
        raise InputError(f"--k-shot {k}: no class has more than {k} examples, so that none is left as dev")
    note = f"{k} of each class, and as many as dev, drawn with seed {seed}"
    return kept, dev, note + (f" ({', '.join(short)})" if short else "")


def _draw(items: Sequence[T], count: int, seed: int, what: str) -> list[T]:
    return random.Random(f"{what} {seed}").sample(list(items), min(count, len(items)))
