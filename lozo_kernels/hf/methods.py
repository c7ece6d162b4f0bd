"""The training methods by name."""

from __future__ import annotations

import dataclasses

from ..optim import LOZO, MeZO, ZerothOrderOptimizer


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of the command line.

    Attributes:
        optimizer: its class.
        low_rank: directions are U V^T, and so rank, interval and scaling apply.
        momentum: default of beta, 0 for a method without.
    """

    name: str
    optimizer: type[ZerothOrderOptimizer]
    low_rank: bool
    momentum: float


METHODS = {
    m.name: m
    for m in (
        Method("lozo", LOZO, low_rank=True, momentum=0.0),
        Method("lozo-m", LOZO, low_rank=True, momentum=0.9),
        Method("mezo", MeZO, low_rank=False, momentum=0.0),
        Method("mezo-m", MeZO, low_rank=False, momentum=0.9),
    )
}
