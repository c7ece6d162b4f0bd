"""What the papers report and the settings they report it under: ``papers.json``, for ``lozo-kernels reproduce``.

Sources: LOZO is Chen et al., ICLR 2025 (its authors' slides carry both tables of numbers below); MeZO is Malladi et al., NeurIPS
2023; SubZero is Yu et al., 2024. A figure that is not given as a number in these is left out, never read off a plot.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    grid: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


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


def _read(path: Path) -> dict[str, PaperTable]:
    return {row["name"]: _table(**row) for row in json.loads(path.read_text(encoding="utf-8"))}


def _table(*, columns: list[str], recipes: dict[str, Any], published: dict[str, Cells] | None = None, **values: Any) -> PaperTable:
    known = {method: Recipe(**recipe) for method, recipe in recipes.items()}
    return PaperTable(columns=tuple(columns), recipes=known, published=published or {}, **values)


TABLES = _read(Path(__file__).parent / "papers.json")
"""The tables by name. Percent are accuracy, and F1 for SQuAD. The learning rates are those of LOZO's code, which leaves 1/r out.
Three rows of the memory are from another table of the slides, which names no task."""
