"""The arguments of one call of an op as types: draws, rounding, a call over a table, a call on the activations of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from .table import TensorTable

Step = int | Tensor
"""A step: a number, or a 0-dim int64 tensor on the table's device, which the host never reads (a captured graph advances it)."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which noise a call adds: the step of U or Z, and the index of the direction within that step."""

    step: Step
    direction: int = 0


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of one pass: the step, and the index of this pass among the stochastically rounded passes of the step."""

    step: Step
    index: int = 0


@dataclasses.dataclass(slots=True)
class TableCall:
    """One call of an op over a table, as backends receive it: checked, its tensors contiguous fp32 on the table's device.

    Attributes:
        seed: 64-bit seed of the run.
        draws: as many as the op's row in :data:`~.op_table.OPS` allows.
        scales: (draws, tensors); of an op with signs (parts, tensors).
        decay: (tensors,), or None for 1.
        rounding: None rounds to nearest even.
        coefficients, alpha, beta: (draws, tensors), (tensors,) and (tensors,) if the op updates momentum, else None.
        out: the table that a merge writes, which can be the table itself; None for other ops.
        law: of dense noise, one of :data:`~.noise.LAWS`; "normal" for ops whose noise is U.
    """

    seed: int
    draws: Sequence[Draw]
    scales: Tensor
    decay: Tensor | None = None
    rounding: Rounding | None = None
    coefficients: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    out: TensorTable | None = None
    law: str = "normal"

    @property
    def signs(self) -> bool:
        """Whether dense noise is signs and not Z."""
        return self.law == "rademacher"


@dataclasses.dataclass(slots=True)  # not frozen: that would double the time to make one, which happens after every layer
class LayerCall:
    """One product of activations with a weight's factors, added to the outputs of the layer; see ``skinny.py``.

    The tokens are equal blocks (groups), one for each row of ``draws``: evaluations that share a forward pass. All tensors are on
    one device, 2-d ones have unit column stride, and those of the factors are contiguous.

    Attributes:
        y: (tokens, outputs), any weight dtype; changed in place.
        x: (tokens, inputs), any weight dtype; for an embedding (tokens,) int64 or int32 indices of rows.
        v: (rank, cols) fp16, V transposed.
        b: (rows, rank) fp32.
        seed, tensor_id, row_offset: the place of U in the noise.
        draws: (groups, 2) int64: step and direction.
        scales: (groups,) fp32: the factor of a group is B + scale * U.
        transposed: the layer computes X W instead of X W^T.
        gain: (1,) fp32 by which y is multiplied first, or None.
        shift: (groups, outputs) fp32 that is added last, or None.
    """

    y: Tensor
    x: Tensor
    v: Tensor
    b: Tensor
    seed: int
    tensor_id: int
    row_offset: int
    draws: Tensor
    scales: Tensor
    transposed: bool = False
    gain: Tensor | None = None
    shift: Tensor | None = None


@dataclasses.dataclass(slots=True)
class PointsCall:
    """One product of activations at several points with a weight's factors; see ``skinny.lowrank_points_``.

    All tensors are on one device, y and x have unit column stride, and the others are contiguous.

    Attributes:
        y: (tokens, outputs), any weight dtype; changed in place.
        x: (tokens, inputs), any weight dtype.
        v: (ranks, cols) fp32, V transposed.
        b: (ranks, rows) fp32, B transposed.
        u: (count, r, rows) fp32, U of each direction transposed, or None.
        directions: (tokens,) int64, not read without u.
        scales: (tokens,) fp32, not read without u.
        transposed: the layer computes X W instead of X W^T.
        gain: (1,) fp32 by which y is multiplied first, or None.
    """

    y: Tensor
    x: Tensor
    v: Tensor
    b: Tensor
    u: Tensor | None
    directions: Tensor
    scales: Tensor
    transposed: bool = False
    gain: Tensor | None = None
