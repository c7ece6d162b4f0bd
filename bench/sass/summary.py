"""``python -m bench.sass summary NEWEST OLDEST``: the table of docs/gpu.md, from the results of two versions of Triton."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lozo_kernels.model.text_table import markdown_table

_TARGET, _DTYPE = "sm_90", "bfloat16"
_PASSES = (
    ("LOZO, rank 1 to 8", "lowrank_update", (1, 8)),
    ("LOZO, rank 16 and 32", "lowrank_update", (16, 32)),
    ("LOZO, rank 64", "lowrank_update", (64, 64)),
    ("LOZO, two draws, rank 1 to 8", "lowrank_update_2", (1, 8)),
    ("LOZO, rounded stochastically, rank 1 to 8", "lowrank_update_stochastic", (1, 8)),
    ("LOZO-M or a merge, rank 1 to 4", "lowrank_merge_0", (1, 4)),
    ("LOZO-M or a merge, rank 8", "lowrank_merge_0", (8, 8)),
    ("LOZO-M or a merge, rank 16", "lowrank_merge_0", (16, 16)),
    ("LOZO-M or a merge, rank 32", "lowrank_merge_0", (32, 32)),
    ("LOZO-M or a merge, rank 64", "lowrank_merge_0", (64, 64)),
    ("probed weight, rank 1 to 4", "lowrank_merge", (1, 4)),
    ("probed weight, rank 8", "lowrank_merge", (8, 8)),
    ("probed weight, rank 16", "lowrank_merge", (16, 16)),
    ("probed weight, rounded stochastically, rank 4", "lowrank_merge_stochastic", (4, 4)),
    ("MeZO", "dense_update", None),
    ("MeZO, two draws", "dense_update_2", None),
    ("MeZO, rounded stochastically", "dense_update_stochastic", None),
    ("MeZO with momentum", "dense_momentum", None),
)


def main(argv: Sequence[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.sass summary", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by --output, one for each version of Triton")
    print(summary([json.loads(path.read_text()) for path in parser.parse_args(argv).files]))
    return 0


def summary(documents: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table in Markdown. A cell has the worst of its ranks, for each document in turn."""
    versions = " / ".join(document["versions"]["triton"] for document in documents)
    header = (
        f"{_TARGET}, bf16, one pass (Triton {versions})",
        *(
            "instructions per element",
            "share, by instructions",
            "share, reads in flight at 0.7 us",
            "at 1 us",
            "why less than 0.95",
        ),
    )
    lines = []
    for label, kernel, ranks in _PASSES:
        found = [_rows(document, kernel, ranks) for document in documents]
        if not all(found):
            continue
        reasons = dict.fromkeys(row["reason"] for rows in found for row in rows if row["reason"])
        lines.append(
            (
                label,
                _cell(found, "instr_per_element", max, ".1f"),
                _cell(found, "predicted_roofline", min, ".2f"),
                _cell(found, "latency_fraction_700ns", min, ".2f"),
                _cell(found, "latency_fraction_1us", min, ".2f"),
                "; ".join(reasons),
            )
        )
    return markdown_table(header, lines)


def _rows(document: Mapping[str, Any], kernel: str, ranks: tuple[int, int] | None) -> list[Mapping[str, Any]]:
    chosen = (r for r in document["rows"] if (r["target"], r["dtype"], r["kernel"]) == (_TARGET, _DTYPE, kernel))
    return [r for r in chosen if ranks is None or ranks[0] <= r["rank"] <= ranks[1]]


def _cell(found: Sequence[Sequence[Mapping[str, Any]]], name: str, worst: Callable[..., float], form: str) -> str:
    values = [format(worst(row[name] for row in rows), form) for rows in found]
    return values[0] if len(set(values)) == 1 else " / ".join(values)
