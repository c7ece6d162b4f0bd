"""What one call of an op is told: draws, scalars, rounding, and the activations that a layer's call changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from .table import TensorTable

Step = int | Tensor
"""A step: a number, or a 0-dim int64 tensor on the table's device, which is not read on the host (a captured graph advances it)."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which noise: the step of U or Z, and the index among the directions of that step."""

    step: Step
    direction: int = 0


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of one pass: the step, and the index of the pass among those of the step that round so."""

    step: Step
    index: int = 0


@dataclasses.dataclass(slots=True)
class TableCall:
    """One pass over a table, as backends take it: checked, its tensors contiguous fp32 on the table's device.

    Attributes:
        seed: 64-bit seed of the run.
        draws: as many as the op's description (:mod:`.op_table`) allows.
        scales: (draws, tensors).
        decay: (tensors,), or None for 1.
        rounding: None for to nearest even.
        coefficients: (draws, tensors), of an op that updates momentum; alpha, beta: (tensors,), likewise.
        out: of an op that writes to another table: that table, or the table itself.
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


@dataclasses.dataclass(slots=True)  # not frozen, which would double the time of making one after every layer
class LayerCall:
    """A product of activations with a weight's factors, added to the outputs of the weight at rest; see ``skinny.py``.

    The tokens are equal blocks, one for each row of ``draws``: evaluations that share a forward pass. Tensors are on one device,
    2-d ones have unit column stride, those of the factors are contiguous.

    Attributes:
        y: (tokens, outputs), any weight dtype; changed in place.
        x: (tokens, inputs), any weight dtype; or for an embedding (tokens,) int64 or int32 rows.
        v: (rank, cols) fp16, V transposed.
        b: (rows, rank) fp32.
        seed, tensor_id, row_offset: where U is in the noise.
        draws: (groups, 2) int64: step and direction.
        scales: (groups,) fp32: a group's factor is B + scale * U.
        transposed: X W instead of X W^T.
        gain: (1,) fp32 that multiplies y first, or None.
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
