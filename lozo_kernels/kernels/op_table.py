"""What describes an op over a table of tensors.

``ops.py`` gives each op its :class:`Op`, its signature and its documentation. From these follow the checks of the arguments
(``ops.py``), the torch operator with its schema (``torch_ops.py``), the loop of the eager backend, and the names under which the
other backends find their kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from torch import Tensor

from .table import TensorTable

MAX_DRAWS = 2
"""The most draws that one call of an op can add."""
MAX_PARTS = 256
"""The most parts of a batch whose directions one call of an op can add."""


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """What one op takes and what it changes.

    Attributes:
        name: the function in ``ops.py``. Without the last underscore it is the function in ``reference.py`` and the kernels' name.
        v: the table has V, and the noise is U V^T. Otherwise it has no V, and the noise is Z (or U, see ``factors``).
        n: whether the op reads ``table.n``: "none", "optional" or "needed".
        signed: the scales are those of the parts of a batch, whose signs give U V^T as many directions.
        momentum: the op takes ``coefficients``, ``alpha`` and ``beta``, and updates ``table.n``.
        factors: the tensors of the table are factors themselves, in fp32, and their noise is U.
        draws: the least and the largest number of draws.
        rounding: the op can round stochastically.
        out: the op can write the weights of another table; then it only reads its own.
        summed: the op has no kernel of its own: ``summed.py`` makes it of one on factors and a merge.
    """

    name: str
    v: bool = False
    n: str = "none"
    signed: bool = False
    momentum: bool = False
    factors: bool = False
    draws: tuple[int, int] = (1, MAX_DRAWS)
    rounding: bool = True
    out: bool = False
    summed: bool = False

    @functools.cached_property
    def kernel(self) -> str:
        """The name of its kernels and of its function in ``reference.py``."""
        return self.name.removesuffix("_")

    @functools.cached_property
    def along_rows(self) -> bool:
        """Whether the noise is U, with one row for each row of a weight, and not Z, with one value for each element."""
        return self.v or self.factors

    @property
    def overloads(self) -> tuple[str, ...]:
        """The overloads of its torch operator: "law", where it takes the law of its noise, beside the default."""
        return ("default",) if self.along_rows else ("default", "law")

    @property
    def lists(self) -> dict[str, str]:
        """The lists of tensors that its torch operator takes, in order, each with its type in the schema."""
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


OPS: dict[str, Op] = {}
"""The ops by name, as ``ops.py`` describes them. ``resample_`` and ``factor``, which only make noise, and the ops on activations
(``skinny.py``) are not among them."""
