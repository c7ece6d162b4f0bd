"""How large a reproduction is: a table of scales, and what the user asked of one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ...bench.document import progress
from ...errors import InputError
from ...kernels.checks import MAX_THREADS
from ..command_line import check_options, option
from ..methods import METHODS
from ..settings import DTYPES, spell_dtype
from .results import TABLES, PaperTable

PAPER = "paper"
Row = dict[str, Any]
"""One measurement, as results.json holds it."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a reproduction is.

    Attributes:
        meaning: what its numbers are good for.
        steps, batch_size: those of the tables of scores; None: the paper's.
        eval_size: dev examples at most.
        interval: between draws of V at most, so that short runs have several.
        architecture: the model of the memory table, with random weights: a name of the benchmarks' models.
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
"""The scales by name."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What ``lozo-kernels reproduce`` is to reproduce, and how; its ``--help`` says what each field means."""

    table: str = option(choices=tuple(TABLES))
    scale: str | None = option(None, f"{', '.join(SCALES)} (default: {PAPER} with --model, otherwise small)", choices=tuple(SCALES))
    model: str | None = option(None, "name on the Hub or a folder (default: a small one, as the scale says)")
    trust_remote_code: bool = option(False, "run Python code that comes with the model: only if you have read it")
    methods: tuple[str, ...] | None = option(
        None, f"separated by commas, of {', '.join(METHODS)} (default: the table's)", choices=tuple(METHODS)
    )
    tasks: tuple[str, ...] | None = option(None, "separated by commas (default: the table's; the embedded one without a model)")
    data_dir: str | None = option(None, "folder of TASK.train.jsonl and so on (default: the Hub)")
    grid: bool = option(False, "search the paper's grid by the score on dev examples")
    steps: int | None = option(None, "of every run (default: the scale's)", low=1)
    dtype: str | None = option(
        None, f"{', '.join(DTYPES)} (default: float32; without backward float16 on a GPU at scale {PAPER})", choices=DTYPES
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    threads: int | None = option(None, "on the CPU (default: torch's)", low=1, high=MAX_THREADS)
    seed: int = option(0, low=0, high=2**63 - 1)
    output: str | None = option(
        None, "folder for results.json, table.md, runs and plots (default: runs/reproduce-TABLE, or with -2, ... if one is there)"
    )
    overwrite: bool = option(False, "replace what is in --output")
    quiet: bool = option(False, "no progress on stderr")

    def __post_init__(self) -> None:
        spell_dtype(self)

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
        check_options(self)
        if self.table == "memory" and (self.tasks or self.data_dir or self.grid or self.steps is not None):
            raise InputError("--table memory measures steps on random tokens: leave out --tasks, --data-dir, --grid and --steps")
        if self.methods == () or self.tasks == ():
            raise InputError(f"--{'methods' if self.methods == () else 'tasks'} names none: leave it out for the table's")
        if self.scale == PAPER and not self.model:
            raise InputError("--scale paper needs --model, such as facebook/opt-13b: the papers' models are not in this package")

    def chosen_dtype(self, method: str, device: torch.device) -> str:
        """The dtype of the weights for a method. At the paper's scale on a GPU, methods without backward have float16, as there."""
        if self.dtype is not None:
            return self.dtype
        half = self.size.name == PAPER and device.type == "cuda" and METHODS[method].kind != "first-order"
        return "float16" if half else "float32"

    def say(self, message: str) -> None:
        if not self.quiet:
            progress(message)
