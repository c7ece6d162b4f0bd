"""Tables of text: columns for a terminal, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], *, left: int = 1, gap: int = 2) -> str:
    """Columns with spaces between them, each as wide as its widest cell.

    Args:
        rows: with the header, all of one length.
        left: columns aligned to the left; the ones after them hold numbers and are aligned to the right.
        gap: spaces between two columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join((" " * gap).join(_aligned(row, widths, left)).rstrip() for row in rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table of Markdown.

    Args:
        header: its first line.
        rows: the others, as long as the header.
        left: columns aligned to the left; the ones after them hold numbers and are aligned to the right.
    """
    rule = "|" + "|".join("---" if i < left else "---:" for i in range(len(header))) + "|"
    return "\n".join([_markdown_row(header), rule, *map(_markdown_row, rows)])


def number(value: float | None, spec: str, unit: str = "") -> str:
    """A number in a format of :func:`format`, and its unit; a dash for None and for NaN."""
    return "-" if value is None or value != value else format(value, spec) + unit


def mebibytes(value: float | None, spec: str = ".1f", unit: str = "") -> str:
    """Bytes as a number of MiB, in a format of :func:`format`, and the unit as it is written; a dash for None."""
    return number(None if value is None else value / 2**20, spec, unit)


def _aligned(row: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    return [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]


def _markdown_row(cells: Sequence[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"
