"""A small templated English and the task that is put to it.

The embedded model was trained on stories of visits in this language: what was good or bad there, and how the visitor reacted
(see ``bench/pretrain_demo.py`` in the repository). It knows what praise and blame sound like. No story asks the question of the
task, "Go again?", so the model answers it by chance until it is fine-tuned.
"""

from __future__ import annotations

import random

PLACES: dict[str, tuple[str, ...]] = {
    "cafe": ("food", "staff", "room"),
    "bakery": ("food", "staff", "room"),
    "hotel": ("food", "staff", "room"),
    "market": ("food", "staff", "goods"),
    "toy shop": ("goods", "staff", "room"),
    "book shop": ("goods", "staff", "room"),
    "cinema": ("show", "staff", "room"),
    "theater": ("show", "staff", "room"),
    "circus": ("show", "food", "staff"),
}
"""Places and the kinds of things that are found there."""

THINGS: dict[str, tuple[str, ...]] = {
    "food": ("soup", "bread", "coffee", "cake", "fish", "salad", "pie", "breakfast"),
    "staff": ("clerk", "manager", "guide", "guard", "owner", "helper"),
    "room": ("room", "hall", "table", "chair", "floor", "window"),
    "goods": ("lamp", "puzzle", "kite", "basket", "album", "clock"),
    "show": ("film", "play", "story", "music", "ending", "dance"),
}

GOOD: dict[str, tuple[str, ...]] = {
    "food": ("delicious", "fresh", "tasty", "perfect", "rich", "lovely"),
    "staff": ("friendly", "kind", "polite", "helpful", "patient", "cheerful"),
    "room": ("clean", "cozy", "bright", "quiet", "lovely", "comfortable"),
    "goods": ("solid", "pretty", "cheap", "perfect", "charming", "useful"),
    "show": ("funny", "thrilling", "moving", "clever", "charming", "superb"),
}

BAD: dict[str, tuple[str, ...]] = {
    "food": ("stale", "burnt", "bitter", "salty", "awful", "greasy"),
    "staff": ("rude", "lazy", "careless", "grumpy", "slow", "unfair"),
    "room": ("dirty", "noisy", "dark", "cramped", "awful", "smelly"),
    "goods": ("broken", "ugly", "flimsy", "costly", "useless", "scratched"),
    "show": ("boring", "clumsy", "silly", "dull", "endless", "poor"),
}

DEGREES = ("", "", "", "very ", "really ", "so ", "quite ")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACE_TRAITS = ("old", "new", "little", "big", "famous", "corner")
TASK_NAME = "go-again"
PROMPT = " Go again?"
LABEL_WORDS = (" no", " yes")
"""The words of label 0 and 1."""


def review(rng: random.Random) -> tuple[str, int]:
    """One example of the task: a review, and 1 if its author would go again."""
    place = rng.choice(list(PLACES))
    good = rng.random() < 0.5
    opening = rng.choice(("I tried the {} {} on {}.", "We were at the {} {} on {}.", "My visit to the {} {} on {}."))
    visit = opening.format(rng.choice(PLACE_TRAITS), place, rng.choice(DAYS))
    return f"{visit} {opinion(rng, place, good)}", int(good)


def reviews(seed: int, train: int, dev: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Train and dev examples of the task; no review is in both or twice in one."""
    rng = random.Random(seed)
    unique: dict[str, int] = {}
    while len(unique) < train + dev:
        text, label = review(rng)
        unique[text] = label
    rows = list(unique.items())
    return rows[:train], rows[train:]


def opinion(rng: random.Random, place: str, good: bool) -> str:
    """One to two sentences about a place. After a "but" it is the last clause that counts."""
    kinds = list(PLACES[place])
    rng.shuffle(kinds)
    first, second, third = (rng.choice(THINGS[kind]) for kind in kinds)
    shape = rng.random()
    if shape < 0.2:
        return f"The {first} was {_quality(rng, kinds[0], not good)}, but the {second} was {_quality(rng, kinds[1], good)}."
    both = f"The {first} was {_quality(rng, kinds[0], good)} and the {second} was {_quality(rng, kinds[1], good)}."
    if shape < 0.6:
        return both
    return f"{both} The {third} was {_quality(rng, kinds[2], good)} too."


def _quality(rng: random.Random, kind: str, good: bool) -> str:
    negated = rng.random() < 0.1
    words = GOOD if good is not negated else BAD
    return ("not " if negated else rng.choice(DEGREES)) + rng.choice(words[kind])
