"""What the papers report and the settings they report it under, as data for ``lozo-kernels reproduce``.

Sources: LOZO is Chen et al., ICLR 2025 (its authors' slides carry both tables of numbers below); MeZO is Malladi et al., NeurIPS
2023; SubZero is Yu et al., 2024. A figure that is not given as a number in these is left out, never read off a plot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Cells = dict[str, dict[str, float]]
"""Method -> column -> number."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a method was trained for a table.

    Attributes:
        settings: fields of :class:`~lozo_kernels.hf.settings.Settings`.
        grid: fields that were searched; the first of each is what a run without a search takes.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """One table of a paper.

    Attributes:
        name: its name on the command line.
        title, source: what it is and where it is printed.
        unit: the unit of its cells.
        columns: tasks, by their names here.
        recipes: how each method was trained, in the order of the rows.
        published: the numbers of each model; empty where the sources have none.
        data: how many examples, as fields of the settings.
    """

    name: str
    title: str
    source: str
    unit: str
    columns: tuple[str, ...]
    recipes: dict[str, Recipe]
    published: dict[str, Cells]
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


OPT_TASKS = ("sst2", "rte", "boolq", "wsc", "wic", "squad")


def _row(*cells: float) -> dict[str, float]:
    return dict(zip(OPT_TASKS, cells, strict=True))


OPT_ACCURACY = {
    "facebook/opt-30b": {
        "zero-shot": _row(56.7, 52.0, 39.1, 38.5, 50.2, 46.5),
        "icl": _row(81.9, 66.8, 66.2, 56.7, 51.3, 78.0),
        "mezo": _row(90.7, 64.3, 68.2, 63.5, 56.3, 86.1),
        "lozo": _row(92.8, 65.3, 72.3, 64.4, 57.2, 85.6),
    },
    "facebook/opt-66b": {
        "zero-shot": _row(57.5, 67.2, 66.8, 43.3, 50.6, 48.1),
        "icl": _row(89.3, 65.3, 62.8, 52.9, 54.9, 81.3),
        "mezo": _row(92.0, 71.5, 73.8, 64.4, 57.8, 84.0),
        "lozo": _row(92.5, 74.0, 74.5, 63.5, 59.4, 85.8),
    },
}
"""Percent: accuracy, F1 for SQuAD."""

OPT_13B_MEMORY: Cells = {
    "lozo": {"rte": 27.0, "multirc": 26.9},
    "lozo-m": {"rte": 27.4, "multirc": 27.3},
    "mezo": {"rte": 27.4, "multirc": 27.3},
    "mezo-m": {"rte": 51.7, "multirc": 52.1},
    "forward-grad": {"unnamed task": 138.0},
    "ft-sgd": {"unnamed task": 161.0},
    "ft-adamw": {"unnamed task": 257.0},
    "ft-lora": {"rte": 79.0, "multirc": 102.4},
    "ft": {"rte": 250.0, "multirc": 315.2},
}
"""GB. Three rows are from another table of the slides, which names no task."""

_DECODER_RUN = {"eps": 1e-3, "batch_size": 16, "steps": 20_000, "eval_every": 4_000}
_DECODER_DATA = {"num_train": 1000, "num_dev": 500, "num_eval": 1000, "max_length": 2048}
_MASKED_RUN = {"eps": 1e-3, "batch_size": 64, "steps": 100_000, "eval_every": 10_000}
_LRS = {"lr": (1e-6, 1e-7)}
# The learning rates are those of LOZO's code, which leaves 1/r out.
_LOZO_RUN = {**_DECODER_RUN, "rank": 2, "interval": 50, "scaling": "published"}
_MASKED_LOZO_RUN = {**_MASKED_RUN, "lr": 1e-6, "rank": 4, "interval": 50, "scaling": "published"}
_SLIDES = "LOZO (ICLR 2025), slides"

TABLES = {
    t.name: t
    for t in (
        PaperTable(
            "lozo-opt",
            "LOZO and MeZO on OPT-30B and OPT-66B",
            _SLIDES,
            "%",
            OPT_TASKS,
            {
                "zero-shot": Recipe(),
                "icl": Recipe({"num_shots": 32}),
                "mezo": Recipe(_DECODER_RUN, _LRS),
                "lozo": Recipe(_LOZO_RUN, {**_LRS, "rank": (2, 1), "interval": (50, 100)}),
            },
            OPT_ACCURACY,
            _DECODER_DATA,
        ),
        PaperTable(
            "lozo-roberta",
            "LOZO, LOZO-M and MeZO on RoBERTa-large, k examples of each class",
            "LOZO (ICLR 2025), section 5 and appendix C.1; the results are plots there, not numbers",
            "%",
            ("sst2", "sst5", "snli", "mnli", "rte", "trec"),
            {
                "mezo": Recipe({**_MASKED_RUN, "lr": 1e-6}),
                "lozo": Recipe(_MASKED_LOZO_RUN),
                "lozo-m": Recipe({**_MASKED_LOZO_RUN, "momentum": 0.9}, {"momentum": (0.9, 0.7)}),
            },
            {},
            {"k_shot": 16, "num_eval": 1000},
        ),
        PaperTable(
            "subzero",
            "SubZero beside MeZO and LOZO on OPT",
            "SubZero (arXiv 2410.08989), settings; its numbers are not among this project's sources",
            "%",
            OPT_TASKS,
            {
                "mezo": Recipe(_DECODER_RUN, _LRS),
                "lozo": Recipe(_LOZO_RUN, _LRS),
                "subzero": Recipe(
                    {**_DECODER_RUN, "rank": 8, "interval": 1000}, {"lr": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3), "interval": (1000, 2000)}
                ),
            },
            {},
            _DECODER_DATA,
        ),
        PaperTable(
            "memory",
            "Peak memory of a training step on OPT-13B",
            _SLIDES,
            "GB",
            ("rte", "multirc", "unnamed task"),
            {
                "lozo": Recipe({"rank": 2}),
                "lozo-m": Recipe({"rank": 2}),
                "mezo": Recipe(),
                "mezo-m": Recipe(),
                "subzero": Recipe({"rank": 8}),
                "forward-grad": Recipe(),
                "ft-lora": Recipe(),
                "ft-sgd": Recipe(),
                "ft-adamw": Recipe(),
            },
            {"facebook/opt-13b": OPT_13B_MEMORY},
        ),
    )
}
"""The tables by name."""
