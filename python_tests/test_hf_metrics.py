"""F1 and exact match against a second telling of SQuAD's evaluation script, on the real answers where they are at hand."""

import json
import re
import string

import pytest
from hf_helpers import data_folder

from lozo_kernels.hf.tasks.metrics import exact_match, f1, normalize


def oracle_words(text):
    """The v1.1 script's order: lower case, no punctuation, no articles, white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.findall(r"\S+", re.sub(r"\b(a|an|the)\b", " ", text))


def oracle_f1(predicted, answers):
    best = 0.0
    for answer in answers:
        left, matched = oracle_words(answer), 0
        words = oracle_words(predicted)
        total = len(left)
        for word in words:
            if word in left:
                left.remove(word)
                matched += 1
        if matched:
            precision, recall = matched / len(words), matched / total
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def test_normalisation_is_that_of_the_script():
    assert normalize("The  Cat, and\ta dog's-tail!") == "cat and dogstail"
    assert normalize("AN answer; the theatre") == "answer theatre"
    assert normalize("a.m.") == "am"  # the punctuation goes first, so that no article is left
    assert normalize("The") == "" == normalize("...")


@pytest.mark.parametrize(
    ("predicted", "answers", "em", "value"),
    [
        ("the Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos", "broncos of Denver"], 0, 2 / 3),
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as it occurs
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 0),  # nothing is left of either: equal, but no word in common, as in v1.1
        ("seven", ["7"], 0, 0),
    ],
)
def test_examples_by_hand(predicted, answers, em, value):
    assert exact_match(predicted, answers) == em and f1(predicted, answers) == pytest.approx(value)


def test_the_real_answers_score_as_the_script_scores_them(rng):
    """Answers, contexts, and answers with words changed, as predictions."""
    with (data_folder() / "squad.dev.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rng.sample(rows, 600):
        words = rng.choice(row["answers"]).split()
        rng.shuffle(words)
        sentence = rng.choice(row["context"].split(". "))
        for predicted in (row["answers"][0], " ".join(words), " ".join(words[1:]), "The " + " ".join(words) + ".", sentence, ""):
            em = any(oracle_words(predicted) == oracle_words(answer) for answer in row["answers"])
            assert exact_match(predicted, row["answers"]) == em
            assert f1(predicted, row["answers"]) == pytest.approx(oracle_f1(predicted, row["answers"]), abs=1e-12)
