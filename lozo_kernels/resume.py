"""What an optimiser saves, so that a run goes on bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .grouping import GroupedOptimizer
from .noise import NOISE_VERSION
from .probe import ProbeHandle
from .saved_state import check_learned, check_state
from .steps import StepLog


class ResumableOptimizer(GroupedOptimizer):
    """``state_dict()`` and ``load_state_dict()`` of :class:`~lozo_kernels.optim.ZerothOrderOptimizer`."""

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
