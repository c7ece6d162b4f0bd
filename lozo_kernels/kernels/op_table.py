"""Every op over a table of tensors, described once.

From a row follow the checks of its arguments (``ops.py``), its torch operator with schema and fake (``torch_ops.py``), the
reference and the loop of the eager backend, and the names under which backends find their kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from torch import Tensor

from .table import TensorTable

MAX_DRAWS = 2
"""Draws that one pass over the weights can add."""


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """What one op takes and changes.

    Attributes:
        name: of the function in ``ops.py``. Without the last underscore it is the name of the function in ``reference.py`` and
            of the kernels.
        v: the table has V, and the noise is U V^T; otherwise it has none, and the noise is Z.
        n: what the op wants of ``table.n``: "none", "optional" or "needed".
        momentum: it takes ``coefficients``, ``alpha`` and ``beta``, and writes ``table.n``.
        factors: the tensors are factors themselves, fp32, whose noise is U.
        draws: the least and the most draws that it takes.
        rounding: it can round stochastically.
        out: it writes the weights of another table, if one is given, and only reads its own.
    """

    name: str
    v: bool = False
    n: str = "none"
    momentum: bool = False
    factors: bool = False
    draws: tuple[int, int] = (1, MAX_DRAWS)
    rounding: bool = True
    out: bool = False

    @functools.cached_property
    def kernel(self) -> str:
        """The name of its kernels."""
        return self.name.removesuffix("_")

    @functools.cached_property
    def along_rows(self) -> bool:
        """Whether the noise is U, a row of it for each row of a weight, and not Z, which has an element for each element."""
        return self.v or self.factors

    @property
    def lists(self) -> dict[str, str]:
        """The lists of tensors that its torch operator takes, in order, with their types in a schema."""
        lists = {"out": "Tensor(a!)[]", "x": "Tensor[]"} if self.out else {"x": "Tensor(a!)[]"}
        if self.v:
            lists["v"] = "Tensor[]"
        if self.n != "none":
            lists["n"] = "Tensor(b!)[]" if self.momentum else "Tensor[]"
        return lists

    def written(self, table: TensorTable, out: TensorTable | None) -> Sequence[Tensor]:
        """The tensors that a call changes."""
        x = table.x if out is None else out.x
        return (*x, *(table.n or ())) if self.momentum else x


OPS = {
    op.name: op
    for op in (
        Op("lowrank_update_", v=True),
        Op("dense_update_"),
        Op("lowrank_momentum_", v=True, n="needed", momentum=True),
        Op("dense_momentum_", n="needed", momentum=True),
        Op("factor_update_", factors=True, rounding=False),
        Op("lowrank_merge_", v=True, n="needed", draws=(0, 1), out=True),
        Op("dense_merge_", n="optional", draws=(0, 1), out=True),
    )
}
"""By name. Besides, there are ``resample_`` and ``factor``, which only make noise, and the ops on activations (``skinny.py``)."""
