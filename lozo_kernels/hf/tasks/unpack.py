"""The examples in a row of a file, for tasks whose rows are not examples as they are. A row of the Hub is unpacked too."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .task import Row

_CONJUNCTIONS = {"effect": "so", "cause": "because"}
_WINOGRANDE = re.compile(
    r"(?:.*given sentence: )?(?P<sentence>.*)\n\nOption1: (?P<option1>.*) Option2: (?P<option2>.*) Answer format: .*"
)


def spans(row: Row) -> Iterable[Row]:
    """WSC: SuperGLUE keeps the two spans under ``target``, the Hub beside the text."""
    yield {**row, **row.get("target", {})}


def questions(row: Row) -> Iterable[Row]:
    """MultiRC: SuperGLUE nests questions and answers in the passage, and each answer is an example; the Hub has them flat."""
    if "passage" not in row:
        yield row
        return
    passage = row["passage"]
    for question in passage["questions"]:
        for answer in question["answers"]:
            yield {
                "paragraph": passage["text"],
                "question": question["question"],
                "answer": answer["text"],
                # The test set has no labels.
                **({"label": answer["label"]} if "label" in answer else {}),
            }


def copa(row: Row) -> Iterable[Row]:
    """The right choice goes on after "so" or "because", and so starts with a small letter unless it is the word I."""
    options = [_continued(row[name]) for name in ("choice1", "choice2")]
    yield {"premise": row["premise"], "conjunction": _CONJUNCTIONS[row["question"]], "options": options, "right": _right(row, 2)}


def _continued(sentence: str) -> str:
    first, space, rest = sentence.partition(" ")
    return " " + (first if first == "I" else first.lower()) + space + rest


def record(row: Row) -> Iterable[Row]:
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


def winogrande(row: Row) -> Iterable[Row]:
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


def squad(row: Row) -> Iterable[Row]:
    """Answers as a list of texts, or as the Hub's {"text": [...]}. A title, where the row has one, heads the passage."""
    title = f"Title: {row['title']}\n" if row.get("title") else ""
    answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
    yield {"document": f"{title}Context: {row['context']}", "question": row["question"], "answers": list(answers)}


def drop(row: Row) -> Iterable[Row]:
    """Answers as a list of texts, or as the Hub's {"spans": [...]}."""
    answers = row["answers_spans"]["spans"] if "answers_spans" in row else row["answers"]
    yield {"passage": row["passage"], "question": row["question"], "answers": list(answers)}


UNPACK = {call.__name__: call for call in (spans, questions, copa, record, winogrande, squad, drop)}
"""The functions by the names that ``tasks.json`` has for them."""
