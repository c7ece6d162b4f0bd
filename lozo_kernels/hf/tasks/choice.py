"""Tasks in which each example has options of its own, compared by the log-probability that a model gives to each."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .classification import MEZO, PARQUET, SUPER_GLUE
from .task import Hub, Row, Task

_CONJUNCTIONS = {"effect": "so", "cause": "because"}
_WINOGRANDE = re.compile(
    r"(?:.*given sentence: )?(?P<sentence>.*)\n\nOption1: (?P<option1>.*) Option2: (?P<option2>.*) Answer format: .*"
)


def _copa(row: Row) -> Iterable[Row]:
    """The right choice goes on after "so" or "because", and so starts with a small letter unless it is the word I."""
    options = [_continued(row[name]) for name in ("choice1", "choice2")]
    yield {"premise": row["premise"], "conjunction": _CONJUNCTIONS[row["question"]], "options": options, "right": _right(row, 2)}


def _continued(sentence: str) -> str:
    first, space, rest = sentence.partition(" ")
    return " " + (first if first == "I" else first.lower()) + space + rest


def _record(row: Row) -> Iterable[Row]:
    """One example for each query; its options are the query with each entity in the place of the blank.

    SuperGLUE gives entities as spans of the passage whose end belongs to them, and several queries to a passage; the Hub gives
    the entities and answers themselves, and one query.
    """
    if isinstance(row["passage"], str):
        yield _cloze(row["passage"], row["query"], row["entities"], row["answers"])
        return
    text = row["passage"]["text"]
    entities = [text[span["start"] : span["end"] + 1] for span in row["passage"]["entities"]]
    for query in row["qas"]:
        yield _cloze(text, query["query"], entities, [answer["text"] for answer in query.get("answers", ())])


def _cloze(passage: str, query: str, entities: Iterable[str], answers: Iterable[str]) -> Row:
    names = list(dict.fromkeys(entities))
    right = [names.index(name) for name in dict.fromkeys(answers) if name in names]
    return {
        "passage": passage.replace("@highlight\n", "- "),
        "options": [" " + query.replace("@placeholder", name) for name in names],
        "right": right,
    }


def _winogrande(row: Row) -> Iterable[Row]:
    """The sentence up to its blank goes on with either option and the rest of the sentence.

    The Hub has sentence, option1, option2 and answer "1" or "2"; a file may also have the question in one ``text`` ("... given
    sentence: S", a blank line, "Option1: A Option2: B Answer format: ...") and the answer "option1" or "option2".
    """
    if "sentence" not in row and "text" in row:
        found = _WINOGRANDE.fullmatch(row["text"])
        if found is None:
            raise ValueError("its text is not a sentence and two options")
        row = {**row, **found.groupdict()}
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError("its sentence has no blank (_)")
    space = " " if before.endswith(" ") else ""
    options = [space + row[name] + after for name in ("option1", "option2")]
    answer = str(row["answer"]).removeprefix("option")
    yield {"sentence": row["sentence"], "options": options, "right": [("1", "2").index(answer)] if answer else []}


def _right(row: Row, count: int) -> list[int]:
    label = row["label"]
    if not isinstance(label, int) or not -1 <= label < count:
        raise ValueError(f"label {label!r} is none of its {count} choices")
    return [] if label == -1 else [int(label)]


ROWS = (
    Task(
        "copa",
        "choice",
        (("premise",), ("conjunction",)),
        prompt="{0:clause} {1}",
        unpack=_copa,
        objective="answer",
        source=MEZO,
        hub=Hub(SUPER_GLUE, "copa", revision=PARQUET),
    ),
    Task(
        "record",
        "choice",
        (("passage",),),
        prompt="{0}\n-",
        unpack=_record,
        objective="answer",
        source=MEZO + " (the cloze of GPT-3's evaluation)",
        hub=Hub(SUPER_GLUE, "record", revision=PARQUET),
    ),
    Task(
        "winogrande",
        "choice",
        (("sentence",),),
        prompt="{0:before}",
        unpack=_winogrande,
        objective="choice",
        source="the code of SubZero (Yu et al. 2024): what follows the blank's left side is scored with either option",
        hub=Hub("allenai/winogrande", "winogrande_m", revision=PARQUET),
    ),
)
