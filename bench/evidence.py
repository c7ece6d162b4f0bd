"""What the scripts of this folder share: where a result goes, and what it says of the machine and of the command that made it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lozo_kernels.bench.document import dumps
from lozo_kernels.bench.environment import environment

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "bench" / "results"
CPU = torch.device("cpu")


def result_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Makes a parser with ``--output``, which is ``bench/results/NAME`` unless another file is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / name, help=f"(default: bench/results/{name})")
    return parser


def made_by(module: str, argv: Sequence[str], device: torch.device = CPU) -> dict[str, Any]:
    """Begins a result that ``python -m MODULE ARGV`` measures: machine, versions, commit, command and date."""
    return environment(device, argv, program=("python", "-m", module))


def write_result(document: dict[str, Any], path: Path) -> None:
    """Writes a result as JSON with one line for each entry of a list."""
    path.write_text(dumps(document) + "\n", encoding="utf-8")
