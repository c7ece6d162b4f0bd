"""The methods whose steps are measured: those of this library with their placements, and the published code of each."""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..optim.methods import LOZO, MeZO
from ..optim.optimizer import ZerothOrderOptimizer
from .arguments import add_choice
from .published import PublishedStep

EPS, LR, BETA, INTERVAL = 1e-3, 1e-7, 0.9, 50

METHODS = {"lozo": "lozo", "lozo-fused": "lozo", "lozo-m": "lozo-m", "mezo": "mezo"}
"""This library's methods, and the published one beside each."""

PLACEMENTS: dict[str, dict[str, Any]] = {
    "inplace": {},
    "probe": {"placement": "probe"},
    "probe-activation": {"placement": "probe", "side": "activation"},
    "probe-scratch": {"placement": "probe", "side": "scratch"},
    "batched": {"placement": "probe", "evaluation": "batched"},
}
"""Where a perturbation goes, and what an optimiser is given for it."""

CAPTURED = "captured"
"""Weights are moved in place, by a step that is captured as one CUDA graph (``capture_step``). Not an optimiser's own placement."""

_MOMENTUM = ("lozo-m", "mezo-m")


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A method of this library in one placement."""

    method: str
    placement: str = "inplace"

    def __str__(self) -> str:
        return self.method if self.placement == "inplace" else f"{self.method} {self.placement}"

    @property
    def probing(self) -> bool:
        """Whether its weights are only read."""
        return self.placement not in ("inplace", CAPTURED)

    @property
    def captured(self) -> bool:
        """Whether its step is one CUDA graph."""
        return self.placement == CAPTURED

    @property
    def batched(self) -> bool:
        """Whether its evaluations share a forward pass."""
        return self.placement == "batched"

    @property
    def sensible(self) -> bool:
        """Whether the method makes sense in the placement. Published code moves weights. Fused steps save a pass
        that a probe does not make. Dense noise has no factors, so that a probe has only the weight side, which gains nothing from a
        shared forward pass."""
        if not self.probing:
            return True
        if self.method.startswith("published ") or self.method == "lozo-fused":
            return False
        return not self.method.startswith("mezo") or self.placement == "probe"


def entrants(methods: Sequence[str], placements: Sequence[str]) -> list[Entrant]:
    """Lists every method in every placement that makes sense for it."""
    return [e for m in methods for e in (Entrant(m, p) for p in placements) if e.sensible]


def add_placement(parser: argparse.ArgumentParser, default: Sequence[str], choices: Sequence[str] = tuple(PLACEMENTS)) -> None:
    """Adds the option for the placements to measure."""
    text = f"of {', '.join(choices)}, where they make sense for a method (default: {','.join(default)})"
    add_choice(parser, "placement", choices, list(default), text)


def make_optimizer(method: str, model: nn.Module, rank: int, placement: str = "inplace") -> ZerothOrderOptimizer:
    """Makes this library's optimiser for a method."""
    momentum = BETA if method in _MOMENTUM else 0.0
    placed = PLACEMENTS.get(placement, {})
    if method.startswith("mezo"):
        return MeZO(model, lr=LR, eps=EPS, momentum=momentum, **placed)
    return LOZO(
        model,
        lr=LR,
        eps=EPS,
        momentum=momentum,
        fuse_steps=method == "lozo-fused",
        rank=rank,
        interval=INTERVAL,
        **placed,
    )


def make_published(method: str, model: nn.Module, rank: int) -> PublishedStep:
    """Makes the published code of a method."""
    return PublishedStep(
        model,
        low_rank=not method.startswith("mezo"),
        rank=rank,
        interval=INTERVAL,
        lr=LR,
        eps=EPS,
        momentum=BETA if method in _MOMENTUM else 0.0,
        weight_decay=0.0,
        seed=0,
    )


def treatment(optimizer: ZerothOrderOptimizer) -> dict[str, Any]:
    """Describes a probe: how many parameters it has on each side, and what its check found. Empty without one."""
    handle = optimizer.handle
    if handle.moves_weights:
        return {}
    sides = collections.Counter(p.side for p in handle.report().parameters if p.side is not None)
    return {"sides": dict(sides), "notes": list(handle.notes)}
