"""Tasks with classes that all examples share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ..demo import language
from .task import Hub, Row, Task

MEZO = "Malladi et al. 2023 (MeZO), appendix on data sets and prompts, table of OPT prompts"
LM_BFF = "Gao et al. 2021 (LM-BFF), table of manual templates and label words; the table of RoBERTa prompts in Malladi et al. 2023"
OWN = "this project"
GLUE, SUPER_GLUE, PARQUET = "nyu-mll/glue", "aps/super_glue", "refs/convert/parquet"

SENTENCE = (("text", "sentence"),)
PAIR = (("premise", "text_a", "sentence1"), ("hypothesis", "text_b", "sentence2"))
_IT_WAS = "{0} It was {mask}."
_ENTAILS = "{0:open}? {mask}, {1:small}"


def _go_again(seed: int) -> tuple[list[Row], list[Row]]:
    train, dev = language.reviews(seed, train=1000, dev=500)
    return [{"text": t, "label": y} for t, y in train], [{"text": t, "label": y} for t, y in dev]


def _spans(row: Row) -> Iterable[Row]:
    """WSC: SuperGLUE keeps the two spans under ``target``, the Hub beside the text."""
    yield {**row, **row.get("target", {})}


def _questions(row: Row) -> Iterable[Row]:
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


_SNLI = Task(
    "snli",
    "classification",
    PAIR,
    labels=("entailment", "neutral", "contradiction"),
    prompt="{0} Question: {1} Yes, no, or maybe?",
    words=(" Yes", " Maybe", " No"),
    source=OWN,
    masked=_ENTAILS,
    masked_words=("Yes", "Maybe", "No"),
    masked_source=LM_BFF,
    hub=Hub("stanfordnlp/snli"),
)

ROWS = (
    Task(
        language.TASK_NAME,
        "classification",
        SENTENCE,
        labels=("no", "yes"),
        prompt="{0}" + language.PROMPT,
        words=language.LABEL_WORDS,
        generate=_go_again,
        source=OWN,
    ),
    Task(
        "sst2",
        "classification",
        SENTENCE,
        labels=("negative", "positive"),
        prompt="{0:strip} It was",
        words=(" terrible", " great"),
        source=MEZO,
        masked=_IT_WAS,
        masked_words=("terrible", "great"),
        masked_source=LM_BFF,
        hub=Hub("stanfordnlp/sst2"),
    ),
    Task(
        "sst5",
        "classification",
        SENTENCE,
        labels=("very negative", "negative", "neutral", "positive", "very positive"),
        prompt="{0:strip} It was",
        words=(" terrible", " bad", " okay", " good", " great"),
        source=OWN + ", after sst2 with the words of LM-BFF",
        masked=_IT_WAS,
        masked_words=("terrible", "bad", "okay", "good", "great"),
        masked_source=LM_BFF,
        hub=Hub("SetFit/sst5"),
    ),
    Task(
        "trec",
        "classification",
        SENTENCE,
        labels=("description", "entity", "abbreviation", "human", "location", "number"),
        prompt="{0} The answer is a kind of",
        words=(" description", " entity", " abbreviation", " person", " location", " number"),
        source=OWN,
        masked="{mask}: {0}",
        masked_words=("Description", "Entity", "Expression", "Human", "Location", "Number"),
        masked_source=LM_BFF,
        hub=Hub(
            "CogComp/trec",
            dev="test",
            revision=PARQUET,
            label_field="coarse_label",
            labels=("abbreviation", "entity", "description", "human", "location", "number"),
        ),
    ),
    Task(
        "rte",
        "classification",
        PAIR,
        labels=("entailment", "not_entailment"),
        prompt='{0}\nDoes this mean that "{1}" is true? Yes or No?\n',
        words=("Yes", "No"),
        source=MEZO,
        masked=_ENTAILS,
        masked_words=("Yes", "No"),
        masked_source=LM_BFF,
        hub=Hub(GLUE, "rte"),
    ),
    _SNLI,
    dataclasses.replace(_SNLI, name="mnli", hub=Hub(GLUE, "mnli", dev="validation_matched")),
    Task(
        "cb",
        "classification",
        PAIR,
        labels=("entailment", "contradiction", "neutral"),
        prompt='Suppose {0} Can we infer that "{1}"? Yes, No, or Maybe?\n',
        words=("Yes", "No", "Maybe"),
        source=MEZO,
        hub=Hub(SUPER_GLUE, "cb", revision=PARQUET),
    ),
    Task(
        "boolq",
        "classification",
        (("passage",), ("question",)),
        labels=("false", "true"),
        prompt="{0} {1:question}\n",
        words=("No", "Yes"),
        source=MEZO,
        hub=Hub("google/boolq", label_field="answer"),
    ),
    Task(
        "wsc",
        "classification",
        (("text",), ("span2_text",), ("span1_text",)),
        labels=("false", "true"),
        prompt='{0}\nIn the previous sentence, does the pronoun "{1:lower}" refer to {2}? Yes or No?\n',
        words=("No", "Yes"),
        unpack=_spans,
        source=MEZO,
        hub=Hub(SUPER_GLUE, "wsc.fixed", revision=PARQUET),
    ),
    Task(
        "wic",
        "classification",
        (("word",), ("sentence1",), ("sentence2",)),
        labels=("false", "true"),
        prompt='Does the word "{0}" have the same meaning in these two sentences? Yes, No?\n{1}\n{2}\n',
        words=("No", "Yes"),
        source=MEZO,
        hub=Hub(SUPER_GLUE, "wic", revision=PARQUET),
    ),
    Task(
        "multirc",
        "classification",
        (("paragraph",), ("question",), ("answer",)),
        labels=("false", "true"),
        prompt='{0}\nQuestion: {1}\nI found this answer "{2}". Is that correct? Yes or No?\n',
        words=("No", "Yes"),
        unpack=_questions,
        source=MEZO,
        hub=Hub(SUPER_GLUE, "multirc", revision=PARQUET),
    ),
)
