"""F1 and exact match of written answers, as the evaluation script of SQuAD v1.1 has them (MeZO: also for DROP)."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """Lower case, without ASCII punctuation, then without articles, words a space apart."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers but for :func:`normalize`, else 0."""
    return float(normalize(predicted) in map(normalize, answers))


def f1(predicted: str, answers: Sequence[str]) -> float:
    """The best F1 between the words of the prediction and those of an answer; words count as often as they occur."""
    return max(_f1(normalize(predicted).split(), normalize(answer).split()) for answer in answers)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"f1": f1, "exact_match": exact_match}
"""(a written answer, all answers that count as right) -> a score from 0 to 1. A task's figure is the mean over its examples."""


def _f1(predicted: list[str], answer: list[str]) -> float:
    same = sum((collections.Counter(predicted) & collections.Counter(answer)).values())
    return 2 * same / (len(predicted) + len(answer)) if same else 0.0
