"""What a measurement of memory finds, on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

Closure = Callable[[], Tensor]
Step = Callable[[Closure], object]

STEPS = 2
"""Steps that are measured: the second of a fused optimiser makes the pass that it owes."""


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Memory of steps, in bytes, beyond what was there before the optimiser was made.

    Attributes:
        weights: the trained parameters.
        forward: peak of a forward pass of the same closure without an optimiser.
        persistent: still alive after the steps: V, N, tables.
        extra: the larger of the peak outside the forward passes and the peak inside them less ``forward``. It includes
            ``persistent``; activations can't hide temporaries of the passes over the weights, because they are not alive then.
        resident: growth of the resident set at its peak, beyond that of the forward passes: what torch's allocator does not see,
            such as scratch of native code, is in it, and so is noise of the process. None where the system does not tell.
        first_step: as ``extra``, of the first step of a probe, which prepares: it makes perturbed weights to check itself by. It
            is not in the others. None without a probe.
        factor, scratch, copy: of a probe, what it holds of them: factors B, V and N and what vectors have learned; memory that
            modules share for perturbed weights; perturbed weights with memory of their own.
    """

    weights: int
    forward: int
    persistent: int
    extra: int
    resident: int | None
    forward_peak: int | None = None
    peak: int | None = None
    forward_reserved: int | None = None
    reserved: int | None = None
    first_step: int | None = None
    factor: int | None = None
    scratch: int | None = None
    copy: int | None = None

    @property
    def share(self) -> float:
        """``extra`` as a share of the weights."""
        return self.extra / self.weights


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch or of a library below it says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in ("out of memory", "ALLOC_FAILED"))
