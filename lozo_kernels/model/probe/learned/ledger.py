"""What becomes of learned factors: merged into weights, kept where there is no weight to merge into, remembered if asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....kernels.calls import Rounding
from ...config import PatchConfig
from ..members import Member, Past
from .factors import StateGroup


class Ledger:
    """Merges the factors of a probe's members.

    Attributes:
        history: with ``keep_factors``, (window, merged B by name) of every window so far, on the CPU.
    """

    def __init__(self, members: Sequence[Member], config: PatchConfig) -> None:
        self._members, self._config = members, config
        self.history: list[tuple[int, dict[str, Tensor]]] = []

    def merge(self, group: StateGroup, window: int, rounding: Rounding | None) -> None:
        """X <- gain * X + B V^T for all of a group, and B <- 0."""
        near = [m for m in group.members if m.storage.always_here]
        if near:
            group.merge(near, [m.storage.shard() for m in near], rounding)
            self._begin_anew(near, window)
        for member in group.members:  # a disk may be full: each is done with before the next is begun
            if not member.storage.always_here:
                self._merge_away(group, member, window, rounding)
                self._begin_anew([member], window)

    def _merge_away(self, group: StateGroup, member: Member, window: int, rounding: Rounding | None) -> None:
        """A weight that is not here all the time is brought here and back; where none can take up the factors, they are kept."""
        if member.storage.mergeable:
            with member.storage.borrowed(member.device) as shard:
                if shard.x.numel():
                    group.merge([member], [shard], rounding)
            return
        assert member.b is not None and member.v is not None
        b, v = member.b[0].clone(), member.v[0].float()
        if member.past is None:
            member.past = Past(b, v, window)
        else:
            member.past.add(b, v, window)

    def _begin_anew(self, members: Sequence[Member], window: int) -> None:
        """After a merge: B is zero, and what it was is remembered if that was asked for."""
        for member in members:
            assert member.b is not None
            if self._config.keep_factors and member.v is not None and member.past is None:
                self._remember(member.name, member.b, window)
            member.b.zero_()
            if member.gain is not None:
                member.gain.fill_(1.0)  # a view of the group's
                member.gain = None

    def _remember(self, name: str, b: Tensor, window: int) -> None:
        if not self.history or self.history[-1][0] != window:
            self.history.append((window, {}))
        kept = self.history[-1][1]
        kept[name] = kept[name] + b.cpu() if name in kept else b.cpu().clone()

    @property
    def undecaying(self) -> list[str]:
        """Names of parameters that cannot decay: quantised ones, and with ``keep_factors`` all low-rank ones."""
        low_rank = [m for m in self._members if m.parameter.low_rank]
        return [m.name for m in low_rank if self._config.keep_factors or not m.storage.mergeable]

    def check_decay(self) -> None:
        """Raises RuntimeError if a parameter has decayed whose factors are kept, because they cannot say that."""
        names = set(self.undecaying)
        gains = {m.name: m.gain for m in self._members if m.gain is not None and m.name in names}
        decayed = next((name for name, gain in gains.items() if float(gain) != 1.0), None)
        if decayed is not None:
            raise RuntimeError(
                f"{decayed!r} cannot decay: it is quantised, or keep_factors was asked for; use weight_decay=0 for it"
            )

    @property
    def past(self) -> dict[str, dict[str, Any]]:
        """See :attr:`ProbeHandle.past`."""
        return {m.name: dataclasses.asdict(m.past) for m in self._members if m.past is not None}

    def check_past(self, past: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises ValueError if it is of other layers or shapes."""
        quantised = self._unmergeable_members()
        for name, saved in past.items():
            shape = None if name not in quantised else quantised[name].extent
            if shape is None or (saved["b"].shape[0], saved["v"].shape[1]) != shape[1:] or saved["b"].shape[1] != len(saved["v"]):
                raise ValueError(f"what {name!r} learned does not fit a quantised layer of this model")

    def load_past(self, past: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes over what was checked."""
        for name, member in self._unmergeable_members().items():
            member.past = None
            if name in past:
                member.past = Past(past[name]["b"].clone(), past[name]["v"].clone(), past[name]["window"])
                member.past.to(member.device)

    def unmergeable(self, learned: bool) -> list[str]:
        """Names of quantised layers that learned something. ``learned``: there were updates since the last merge."""
        some = [m for m in self._unmergeable_members().values() if m.b is not None]
        return [m.name for m in some if m.past is not None or (learned and bool(m.b.any()))]  # type: ignore[union-attr]

    def _unmergeable_members(self) -> dict[str, Member]:
        return {m.name: m for m in self._members if not m.storage.mergeable}
