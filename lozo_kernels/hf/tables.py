"""Tables on a terminal."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

from ..errors import require


def table(rows: Sequence[Sequence[str]], *, left: int = 1, folded: bool = False) -> str:
    """A table, with emphasis where a terminal shows it.

    Args:
        rows: with the header, all of one length.
        left: columns aligned to the left; the ones after them hold numbers and are aligned to the right.
        folded: cells are divided into lines where the terminal is narrow; otherwise lines are as long as they are.
    """
    rich = require("rich.table")
    shown = rich.Table(box=None, pad_edge=False, padding=(0, 4, 0, 0), header_style="bold")
    for i, name in enumerate(rows[0]):
        shown.add_column(name, justify="left" if i < left else "right", no_wrap=not folded or i == 0, overflow="fold")
    for row in rows[1:]:
        shown.add_row(*row)
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((120, 0)).columns if folded else 1000
    console = require("rich.console").Console(
        file=io.StringIO(), width=width, force_terminal=terminal, markup=False, highlight=False, emoji=False
    )
    console.print(shown)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip("\n").splitlines())
