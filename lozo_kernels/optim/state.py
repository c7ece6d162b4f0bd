"""What an optimiser saves, so that a run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.noise import MAX_DRAW, NOISE_VERSION
from ..model.handle import Handle
from ..model.momentum import check_saved
from ..model.probe import ProbeHandle
from .groups import GroupedOptimizer, check_settings
from .steps import StepLog


class ResumableOptimizer(GroupedOptimizer):
    """``state_dict()`` and ``load_state_dict()`` of :class:`~lozo_kernels.optim.optimizer.ZerothOrderOptimizer`."""

    eps: float
    momentum: float
    directions: int
    two_sided: bool
    fuse_steps: bool
    evaluation: str
    journal: StepLog | None
    _step: int
    _skipped_total: Tensor
    _skipped_in_a_row: Tensor

    def flush(self) -> None:
        """Makes an update that is pending."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs besides the weights to go on bit for bit, keyed by parameter name.

        A pending update is made first. V is not stored: it follows from seed and step. Momentum of shards is in DTensors, which
        ``torch.distributed.checkpoint`` saves, and loads into any other sharding.
        """
        self.flush()
        self.handle.settle()
        groups = [
            {k: v for k, v in group.items() if k not in ("params", "param_names")} | {"params": names}
            for group, names in zip(self.param_groups, self._trained_names(), strict=True)
        ]
        return {
            "noise_version": NOISE_VERSION,
            "patch": self.handle.config.to_dict(),
            "settings": self._settings(),
            "step": self._step,
            "window": self.handle.window,
            "skipped": [int(self._skipped_total), int(self._skipped_in_a_row)],
            "state": {name: {"momentum": value} for name, value in self.handle.momentum_state.items()},
            "past": self.handle.past if isinstance(self.handle, ProbeHandle) else {},
            "history": [(w, dict(bs)) for w, bs in self.handle.history] if isinstance(self.handle, ProbeHandle) else [],
            "param_groups": groups,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: it is not a whole state, or was saved under other settings, noise or parameters; nothing was changed.
            RuntimeError: the optimiser has a journal; nothing was changed.
        """
        check_state(state_dict, self.handle, self.defaults, type(self).__name__)
        if self.journal is not None and state_dict["step"] != self._step:
            raise RuntimeError("the optimiser has a journal, which cannot say how it came to another state: close() it first")
        mine = {"noise_version": NOISE_VERSION, "patch": self.handle.config.to_dict(), "settings": self._settings()}
        for key, value in mine.items():
            saved = state_dict.get(key)
            if saved != value:
                what = key
                if isinstance(saved, dict) and isinstance(value, dict):
                    what = ", ".join(k for k in value if saved.get(k) != value[k]) or key
                raise ValueError(f"the state was saved under other settings; differing: {what} (saved {saved}, now {value})")
        saved_groups = state_dict["param_groups"]
        if self._trained_names() != [list(g["params"]) for g in saved_groups]:
            raise ValueError("the state was saved with other parameter groups")
        check_learned(state_dict, self.handle)
        self.flush()
        if isinstance(self.handle, ProbeHandle):
            self.handle.load_past(state_dict["past"])
            self.handle.history = [(w, dict(bs)) for w, bs in state_dict["history"]]
        if self.momentum:
            self.handle.load_momentum({name: s["momentum"] for name, s in state_dict["state"].items()}, state_dict["window"])
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            group.update({k: v for k, v in saved_group.items() if k != "params"})
        self._step = state_dict["step"]
        total, in_a_row = state_dict["skipped"]
        self._skipped_total, self._skipped_in_a_row = torch.tensor(total), torch.tensor(in_a_row)

    def _trained_names(self) -> list[list[str]]:
        """Of each group, without the parameter that a driven model hangs its loss on: how a run is driven is not its state."""
        known = set(self.handle.names)
        return [[name for name in group["param_names"] if name in known] for group in self.param_groups]

    def _settings(self) -> dict[str, Any]:
        return {
            "eps": self.eps,
            "momentum": self.momentum,
            "directions": self.directions,
            "two_sided": self.two_sided,
            "fuse_steps": self.fuse_steps,
            "evaluation": self.evaluation,
        }


_NEEDED = ("noise_version", "patch", "settings", "step", "window", "skipped", "state", "param_groups")


def check_state(state: Any, handle: Handle, defaults: Iterable[str], kind: str) -> None:
    """Raises ValueError, naming what is missing or no such thing, unless a state has all that an optimiser takes from it,
    and numbers where it has numbers.

    Args:
        defaults: the settings that every parameter group has.
        kind: of the optimiser, for messages.
    """
    if not isinstance(state, dict):
        raise ValueError(f"a state of a {kind} is a dict, not {state!r:.200}")
    probing = isinstance(handle, ProbeHandle)
    missing = [key for key in (*_NEEDED, *(("past", "history") if probing else ())) if key not in state]
    if not missing:
        groups = state["param_groups"]
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise _not("param_groups", "a list of dicts", groups)
        missing = [f"{key} in its param_groups" for key in ("params", *defaults) if any(key not in g for g in groups)]
    if missing:
        raise ValueError(f"this is not all of what state_dict() of a {kind} returned: it has no {missing[0]}")
    _check_numbers(state)
    for group in groups:
        if not isinstance(group["params"], (list, tuple)):
            raise _not("params", "a list of names", group["params"])
        try:
            check_settings(group, group)
        except (TypeError, ValueError) as e:
            raise ValueError(f"the state has a parameter group that cannot be: {e}") from None


def check_learned(state: dict[str, Any], handle: Handle) -> None:
    """Raises ValueError unless the momentum and the factors of a state fit a handle with the settings of the state."""
    _check_momentum(state["state"], handle)
    if isinstance(handle, ProbeHandle):
        _check_factors(state, handle)


def _not(what: str, wanted: str, found: Any) -> ValueError:
    return ValueError(f"the state's {what} is {wanted}, not {found!r:.200}")


def _is_count(value: Any, bound: int = 1 << 63) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < bound


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta" and value.layout == torch.strided and not value.is_complex()


def _check_numbers(state: dict[str, Any]) -> None:
    if not _is_count(state["step"], MAX_DRAW):
        raise _not("step", "an integer of at least 0", state["step"])
    if state["window"] is not None and not _is_count(state["window"], MAX_DRAW):
        raise _not("window", "an integer of at least 0, or None", state["window"])
    skipped = state["skipped"]
    if not isinstance(skipped, (list, tuple)) or len(skipped) != 2 or not all(map(_is_count, skipped)):
        raise _not("skipped", "two integers of at least 0", skipped)


def _check_momentum(saved: Any, handle: Handle) -> None:
    if not isinstance(saved, Mapping) or not all(isinstance(s, Mapping) for s in saved.values()):
        raise _not("state", "a dict for each name", saved)
    slots = {slot.name: slot for slot in handle._slots}
    for name, own in handle.momentum.items():
        if "momentum" not in saved.get(name, {}):
            raise ValueError(f"the state has no momentum of {name!r}: it is not all of what state_dict() returned")
        n = saved[name]["momentum"]
        if not _is_tensor(n):
            raise _not(f"momentum of {name!r}", "a tensor", n)
        check_saved(slots[name], n, own, handle.state_in_pieces)
    other = sorted(set(saved).difference(handle.momentum)) if handle.momentum else []
    if other:
        raise ValueError(f"the saved momentum is of other parameters; differing: {', '.join(map(repr, other[:5]))}")


def _check_factors(state: dict[str, Any], handle: ProbeHandle) -> None:
    past, history = state["past"], state["history"]
    rows = past.values() if isinstance(past, dict) else [None]
    if not all(
        isinstance(s, dict) and s.keys() >= {"b", "v", "window"} and all(_is_tensor(s[k]) and s[k].dim() == 2 for k in "bv")
        and _is_count(s["window"]) for s in rows
    ):  # fmt: skip
        raise _not("past", "factors b and v and a window for each name", past)
    good = isinstance(history, (list, tuple)) and all(isinstance(row, (list, tuple)) and len(row) == 2 for row in history)
    good = good and all(_is_count(window) and isinstance(kept, dict) for window, kept in history)
    if not good or not all(
        name in handle.names and _is_tensor(b) and b.dim() == 3 for _, kept in history for name, b in kept.items()
    ):
        raise _not("history", "windows, each with factors by name", history)
