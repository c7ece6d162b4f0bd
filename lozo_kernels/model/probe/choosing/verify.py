"""One loss both ways: a probe must give what a model gives whose weights really are perturbed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ...sharding import mean_square
from ..members import Member

Unit = list[Member]
"""Parameters that are treated together: a layer's weight and bias."""

_TOLERANCES = {torch.float32: (1e-3, 1e-5), torch.float16: (0.1, 0.005), torch.bfloat16: (0.2, 0.03)}


@dataclasses.dataclass(frozen=True)
class Losses:
    """Of the model at rest, of the probed one, and of the one with perturbed weights."""

    rest: float
    probed: float
    materialised: float

    def agree(self, dtype: torch.dtype) -> bool:
        """Within what rounding in a dtype can do, against the shift of the loss."""
        relative, absolute = _TOLERANCES[dtype]
        shift = abs(self.materialised - self.rest)
        difference = abs(self.probed - self.materialised)
        both_undefined = self.probed != self.probed and self.materialised != self.materialised
        return both_undefined or difference <= relative * shift + absolute * (1e-3 + abs(self.rest))


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one with the fewest bits, of those that a model computes with."""
    return max(set(dtypes) & set(_TOLERANCES), key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def typical_scale(members: Sequence[Member], rank: int) -> float:
    """A perturbation of a fourth of the size of the weights, so that rounding cannot hide what it does.

    The same for every process; with weights in blocks a collective.
    """
    sizes = [_size(m) for m in members if m.parameter.low_rank and m.storage.always_here and m.numel]
    known = sorted(size for size in sizes if size > 0)
    size = known[len(known) // 2] if known else 1e-2
    return 0.25 * size / rank**0.5


def _size(member: Member) -> float:
    p = member.parameter.tensor
    return mean_square(p) ** 0.5 if member.storage.in_blocks else float(p.detach().flatten()[:1024].float().square().mean().sqrt())


def units_of(members: Sequence[Member]) -> list[Unit]:
    """Members grouped so that each group can be probed alone."""
    units: dict[object, Unit] = {}
    for member in members:
        if member.side in ("activation", "shift"):
            units.setdefault(member.owners[0].module, []).append(member)
        elif member.side in ("scratch", "copy"):
            units.setdefault(member, []).append(member)
    return list(units.values())


def find_wrong(units: Sequence[Unit], wrong: Callable[[Sequence[Unit]], bool]) -> list[Unit]:
    """The units that differ by themselves, given that all together do; empty if none does alone."""
    found: list[Unit] = []
    stack = [list(units)]
    while stack:
        part = stack.pop()
        if len(part) == 1:
            found.append(part[0])
            continue
        half = len(part) // 2
        stack += [p for p in (part[:half], part[half:]) if wrong(p)]
    return found


@contextlib.contextmanager
def only_enabled(members: Sequence[Member], units: Sequence[Unit]) -> Iterator[None]:
    """Perturbs the members of the units alone."""
    chosen = {member for unit in units for member in unit}
    for member in members:
        member.enabled = member in chosen
    try:
        yield
    finally:
        for member in members:
            member.enabled = True


@contextlib.contextmanager
def materialised(units: Sequence[Unit], write: Callable[[Member, Tensor], None]) -> Iterator[None]:
    """Perturbs the weights themselves, for as long as the body runs, and puts every bit back.

    In their own storage: whoever kept an address of it must see the same.
    """
    rest = []
    try:
        for unit in units:
            for member in unit:
                p = member.storage.present()[0].data
                rest.append((p, p.clone()))
                write(member, p)
        yield
    finally:
        for p, before in rest:
            p.copy_(before)
