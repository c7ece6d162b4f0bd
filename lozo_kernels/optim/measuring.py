"""A step that measures for ``lr="auto"``: the evaluations of any step, and F(0) and F(-) if it would not make them, in parts.

The parts have independent noise: halves of a batch, micro-batches, or the examples of each process. Processes tell each other what
they saw, so that all find the same rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..model.conditions import Conditions
from ..model.handle import Perturbation
from ..model.losses import Closure, mean_totals, part_losses
from .parallel import Parallel
from .rate_finder import Measured, measure
from .steps import StepSettings


class Moving(Protocol):
    """What evaluates here needs of a :class:`~lozo_kernels.optim.stepper.Stepper`."""

    settings: StepSettings
    parallel: Parallel | None

    def flush(self) -> bool: ...
    def enter(self) -> None: ...
    def move(self, target: Perturbation | None) -> None: ...
    def is_mine(self, direction: int) -> bool: ...


def evaluate_parts(
    stepper: Moving, closures: Sequence[Closure], conditions: Conditions
) -> tuple[list[Tensor], list[Tensor], list[Measured]]:
    """Evaluates at the points of a step, which are left at the last one.

    Returns:
        F(+) and F(-) (or F(0)) of the directions of this process, as the stepper's other evaluations return them; and what every
        direction of all processes showed.
    """
    parallel, eps = stepper.parallel, stepper.settings.eps
    of_ranks = has_parts(parallel)
    evaluate = mean_totals if of_ranks else part_losses
    stepper.flush()
    stepper.enter()
    rest = evaluate(closures, conditions)
    seen: list[tuple[Tensor, ...]] = []
    for d in range(stepper.settings.directions):
        sides = []
        for scale in (eps, -eps):  # every process moves along every direction: moves round the weights
            stepper.move((d, scale))
            if stepper.is_mine(d):
                sides.append(evaluate(closures, conditions))
        if sides:
            seen.append((rest, *sides))
    if parallel is not None and of_ranks:
        totals = torch.stack([rest, *(side for row in seen for side in row[1:])])
        losses = parallel.share(totals[:, 0] / totals[:, 1])  # (ranks, 1 + 2 * directions)
        found = [measure(losses[:, 0], losses[:, i], losses[:, i + 1], eps=eps) for i in range(1, losses.shape[1], 2)]
    else:
        found = [measure(*row, eps=eps) for row in seen]
    if parallel is not None and parallel.mode == "directions":
        found = _of_all_directions(parallel, found, stepper.settings.directions)
    if not of_ranks:
        seen = [tuple(_whole(losses, totals=parallel is not None) for losses in row) for row in seen]
    return [row[1] for row in seen], [row[2 if stepper.settings.two_sided else 0] for row in seen], found


def measure_split(sides: Sequence[Tensor], parallel: Parallel | None, *, eps: float) -> list[Measured]:
    """What every direction showed on the part of the batch that is its own, with ``evaluation="split"``.

    Args:
        sides: of F(+), F(-) and F(0) the losses of both halves of each part, (2 * directions,); with ``parallel`` each as (sum,
            weight), of this process's examples.
    """
    losses = torch.stack([*sides])
    if parallel is not None:
        losses = parallel.share((losses[..., 0] / losses[..., 1]).flatten())
    halves = losses.view(-1, 3, sides[0].shape[0] // 2, 2)  # of processes, sides, directions
    plus, minus, rest = (side.transpose(0, 1).flatten(1) for side in halves.unbind(1))
    return [measure(*one, eps=eps) for one in zip(rest, plus, minus, strict=True)]


def has_parts(parallel: Parallel | None) -> bool:
    """Whether the processes of a step are its parts, so that nobody has to cut a batch."""
    return parallel is not None and parallel.mode == "examples" and parallel.size > 1


def _whole(losses: Tensor, *, totals: bool) -> Tensor:
    """The mean of the parts' losses; with ``totals`` as (sum, weight)."""
    mean = losses.mean()
    return torch.stack((mean, torch.ones_like(mean))) if totals else mean


def _of_all_directions(parallel: Parallel, mine: Sequence[Measured], directions: int) -> list[Measured]:
    """What every direction showed, in their order, from what those of each process did."""
    rows = torch.zeros(-(-directions // parallel.size), len(Measured._fields), dtype=torch.float64, device="cpu")
    rows[: len(mine)] = torch.tensor(mine, dtype=torch.float64, device="cpu")
    every = parallel.share(rows.flatten()).view(parallel.size, *rows.shape)
    return [Measured(*row) for rank in range(parallel.size) for row in every[rank, : parallel.count_of(rank, directions)].tolist()]
