"""``python -m bench.sass report FILE``: a result as a table and as a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lozo_kernels.model.text_table import text_table

from .model import memory_bound_instructions
from .targets import TARGETS, Target

_COLUMNS = (
    "kernel",
    "target",
    "dtype",
    "rank",
    "registers",
    "spill",
    "bits",
    "instr/element",
    "in the loop",
    "budget",
    "roofline",
    "bound",
    "in flight, 0.7 us",
    "1 us",
    "reason",
)


def main(argv: Sequence[str]) -> int:
    """Prints the table of a result, and writes its picture if asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench.sass report", description=__doc__)
    parser.add_argument("file", type=Path, help="written by --output")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw to a .png or .svg file (needs matplotlib)")
    parser.add_argument("--target", default="sm_90", choices=list(TARGETS), help="of the picture (default sm_90)")
    parser.add_argument("--dtype", default="bfloat16", help="of the picture (default bfloat16)")
    options = parser.parse_args(argv)
    document = json.loads(options.file.read_text())
    if options.picture is not None:
        draw(document, options.picture, options.target, options.dtype)
    print(markdown(document) if options.markdown else table(document))
    return 0


def target_row(target: Target) -> dict[str, Any]:
    """Returns the figures that the roofline of a target was predicted from."""
    return {
        "target": target.name,
        "device": target.device,
        "figures": "reported bandwidth" if target.reported else "nominal",
        "bandwidth": target.bandwidth,
        "multiprocessors": target.multiprocessors,
        "hertz": target.hertz,
        "memory_bound_instr_16_bit": round(memory_bound_instructions(target, 4), 1),
        "memory_bound_instr_32_bit": round(memory_bound_instructions(target, 8), 1),
    }


def table(document: Mapping[str, Any]) -> str:
    """Formats the rows as plain text."""
    lines = text_table([_COLUMNS, *(_cells(row) for row in document["rows"])], left=3)
    return "\n".join([_heading(document), "", lines, *_defects(document)])


def markdown(document: Mapping[str, Any]) -> str:
    """Formats them as Markdown."""
    lines = [_heading(document), "", _line(_COLUMNS), _line(["---"] * 3 + ["--:"] * (len(_COLUMNS) - 4) + ["---"])]
    return "\n".join([*lines, *(_line(_cells(row)) for row in document["rows"]), *_defects(document)])


def _defects(document: Mapping[str, Any]) -> list[str]:
    return ["", *document["defects"]] if document["defects"] else []


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _heading(document: Mapping[str, Any]) -> str:
    found = document["versions"]
    lines = [f"triton {found['triton']}, commit {document['commit']}, {document['date']}"]
    lines += [
        f"{t['target']}: {t['device']} ({t['figures']}), memory bound below {t['memory_bound_instr_16_bit']:g} instructions "
        f"an element of 16 bits, {t['memory_bound_instr_32_bit']:g} of 32"
        for t in document["targets"]
    ]
    return "\n".join([*lines, *document["remarks"]])


def _cells(row: Mapping[str, Any]) -> list[str]:
    def text(value: object, form: str = "") -> str:
        return "-" if value is None else format(value, form)

    return [
        *(row["kernel"], row["target"], row["dtype"], text(row["rank"])),
        *(text(row["registers"]), text(row["spill_bytes"]), text(row["vector_bits"])),
        *(text(row["instr_per_element"], ".1f"), text(row["loop_instr_per_element"], ".1f")),
        *("naive" if row["naive"] else text(row["budget"], "g"), text(row["predicted_roofline"], ".2f"), text(row["bound"])),
        *(text(row["latency_fraction_700ns"], ".2f"), text(row["latency_fraction_1us"], ".2f"), row["reason"] or ""),
    ]


def draw(document: Mapping[str, Any], path: Path, target: str, dtype: str) -> None:
    """Draws the instructions per element of every kernel that moves weights, beside its budget and what memory leaves time for.

    Raises:
        ValueError: the result has no such row.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in document["rows"] if r["target"] == target and r["dtype"] == dtype and r["vector_bits"] is not None]
    if not rows:
        raise ValueError(f"no kernel for {target} moves weights of {dtype} in this result")
    rows.sort(key=lambda r: (not r["naive"], r["kernel"], r["rank"] or 0), reverse=True)
    labels = [r["kernel"] + ("" if r["rank"] is None else f", rank {r['rank']}") for r in rows]
    line = memory_bound_instructions(TARGETS[target], 2 * (4 if dtype == "float32" else 2))
    # A naive kernel may take thirty times the line: everything would be squeezed to the left.
    edge = 4 * line
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.22 * len(rows)))
    colours = ["tab:red" if r["naive"] else "tab:blue" if r["default"] else "tab:cyan" for r in rows]
    axes.barh(range(len(rows)), [min(r["instr_per_element"], edge) for r in rows], color=colours, height=0.7)
    for i, r in enumerate(rows):
        label = max(min(r["instr_per_element"], edge), r["budget"] or 0) + 0.6
        axes.text(label, i, f"{r['instr_per_element']:.1f}", va="center", fontsize=7)
        if r["budget"] is not None:
            axes.plot([r["budget"]] * 2, [i - 0.4, i + 0.4], color="black", linewidth=1.5)
    axes.axvline(line, color="tab:orange", linestyle="--")
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, edge * 1.08)
    axes.set_xlabel("instructions per element")
    axes.set_title(
        f"{TARGETS[target].device} ({target}), {dtype}. Dashed: memory bound below {line:.0f}; black: budgets; red: naive kernels",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
