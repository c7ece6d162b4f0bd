"""What a file of the user's own is to be trained for, from the fields of its rows; and its held-out tenth."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..tasks import CHAT, COMPLETION, COMPLETION_TEXT, TASKS, TEXT, Row, Task
from .examples import Example
from .files import read_rows, spell

_CALLED_OTHERWISE = ("labels", "class", "category", "target", "sentiment", "intent")
"""Fields that are classes in many sets."""
_PAIR = TASKS["rte"].fields
_ALIKE = 0.8  # of difflib's ratio: "positve" and "positive" have 0.93


def task_of(path: Path, *, labelled: bool = True, classes: Sequence[str] = ()) -> Task:
    """The task of a file that comes without one, named after it.

    A field ``label`` makes it classification of ``text`` (or ``sentence``) or of a pair of texts. Otherwise ``text`` is language
    modelling, ``prompt`` and ``completion`` or ``messages`` are answers.

    Args:
        labelled: read classes and answers; otherwise all is language modelling.
        classes: the classes that a model knows, in its order; without them they are those of the file.

    Raises:
        InputError: the fields are none of these, labels are not as classes are, or look like typing errors.
    """
    rows = list(read_rows(path))
    if not rows:
        raise InputError(f"{path}: no examples")
    labels = [(where, row["label"]) for where, row in rows if "label" in row]
    where, first = rows[0]
    if labels and (labelled or not _has(first, TEXT.fields)):
        names = tuple(classes) or _classes(path, labels)
        return Task(path.stem, "classification", _text_fields(first, where), labels=names)
    if _has(first, TEXT.fields):
        named = next((name for name in _CALLED_OTHERWISE if name in first), None)
        if labelled and named is not None:
            raise InputError(
                f"{where}: beside the text there is {named!r}: name it 'label' if it is the class; --objective lm leaves it out"
            )
        return TEXT
    if "messages" in first or ("completion" in first and isinstance(first.get("prompt"), list)):
        if not labelled:
            raise InputError(f"{where}: --objective lm reads texts, and these are messages: leave it out")
        return dataclasses.replace(CHAT, name=path.stem)
    if "prompt" in first and "completion" in first:
        return dataclasses.replace(COMPLETION, name=path.stem) if labelled else COMPLETION_TEXT
    raise _unknown(first, where)


def hold_out(path: Path, examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example], str]:
    """Divides the examples of a file: train, a tenth as dev, and what was done in words.

    Equal texts stay on one side, or the dev loss would be that of examples seen in training.

    Raises:
        InputError: there is no text to hold out, or every text is more than half of the file.
    """
    counts = collections.Counter(e.texts for e in examples)
    texts = sorted(counts)
    if len(texts) < 2:
        few = "one example is" if len(examples) == 1 else f"the one text of its {len(examples)} examples is"
        raise InputError(f"{path}: {few} too few to hold some out; give --dev-file")
    random.Random(seed).shuffle(texts)
    total, held = len(examples), set(texts[: max(1, len(texts) // 10)])
    size = sum(counts[text] for text in held)
    # A tenth of the texts is about a tenth of the examples, unless some repeat much more than others.
    if not total / 20 <= size <= max(1, total / 5):
        held, size = set(), 0
        for text in texts:
            if size + counts[text] <= max(1, total // 10):
                held.add(text)
                size += counts[text]
        if not held:
            rarest = min(texts, key=lambda text: counts[text])
            held, size = {rarest}, counts[rarest]
    if size > total / 2:
        raise InputError(f"{path}: its texts repeat, so that no tenth of them can be held out; give --dev-file")
    note = "a tenth of it held out" if total / 20 <= size <= total / 5 else f"{size} of its {total} examples held out"
    return [e for e in examples if e.texts not in held], [e for e in examples if e.texts in held], f"{path}, {note}"


def _has(row: Row, fields: tuple[tuple[str, ...], ...]) -> bool:
    return all(any(name in row for name in names) for names in fields)


def _text_fields(row: Row, where: str) -> tuple[tuple[str, ...], ...]:
    for fields in (TEXT.fields, _PAIR):
        if _has(row, fields):
            return fields
    raise _unknown(row, where)


def _unknown(row: Row, where: str) -> InputError:
    pair = " and ".join(map(spell, _PAIR))
    return InputError(
        f"{where}: no text field ({spell(TEXT.fields[0])}, or for pairs {pair}), nor 'prompt' and 'completion', nor 'messages'; "
        f"its fields are {', '.join(map(repr, row))}"
    )


def _classes(path: Path, labels: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
    """Names of the classes, in their order."""
    where, first = labels[0]
    if type(first) not in (int, str) or any(type(v) is not type(first) for _, v in labels):
        raise _mixed(next((w for w, v in labels if type(v) is not type(first)), where))
    counts = collections.Counter(str(value) for _, value in labels)
    names = tuple(sorted(counts, key=type(first)))
    if type(first) is int and names != tuple(map(str, range(len(names)))):
        raise _mixed(where)
    if len(names) < 2:
        raise InputError(
            f"{path}: all its labels are {first!r}, and a classification needs two classes or more; without the field 'label' "
            "the texts are trained as language"
        )
    if type(first) is str:
        _check_names(counts, {str(value): place for place, value in reversed(labels)})
    return names


def _mixed(where: str) -> InputError:
    return InputError(f"{where}: labels are either all names or the numbers 0, 1, 2, ... without a gap; give --task for others")


def _check_names(counts: collections.Counter[str], places: dict[str, str]) -> None:
    """Raises InputError for a class that is likely a typing error: blank, another but for case and spaces, or alone and alike."""
    seen: dict[str, str] = {}
    for name, count in counts.most_common():
        if not name.strip():
            raise InputError(f"{places[name]}: the label is empty")
        other = seen.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            raise InputError(f"{places[name]}: the label {name!r} differs from {other!r} only in case or spaces; write both alike")
        alike = difflib.get_close_matches(name, [n for n, c in counts.items() if c >= 5 and n != name], 1, _ALIKE)
        if count == 1 and alike and not name[-1:].isdigit():
            raise InputError(
                f"{places[name]}: the label {name!r} has this one example, and {alike[0]!r} has {counts[alike[0]]}: "
                "correct it if it is a typing error, and otherwise give the class a second example"
            )
