"""What training keeps beside the weights, from the shapes of the parameters and the sides that a probe would choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...model.conditions import small_buffer_bytes
from ...model.config import PatchConfig
from ...model.estimators import ESTIMATORS
from ...model.layout import Layout
from ...model.parameters import find_parameters
from ...model.probe.choosing.choice import choose_sides, cost_of
from ...model.probe.choosing.cost import Costs
from ...model.probe.choosing.preparation import copies_at_once
from ...model.probe.choosing.trace import Uses, Watch, watching
from ...model.probe.choosing.verify import units_of
from ...model.probe.members import Member, scopes_of
from ...model.storage import Storage

if TYPE_CHECKING:
    from .dry_run import DryModel

_FLOAT = 4
_FACTOR = 2  # V is fp16
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes beside the weights and a forward pass.

    Attributes:
        factors: V (fp16); for a probe also B or what vectors learned (fp32); for SubZero also U (fp16) and U S (fp32); the factor
            that SubZero and LOZO-M add to weights (fp32).
        momentum: N or dense momentum, fp32.
        scratch: memory that modules share for perturbed weights.
        copies: perturbed weights and shifts with memory of their own, and small buffers as they were when a step began.
        first_step: what a probe's check adds in the first step only.
    """

    factors: int = 0
    momentum: int = 0
    scratch: int = 0
    copies: int = 0
    first_step: int = 0

    @property
    def total(self) -> int:
        """Bytes that are there in every step."""
        return self.factors + self.momentum + self.scratch + self.copies


def find_members(dry: DryModel, config: PatchConfig) -> list[Member]:
    """The parameters that would be trained, as a probe knows them.

    Raises:
        ValueError, TypeError: as patching the model would.
    """
    plain = dataclasses.replace(config, placement="inplace", side="auto", keep_factors=False, allow_drift=False)
    parameters, _ = find_parameters(dry.model, plain)
    if config.estimator == "dense":  # tensors without memory are of a type of their own, which reads as quantised
        flat = [Layout(p.name, low_rank=False, form="flat") for p in parameters]
        parameters = [
            dataclasses.replace(p, layout=layout, storage=Storage(p.storage.owners, layout))
            for p, layout in zip(parameters, flat, strict=True)
        ]
    return [Member(p, i, p.extent, torch.device("cpu")) for i, p in enumerate(parameters)]


def place_members(dry: DryModel, members: Sequence[Member], costs: Costs, config: PatchConfig) -> Mapping[Member, Uses]:
    """Gives every member the side that a probe would, by the same trace and the same rules; returns what the trace saw."""
    with dry.mode, torch.no_grad(), watching(dry.model, Watch(members)) as watch:
        dry.loss()
    choose_sides(members, watch.uses, {m: costs for m in members if m.parameter.low_rank}, config, compiled=False)
    return watch.uses


def side_seconds(member: Member, used: Uses, costs: Costs) -> float:
    """Seconds of what one evaluation computes for a member beside the forward pass."""
    if member.side in ("activation", "scratch"):
        return cost_of(member, used, costs)
    return member.numel * costs.element if member.side == "copy" else 0.0


def state_in_place(model: nn.Module, members: Sequence[Member], config: PatchConfig, *, momentum: bool) -> State:
    """The state of a method that moves weights."""
    factors = _factors(members, config)
    carries = momentum or ESTIMATORS[config.estimator].carries
    if config.estimator == "subspace" or carries:
        factors += _summed(members, config.rank)
    return State(factors, _left_factors(members, config.rank) if carries else 0, copies=small_buffer_bytes(model))


def state_of_probe(model: nn.Module, members: Sequence[Member], config: PatchConfig, *, momentum: bool) -> State:
    """The state of a probe whose members have sides."""
    carries = momentum or ESTIMATORS[config.estimator].carries
    factors = _factors(members, config)
    if config.estimator != "dense":
        factors += _left_factors([m for m in members if m.side != "inplace"], config.rank)  # B
    if config.estimator == "subspace":  # B with the perturbation in it
        factors += _summed(members, config.rank)
    elif carries:
        factors += _summed([m for m in members if m.side == "inplace"], config.rank)
    copies = sum(m.numel * m.parameter.tensor.element_size() for m in members if m.side == "copy")
    return State(
        factors,
        _left_factors(members, config.rank) if carries else 0,
        _scratch(model, members),
        copies + small_buffer_bytes(model) + sum(_FLOAT * m.numel for m in members if m.side == "shift"),
        _checked_at_once(members),
    )


def _factors(members: Sequence[Member], config: PatchConfig) -> int:
    """Bytes of V, and of what else SubZero keeps for a window or a step: U (fp16) and U S (fp32)."""
    each = _FACTOR * config.rank
    factors = sum(each * batch * cols for batch, _, cols in _matrices(members))
    if config.estimator == "subspace":
        factors += sum((each + _FLOAT * config.rank) * batch * rows for batch, rows, _ in _matrices(members))
    return factors


def _matrices(members: Sequence[Member]) -> list[tuple[int, int, int]]:
    return [m.extent for m in members if m.parameter.low_rank]


def _summed(members: Sequence[Member], rank: int) -> int:
    """Bytes of the factors in which the draws of a pass are added up: in fp32, (rows, rank) for a matrix."""
    return sum(_FLOAT * rank * batch * rows for batch, rows, _ in _matrices(members))


def _left_factors(members: Sequence[Member], rank: int) -> int:
    """Bytes of N, or of B: in fp32, (rows, rank) for a matrix and every element of other tensors."""
    return _summed(members, rank) + sum(_FLOAT * m.numel for m in members if not m.parameter.low_rank)


def _scratch(model: nn.Module, members: Sequence[Member]) -> int:
    """The most bytes that modules which run inside each other take at once."""
    scopes = {module: [m for m in some if m.side == "scratch"] for module, some in scopes_of(members).items()}
    by_name = dict(model.named_modules())
    most = 0
    for name, module in by_name.items():
        if not scopes.get(module):
            continue
        parts = name.split(".") if name else []
        chain = [by_name[".".join(parts[:i])] for i in range(len(parts) + 1)]
        applied = {m for outer in chain for m in scopes.get(outer, ())}
        most = max(most, sum(_aligned(m.numel * m.parameter.tensor.element_size()) for m in applied))
    return most


def _checked_at_once(members: Sequence[Member]) -> int:
    """The most weights that a probe's first step keeps copies of, to check itself: as many units as its budget takes."""
    units = [sum(m.numel * m.parameter.tensor.element_size() for m in unit) for unit in units_of(members)]
    budget = copies_at_once(sum(units))
    most = chunk = 0
    for unit in units:
        chunk = unit if chunk + unit > budget else chunk + unit
        most = max(most, chunk)
    return most


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
