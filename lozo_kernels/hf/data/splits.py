"""Which examples are trained on, which are looked at during training, and which are scored at the end."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TypeVar

from ...errors import InputError
from ..settings import Settings
from .examples import Example, TaskData

T = TypeVar("T")

TEST_SIZE = 1000
"""Test examples in the papers (MeZO and LOZO; LM-BFF's sets cut to the same number)."""


def split(whole: TaskData, settings: Settings) -> TaskData:
    """Draws the parts that the settings ask for; every draw depends on ``data_seed`` (or ``seed``) alone.

    - Neither k_shot nor num_dev: ``train`` (or num_train of it) and ``dev`` stay; num_eval of the latter are the test.
    - num_dev: num_train and num_dev of ``train``, disjoint (MeZO's 1,000 and 500), and num_eval of the old ``dev`` are the test.
      Where there are not as many, dev has its number and the rest is trained on, as in the published runs on CB and COPA.
    - k_shot: k of each class to train on and the next k as dev (LM-BFF), and the test as before; a class with fewer gives what it
      has, to train first, as happens to TREC's abbreviations with k = 512.

    Returns:
        The parts; their source also says how they were drawn.

    Raises:
        InputError: too few examples, or no classes to take k of.
    """
    seed, train, held = settings.drawing_seed, whole.train, whole.dev
    if settings.k_shot is None and settings.num_dev is None:
        test = _draw(held, settings.num_eval, seed, "test") if settings.num_eval is not None else []
        if settings.num_train is None:
            return dataclasses.replace(whole, test=test)
        source = f"{whole.source}: {settings.num_train} drawn with seed {seed}"
        return dataclasses.replace(whole, train=_draw(train, settings.num_train, seed, "train"), test=test, source=source)
    if settings.k_shot is not None:
        kept, dev, note = _k_shot(whole, settings.k_shot, seed)
    else:
        assert settings.num_dev is not None
        if settings.num_dev >= len(train):
            raise InputError(f"--num-dev {settings.num_dev} of {len(train)} train examples leaves none to train on")
        wanted = len(train) if settings.num_train is None else settings.num_train + settings.num_dev
        drawn = _draw(train, wanted, seed, "train")
        kept, dev = drawn[: -settings.num_dev], drawn[-settings.num_dev :]
        note = f"{len(kept)} and {len(dev)} of its train examples drawn with seed {seed}"
    test = _draw(held, settings.num_eval or TEST_SIZE, seed, "test")
    return dataclasses.replace(whole, train=kept, dev=dev, test=test, source=f"{whole.source}: {note}")


def draw_demonstrations(train: Sequence[T], settings: Settings) -> list[T]:
    """The demonstrations of in-context learning: num_shots of the train examples."""
    return _draw(train, settings.num_shots, settings.drawing_seed, "train")


def _k_shot(whole: TaskData, k: int, seed: int) -> tuple[list[Example], list[Example], str]:
    task = whole.task
    if task.kind not in ("classification", "image") or any(e.label is None for e in whole.train):
        raise InputError(f"--k-shot takes examples of each class, and {task.name} has no classes; use --num-train and --num-dev")
    drawn = _draw(whole.train, len(whole.train), seed, "train")
    kept, dev, short = [], [], []
    for label, name in enumerate(task.labels):
        of_class = [e for e in drawn if e.label == label]
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
