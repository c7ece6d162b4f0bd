"""How large a reproduction is: a table of scales, and what the user asked of one."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable

import torch

from ...errors import InputError
from ..methods import METHODS
from ..settings import DTYPES
from .results import TABLES, PaperTable

PAPER = "paper"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a reproduction is.

    Attributes:
        meaning: what its numbers are good for.
        steps, batch_size: of the accuracy tables; None: the paper's.
        eval_size: dev examples at most.
        interval: between draws of V at most, so that short runs have several.
        architecture: of the memory table: a name of the benchmarks' models, with random weights.
        length: tokens of its batch of one sequence. MeZO's paper measures at 400, the mean length of MultiRC.
    """

    name: str
    meaning: str
    steps: int | None = None
    batch_size: int | None = None
    eval_size: int = 500
    interval: int | None = None
    architecture: str | None = None
    length: int = 400


SCALES = {
    s.name: s
    for s in (
        Scale("tiny", "shows that everything runs; its scores mean nothing", 4, 4, 16, 2, "opt-tiny", 64),
        Scale("small", "methods beside each other on this machine, not comparable with a paper", 600, 16, 500, 50, "opt-125m"),
        Scale(PAPER, "the paper's settings"),
    )
}
"""By name."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to reproduce, and how.

    Attributes:
        table: a name of :data:`~lozo_kernels.hf.papers.results.TABLES`.
        scale: a name of :data:`SCALES`; None: paper with a model, otherwise small.
        model: name on the Hub or a folder; for the memory table also an architecture of the benchmarks. None: the scale's.
        methods, tasks: some of the table's, in the order to measure; None: all, or the embedded task without a model.
        data_dir: as :class:`~lozo_kernels.hf.settings.Settings`.
        grid: search the paper's grid by the score on dev examples.
        steps: of every run; None: the scale's.
        dtype: None: float32, or on a GPU at the paper's scale float16 for methods without backward, as the papers do it.
        device, threads, seed: as the settings.
        output: folder for results; None: runs/reproduce-<table>.
        quiet: no progress on stderr.
    """

    table: str
    scale: str | None = None
    model: str | None = None
    methods: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    data_dir: str | None = None
    grid: bool = False
    steps: int | None = None
    dtype: str | None = None
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    output: str | None = None
    quiet: bool = False

    @property
    def size(self) -> Scale:
        """The scale."""
        return SCALES[self.scale or (PAPER if self.model else "small")]

    @property
    def paper(self) -> PaperTable:
        """The table."""
        return TABLES[self.table]

    def check(self) -> None:
        """Raises InputError if something is unknown or does not fit."""
        named: list[tuple[str, str | None, Iterable[str]]] = [
            ("--table", self.table, TABLES),
            ("--scale", self.scale, SCALES),
            ("--dtype", self.dtype, DTYPES),
        ]
        named += [("--methods", method, METHODS) for method in self.methods or ()]
        for option, value, known in named:
            if value is not None and value not in known:
                raise InputError(f"{option} {value!r} is not known; there are {', '.join(known)}")
        if self.table == "memory" and (self.tasks or self.data_dir or self.grid or self.steps is not None):
            raise InputError("--table memory measures steps on random tokens: leave out --tasks, --data-dir, --grid and --steps")
        if self.methods == () or self.tasks == ():
            raise InputError(f"--{'methods' if self.methods == () else 'tasks'} names none: leave it out for the table's")
        if self.scale == PAPER and not self.model:
            raise InputError("--scale paper needs --model, such as facebook/opt-13b: the papers' models are not in this package")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--steps is at least 1, not {self.steps}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads is at least 1, not {self.threads}")

    def chosen_methods(self) -> list[str]:
        """The methods to measure, in order."""
        return list(self.methods or self.paper.recipes)

    def chosen_dtype(self, method: str, device: torch.device) -> str:
        """Of the weights, for a method."""
        if self.dtype is not None:
            return self.dtype
        half = self.size.name == PAPER and device.type == "cuda" and METHODS[method].kind != "first-order"
        return "float16" if half else "float32"

    def say(self, message: str) -> None:
        """A line for someone who waits."""
        if not self.quiet:
            print(message, file=sys.stderr, flush=True)
