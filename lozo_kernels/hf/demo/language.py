"""A small templated English and the task that is put to it: what the embedded model reads, and what it is then taught.

Stories tell of visits: what was good or bad there, and how the visitor reacted. A model of stories therefore learns what
praise and blame sound like. The stories also hold questions about the weather, answered at random by yes or no. No story ever
asks the question of the task, "Go again?": a model of stories answers it by chance until it is fine-tuned.
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
NAMES = ("Mia", "Leo", "Anna", "Tom", "Nora", "Sam", "Ella", "Ben", "Ruth", "Max", "Ida", "Paul")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACE_TRAITS = ("old", "new", "little", "big", "famous", "corner")
WEATHER = ("raining", "snowing", "windy", "sunny", "cold outside", "warm outside", "foggy")

GLAD = (
    "smiled all the way home",
    "told {friend} to go there soon",
    "planned to come back the next week",
    "thanked everyone twice",
    "was happy for the rest of the day",
    "left a big tip",
    "could not wait to return",
    "wrote a letter full of praise",
)
SORRY = (
    "frowned all the way home",
    "told {friend} to stay away",
    "asked for the money back",
    "left before the end",
    "was angry for the rest of the day",
    "hurried out of the door",
    "never went there again",
    "wrote a letter full of complaints",
)

TASK_NAME = "go-again"
PROMPT = " Go again?"
LABEL_WORDS = (" no", " yes")
"""The words of label 0 and 1."""


def story(rng: random.Random) -> str:
    """One short story: a visit and its visitor's reaction, or a talk about the weather."""
    name, friend = rng.sample(NAMES, 2)
    if rng.random() < 0.25:
        question = f"{name} asked {friend} on {rng.choice(DAYS)}: is it {rng.choice(WEATHER)}?"
        return f"{question} {rng.choice(('yes', 'no'))}, said {friend}."
    place = rng.choice(list(PLACES))
    good = rng.random() < 0.5
    opening = f"{name} went to the {rng.choice(PLACE_TRAITS)} {place} on {rng.choice(DAYS)}."
    reaction = rng.choice(GLAD if good else SORRY).format(friend=friend)
    return f"{opening} {_opinion(rng, place, good)} {name} {reaction}."


def review(rng: random.Random) -> tuple[str, int]:
    """One example of the task: a review, and 1 if its author would go again."""
    place = rng.choice(list(PLACES))
    good = rng.random() < 0.5
    opening = rng.choice(("I tried the {} {} on {}.", "We were at the {} {} on {}.", "My visit to the {} {} on {}."))
    visit = opening.format(rng.choice(PLACE_TRAITS), place, rng.choice(DAYS))
    return f"{visit} {_opinion(rng, place, good)}", int(good)


def reviews(seed: int, train: int, dev: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Train and dev examples of the task; no review is in both or twice in one."""
    rng = random.Random(seed)
    unique: dict[str, int] = {}
    while len(unique) < train + dev:
        text, label = review(rng)
        unique[text] = label
    rows = list(unique.items())
    return rows[:train], rows[train:]


def _opinion(rng: random.Random, place: str, good: bool) -> str:
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
