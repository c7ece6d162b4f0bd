"""Describes the sides of a probe, and sets them in a run that is resumed or replayed and cannot learn them from a closure."""

from __future__ import annotations

from typing import Any

import torch

from ..storage import layer_kind
from .forward.probed import ProbedModel

_SIDES = ("activation", "shift", "scratch", "copy", "inplace")
_PRECISIONS = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def describe_sides(probed: ProbedModel, precision: torch.dtype) -> dict[str, Any]:
    """Returns how every parameter is treated, as plain JSON.

    Args:
        precision: the coarsest dtype that evaluations compute with.

    Returns:
        "sides": for each parameter in the order of ``Handle.names`` its side, the names of the modules during whose forward it is
        swapped in (None: the one that holds it), and the position of its layer's weight; "precision".
    """
    names = {module: name for name, module in probed.model.named_modules()}
    rows = []
    for member in probed.members:
        scopes = [names[m] for m in member.scopes]
        own = [member.owners[0].path]
        layer = None if member.layer_weight is None else member.layer_weight.index
        rows.append([member.side, None if scopes == own else scopes, layer])
    return {"sides": rows, "precision": str(precision).removeprefix("torch.")}


def set_sides(probed: ProbedModel, described: dict[str, Any], *, evaluate: bool) -> torch.dtype:
    """Sets the sides that :func:`describe_sides` returned, and returns the precision.

    Args:
        evaluate: the model will be evaluated too. Otherwise only updates are made, and memory for perturbed weights is saved.

    Raises:
        ValueError: it does not fit the model; nothing was changed.
    """
    modules = dict(probed.model.named_modules())
    members, rows = probed.members, described["sides"]
    if len(rows) != len(members):
        raise ValueError(f"sides of {len(rows)} parameters for a model that trains {len(members)}")
    for member, (side, scopes, _) in zip(members, rows, strict=True):
        lost = next((name for name in scopes or () if name not in modules), None)
        if side not in _SIDES or lost is not None:
            raise ValueError(f"{member.name!r} cannot be on the side {side!r}" + (f" of the module {lost!r}" if lost else ""))
        if side == "activation" and any(layer_kind(owner) is None for owner in member.owners):
            raise ValueError(f"{member.name!r} cannot be on the activation side here")
    for member, (side, scopes, layer) in zip(members, rows, strict=True):
        member.side = side if evaluate or side == "inplace" else None
        member.reason = "as recorded"
        member.scopes = [member.owners[0].module] if scopes is None else [modules[name] for name in scopes]
        member.layer_weight = None if layer is None else members[layer]
    return _PRECISIONS.get(described["precision"], torch.float32)
