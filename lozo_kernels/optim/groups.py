"""The parameter groups of an optimiser, and their settings in the form that a step takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.checks import check_number
from ..model.config import OPTIONS
from ..model.handle import Handle
from .steps import Rates, StepSettings

OF_ALL_GROUPS = frozenset((*(field.name for field in dataclasses.fields(StepSettings)), *OPTIONS))
"""The settings that no group has of its own."""

Groups = Sequence[Mapping[str, Any]]
"""The ``param_groups`` of an optimiser, which have "params", "param_names", "lr" and "weight_decay" each."""


def groups_of(handle: Handle, params: Iterable[Any] | None, lr: float | Tensor, dense_share: float) -> list[Any]:
    """Returns groups as torch takes them; without ``params``, one group of all parameters.
    Raises TypeError or ValueError if ``params`` are not parameters or groups of them.

    Args:
        lr: of groups that have none.
        dense_share: what multiplies it for parameters with dense directions, for which such groups are divided.
    """
    groups = _groups_of(handle, params)
    return groups if dense_share == 1.0 else [part for group in groups for part in _divided(handle, group, lr * dense_share)]


def _divided(handle: Handle, group: Any, dense_lr: float | Tensor) -> list[Any]:
    """A group without a learning rate of its own as one for low-rank parameters, which has none either, and one for the others."""
    if not isinstance(group, dict) or "lr" in group or not isinstance(group.get("params"), Iterable):
        return [group]
    dense = {id(p) for p, known in zip(handle.parameters, handle.trained, strict=True) if not known.low_rank}
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    parts: tuple[list[Any], list[Any]] = ([], [])
    for p in params:
        parts[id(p[1] if isinstance(p, tuple) else p) in dense].append(p)
    found = [group | {"params": parts[0]}, group | {"params": parts[1], "lr": dense_lr}]
    return [part for part in found if part["params"]] or [group]


def _groups_of(handle: Handle, params: Iterable[Any] | None) -> list[Any]:
    if params is None:
        return [{"params": handle.parameters}]
    if not isinstance(params, Iterable):
        raise TypeError(f"params are parameters or groups of them, not {params!r:.200}")
    groups = [params] if isinstance(params, Tensor) else list(params)
    if not groups:
        raise ValueError("params is empty; leave it out to train everything that the handle trains")
    return groups if isinstance(groups[0], dict) else [{"params": groups}]


def named_group(handle: Handle, group: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a group with the handle's names for its parameters.
    Raises TypeError or ValueError if it is not a group, or has parameters that the handle does not train."""
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"a parameter group is a dict with 'params', not {group!r:.200}")
    shared = next((name for name in group if name in OF_ALL_GROUPS), None)
    if shared is not None:
        raise ValueError(f"{shared} is the same for all parameter groups, which have lr and weight_decay: give it to the optimiser")
    known = {id(p): name for name, p in zip(handle.names, handle.parameters, strict=True)}
    params = group["params"]
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
    check_settings(group, defaults)
    return group | {"params": [(known[id(p)], p) for p in params]}


def check_cover(groups: Groups, handle: Handle) -> None:
    """Raises ValueError if groups leave a trained parameter out, or decay one that cannot decay."""
    grouped = {name for group in groups for name in group["param_names"]}
    missing = [name for name in handle.names if name not in grouped]
    if missing:
        raise ValueError(
            f"the handle trains {len(missing)} parameters that are in no group, e.g. {missing[0]!r}; "
            "exclude them in patch() or add them to a group"
        )
    undecaying = set(handle.undecaying)
    for group in groups:
        stuck = next((name for name in group["param_names"] if name in undecaying), None)
        if stuck is not None and _decays(group):
            raise ValueError(f"{stuck!r} cannot decay: it is quantised, or keep_factors was asked for; use weight_decay=0")


def check_settings(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError if ``lr`` or ``weight_decay`` is out of range, or their product is above 1."""
    settings = [group.get(name, defaults[name]) for name in ("lr", "weight_decay")]
    for name, value in zip(("lr", "weight_decay"), settings, strict=True):
        check_number(name, value, low=0.0)
    settings = [value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value for value in settings]
    if not any(isinstance(value, Tensor) for value in settings) and settings[0] * settings[1] > 1.0:
        raise ValueError(f"lr * weight_decay is {settings[0] * settings[1]:g}: above 1 every step turns the weights' sign")


def trained_names(groups: Groups, handle: Handle) -> list[list[str]]:
    """The trained parameters' names of each group. A driven model's own parameter is left out: it is no state of the run."""
    known = set(handle.names)
    return [[name for name in group["param_names"] if name in known] for group in groups]


def rates_of(groups: Groups, handle: Handle, device: torch.device) -> Rates:
    """The learning rates and weight decays of groups, for each of the handle's names if there are several groups.
    Raises ValueError if a scheduler put a momentum into a group, where it would have no effect."""
    for group in groups:
        if "momentum" in group:
            raise ValueError(
                f"a scheduler asks for momentum={group['momentum']}, and momentum stays the same during a run: tell it to leave "
                "the momentum alone (cycle_momentum=False of OneCycleLR and CyclicLR)"
            )
    decaying = any(map(_decays, groups))
    lr = _per_parameter("lr", groups, handle, device)
    return Rates(lr, _per_parameter("weight_decay", groups, handle, device) if decaying else 0.0)


def _decays(group: Mapping[str, Any]) -> bool:
    return isinstance(group["weight_decay"], Tensor) or group["weight_decay"] != 0.0


def _per_parameter(key: str, groups: Groups, handle: Handle, device: torch.device) -> Tensor:
    values = [g[key] for g in groups]
    if len(values) == 1 and not isinstance(values[0], Tensor):
        return torch.full((), values[0], dtype=torch.float64, device=device)
    owner = {name: i for i, group in enumerate(groups) for name in group["param_names"]}
    index = [owner[name] for name in handle.names]
    if any(isinstance(value, Tensor) for value in values):
        tensors = [torch.as_tensor(v, dtype=torch.float64, device="cpu").to(device, non_blocking=True) for v in values]
        return torch.stack([tensors[i] for i in index])
    numbers = torch.tensor([values[i] for i in index], dtype=torch.float64, device="cpu", pin_memory=device.type == "cuda")
    return numbers.to(device, non_blocking=True)
