"""Parameter groups of an optimiser, which has them by the names that the handle trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.checks import check_number
from ..model.handle import Handle
from ..model.probe import ProbeHandle
from .steps import StepInputs


class GroupedOptimizer(torch.optim.Optimizer):
    """Groups that cover what a handle trains, and their settings as the handle's passes take them."""

    handle: Handle
    _inputs: StepInputs | None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, for parameters that the handle trains."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"a parameter group is a dict with 'params', not {param_group!r:.200}")
        param_group = dict(param_group)
        known = {id(p): name for name, p in zip(self.handle.names, self.handle.parameters, strict=True)}
        params = param_group["params"]
        if not isinstance(params, Iterable):
            raise TypeError(f"params are parameters, not {params!r:.200}")
        params = [params] if isinstance(params, Tensor) else list(params)
        params = [p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in params]
        if not params:
            raise ValueError("a parameter group is empty; leave it out")
        for p in params:
            if not isinstance(p, Tensor):
                raise TypeError(f"a parameter group has parameters, not {p!r:.200}")
            if id(p) not in known:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} in the groups is not trained by the handle "
                    "(requires_grad=False, excluded, or of another model)"
                )
        check_settings(param_group, self.defaults)
        param_group["params"] = [(known[id(p)], p) for p in params]
        super().add_param_group(param_group)

    def _check_cover(self) -> None:
        grouped = {name for group in self.param_groups for name in group["param_names"]}
        missing = [name for name in self.handle.names if name not in grouped]
        if missing:
            raise ValueError(
                f"the handle trains {len(missing)} parameters that are in no group, e.g. {missing[0]!r}; "
                "exclude them in patch() or add them to a group"
            )
        if isinstance(self.handle, ProbeHandle):
            undecaying = set(self.handle.undecaying)
            for group in self.param_groups:
                stuck = next((name for name in group["param_names"] if name in undecaying), None)
                if stuck is not None and (isinstance(group["weight_decay"], Tensor) or group["weight_decay"]):
                    raise ValueError(f"{stuck!r} cannot decay: it is quantised, or keep_factors was asked for; use weight_decay=0")

    @property
    def _decays(self) -> bool:
        return any(isinstance(g["weight_decay"], Tensor) or g["weight_decay"] != 0.0 for g in self.param_groups)

    def _per_parameter(self, key: str, device: torch.device) -> Tensor:
        """A setting of the groups in fp64: 0-dim if there is one group, else (parameters,) in the order of the handle's names."""
        if self._inputs is not None:
            return self._inputs.settings[key]
        groups = [g[key] for g in self.param_groups]
        if len(groups) == 1 and not isinstance(groups[0], Tensor):
            return torch.full((), groups[0], dtype=torch.float64, device=device)
        owner = {name: i for i, group in enumerate(self.param_groups) for name in group["param_names"]}
        index = [owner[name] for name in self.handle.names]
        if any(isinstance(value, Tensor) for value in groups):
            values = [torch.as_tensor(v, dtype=torch.float64).to(device, non_blocking=True) for v in groups]
            return torch.stack([values[i] for i in index])
        return torch.tensor([groups[i] for i in index], dtype=torch.float64, pin_memory=device.type == "cuda").to(
            device, non_blocking=True
        )


def check_settings(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for an ``lr`` or ``weight_decay`` that is out of range, or two that do not fit each other."""
    settings = [group.get(name, defaults[name]) for name in ("lr", "weight_decay")]
    for name, value in zip(("lr", "weight_decay"), settings, strict=True):
        check_number(name, value, low=0.0)
    settings = [value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value for value in settings]
    if not any(isinstance(value, Tensor) for value in settings) and settings[0] * settings[1] > 1.0:
        raise ValueError(f"lr * weight_decay is {settings[0] * settings[1]:g}: above 1 every step turns the weights' sign")


def groups_of(handle: Handle, params: Iterable[Any] | None) -> list[Any]:
    """Groups as torch takes them: one of all parameters where none were given."""
    if params is None:
        return [{"params": handle.parameters}]
    if not isinstance(params, Iterable):
        raise TypeError(f"params are parameters or groups of them, not {params!r:.200}")
    groups = [params] if isinstance(params, Tensor) else list(params)
    if not groups:
        raise ValueError("params is empty; leave it out to train everything that the handle trains")
    return groups if isinstance(groups[0], dict) else [{"params": groups}]
