"""Checks one loss both ways: a probe must give the loss of a model whose weights really are perturbed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ...sharding import mean_square
from ..members import Member

Unit = list[Member]
"""Parameters that are checked together: a layer's weight and bias."""

_TOLERANCES = {torch.float32: (1e-3, 1e-5), torch.float16: (0.1, 0.005), torch.bfloat16: (0.2, 0.03)}


@dataclasses.dataclass(frozen=True)
class Losses:
    """The losses of the unperturbed model, of the probed one, and of the one whose weights are perturbed."""

    rest: float
    probed: float
    materialised: float

    def agree(self, dtype: torch.dtype, noise: float = 0.0) -> bool:
        """Whether the last two agree, within what rounding in a dtype can do to the shift of the loss.

        Args:
            noise: by how much losses at the same weights differ.
        """
        relative, absolute = _TOLERANCES[dtype]
        shift = abs(self.materialised - self.rest)
        difference = abs(self.probed - self.materialised)
        both_undefined = not math.isfinite(self.probed) and not math.isfinite(self.materialised)
        return both_undefined or difference <= relative * shift + absolute * (1e-3 + abs(self.rest)) + noise

    def moved(self, noise: float = 0.0) -> bool:
        """Whether the perturbation changed the loss to another finite number. Otherwise it proves nothing that losses agree."""
        return math.isfinite(self.materialised) and abs(self.materialised - self.rest) > noise


class Doubts:
    """The parameters whose sides no check has proved yet.

    While nothing is proved, every step checks once; a part of the model that does not change the loss is checked less and less
    often.

    Attributes:
        members: the parameters.
        scale: multiplies the perturbation of a check. It shrinks when losses overflow.
        proved: some members were proved, so that losses can change.
    """

    def __init__(self) -> None:
        self.members: set[Member] = set()
        self.scale = 1.0
        self.proved = False
        self._pause = self._wait = 0

    def due(self) -> bool:
        """Whether this step should check. Called once in each step."""
        if not self.members:
            return False
        self._wait -= 1
        return self._wait < 0

    def add(self, members: Iterable[Member]) -> None:
        """Doubts some members from now on."""
        self.members.update(members)
        self._pause = self._wait = 0

    def clear(self, members: Iterable[Member]) -> None:
        """Some members were proved."""
        self.members.difference_update(members)
        self.proved = True

    def put_off(self) -> None:
        """After a check that left doubts."""
        if self.proved:
            self._pause = 2 * self._pause + 1
        self._wait = self._pause

    @property
    def notes(self) -> list[str]:
        """What a report says of them."""
        if not self.members:
            return []
        name = min(self.members, key=lambda m: m.index).name
        return [
            f"not verified yet: the probe of {len(self.members)} parameters (e.g. {name}), because no loss so far was finite and "
            "changed with them; later steps try again"
        ]


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The coarsest of the dtypes that a model computes with."""
    return max(set(dtypes) & set(_TOLERANCES), key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def typical_scale(members: Sequence[Member], rank: int) -> float:
    """The scale of a perturbation a fourth as large as the weights, so that rounding cannot hide its effect.

    It is the same for every process; with weights in blocks this is a collective.
    """
    sizes = [_size(m) for m in members if m.parameter.low_rank and m.storage.always_here and m.numel]
    known = sorted(size for size in sizes if size > 0)
    size = known[len(known) // 2] if known else 1e-2
    return 0.25 * size / rank**0.5


def _size(member: Member) -> float:
    p = member.parameter.tensor
    return mean_square(p) ** 0.5 if member.storage.in_blocks else float(p.detach().flatten()[:1024].float().square().mean().sqrt())


def units_of(members: Sequence[Member]) -> list[Unit]:
    """Groups members into units that can be probed alone."""
    units: dict[object, Unit] = {}
    for member in members:
        if member.side in ("activation", "shift"):
            units.setdefault(member.owners[0].module, []).append(member)
        elif member.side in ("scratch", "copy"):
            units.setdefault(member, []).append(member)
    return list(units.values())


def find_wrong(units: Sequence[Unit], wrong: Callable[[Sequence[Unit]], bool]) -> list[Unit]:
    """Returns the units that differ alone, given that all together do; empty if none does alone."""
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
    """While the body runs, only the members of the units are perturbed."""
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
    """Perturbs the weights themselves while the body runs, and then restores every bit.

    They stay in their own storage, because code that kept an address of it must see the same.
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
