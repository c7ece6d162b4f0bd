"""Steps whose length does not depend on the scale of the loss: c is divided by a number that says how large c is.

"spread" divides by the standard deviation of c over the directions of a step (FZOO, arXiv 2506.09034: with one-sided directions it
is that of the losses, since they share F(0)). "scalar" divides by the root of a running mean of c^2, one number for all weights
(MEAZO, arXiv 2605.03869), whose start is corrected as Adam's is. Both follow from c alone, so that a journal of c replays them.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMALISE = ("spread", "scalar")
BETA = 0.99
"""The factor by which the running mean of c^2 keeps what it was."""


def no_moment(device: torch.device | str = "cpu") -> Tensor:
    """A running mean before the first step: (2,) fp64, the sum of beta-weighted c^2 and the sum of the weights."""
    return torch.zeros(2, dtype=torch.float64, device=device)


def normalised(kind: str, c: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Divides c, and takes it into the running mean. Sums have an order, so that every device gives the same bits.

    Args:
        kind: one of :data:`NORMALISE`.
        c: (directions,) fp64; moment: as :func:`no_moment` makes it.

    Returns:
        c divided (zero where all of c is zero), and the new running mean.
    """
    count = torch.full((), len(c), dtype=torch.float64, device=c.device)
    if kind == "spread":
        away = c - _sum(c) / count
        scale = torch.sqrt(_sum(away * away) / (count - 1))
    else:
        square = torch.stack((_sum(c * c) / count, torch.ones_like(count)))
        moment = moment * BETA + square * (1 - BETA)
        scale = torch.sqrt(moment[0] / moment[1])
    return torch.where(scale == 0, torch.zeros_like(c), c / scale), moment


def _sum(values: Tensor) -> Tensor:
    total, *rest = values.unbind()
    for value in rest:
        total = total + value
    return total
