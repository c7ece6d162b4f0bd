"""How the elements of a parameter are seen as matrices, whole or in shards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor

from ..kernels.table import stride_problem


@dataclasses.dataclass(frozen=True)
class Shard:
    """What this process has of a parameter, all of it or some rows or columns, as an entry of a table.

    Attributes:
        x: (batch, rows, cols), a view of storage.
        row_offset, col_offset, global_cols: as in :class:`~lozo_kernels.TensorTable`.
        first_matrix: which of the parameter's matrices is the first here.
    """

    x: Tensor
    row_offset: int
    col_offset: int
    global_cols: int
    first_matrix: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """The matrices that one parameter is seen as.

    Attributes:
        name: of the parameter, for messages.
        low_rank: its directions have factors; otherwise every element has noise of its own.
        form: "matrix", "experts" (one matrix each), "rows" (first dimension by the rest, as for convolutions), "square" (see
            :func:`most_square`) or "flat".
    """

    name: str
    low_rank: bool
    form: str

    def extent(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(batch, rows, cols) of a parameter of this shape; of a contiguous one where the form is "flat"."""
        if self.form == "flat":
            return 1, 1, math.prod(shape)
        if self.form == "rows":
            return 1, shape[0], math.prod(shape[1:])
        if self.form == "square":
            return 1, *most_square(math.prod(shape))
        return (1, shape[0], shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])

    def matrices(self, p: Tensor) -> Tensor:
        """A tensor of the parameter's shape as (batch, rows, cols), a view.

        Raises:
            ValueError: its strides do not allow it.
        """
        if self.form == "flat":
            if p.is_contiguous():
                return p.view(1, 1, -1)
            if p.dim() == 1:  # every element a row: the flat index is the row
                return p.view(1, -1, 1)
        if self.form == "square" and p.is_contiguous():
            return p.view(1, *most_square(p.numel()))
        if self.form == "rows":
            try:
                return p.view(1, p.shape[0], math.prod(p.shape[1:]))
            except RuntimeError:
                raise self._bad_strides(p, "its columns must be contiguous") from None
        if p.dim() == 3 and self.form != "square":
            return p
        if p.dim() == 2 and self.form != "square":
            return p.unsqueeze(0)
        raise self._bad_strides(p, "it must be contiguous")

    def whole(self, p: Tensor) -> Shard:
        """All of a tensor of the parameter's shape, which the ops can change in place.

        Raises:
            ValueError: its strides do not allow that.
        """
        x = self.matrices(p)
        problem = stride_problem(x)
        if problem is not None:
            raise self._bad_strides(p, problem)
        return Shard(x, 0, 0, x.shape[2])

    def cut(self, local: Tensor, offsets: Sequence[int], shape: Sequence[int]) -> Shard:
        """A block of a parameter, which begins at ``offsets`` in the parameter's ``shape``.

        Raises:
            ValueError: the block's strides do not allow changing it in place.
        """
        first_matrix = 0
        if self.form == "experts":
            x, row, col, width, first_matrix = local, offsets[0] * shape[1], 0, shape[2], offsets[0]
        elif len(shape) < 2:
            x, row, col, width = local.reshape(1, 1, -1), 0, sum(offsets), math.prod(shape)
        elif len(shape) == 2:
            x, row, col, width = local.unsqueeze(0), offsets[0], offsets[1], shape[1]
        else:  # rows of a convolution, or of any tensor that gets dense noise
            width = math.prod(shape[1:])
            x, row, col = local.reshape(1, len(local), width), offsets[0], 0
        problem = stride_problem(x)
        if problem is not None or (x.numel() and x.data_ptr() != local.data_ptr()):
            raise self._bad_strides(local, problem or "it must be contiguous")
        return Shard(x, row, col, width, first_matrix)

    def _bad_strides(self, p: Tensor, problem: str) -> ValueError:
        return ValueError(
            f"parameter {self.name!r} has shape {tuple(p.shape)} and strides {p.stride()}: {problem}; "
            "make it contiguous (param.data = param.data.contiguous()) or exclude it"
        )


def most_square(numel: int) -> tuple[int, int]:
    """Rows and columns of the most nearly square matrix of so many elements, not more rows than columns."""
    rows = next((r for r in range(math.isqrt(numel), 0, -1) if numel % r == 0), 1)
    return rows, numel // rows
