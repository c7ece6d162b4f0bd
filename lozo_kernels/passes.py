"""One pass over the weights: terms that are added to every parameter, as one call of an op per kind and device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .config import PatchConfig
from .registry import Choice, Draw, Rounding
from .table import TensorTable

Scalar = float | Tensor
"""A number or a tensor: 0-dim, or one value per trained parameter in the order of ``Handle.names``."""


@dataclasses.dataclass(frozen=True)
class Term:
    """One draw's part in a pass over the weights: X += (perturb + gradient) * D, N += coefficient * D."""

    draw: Draw
    perturb: float = 0.0
    """Scale of a perturbation that was made before this pass and so decays with X, or is made by it."""
    gradient: Scalar = 0.0
    """-lr * c, before the division by r that ``scaling`` asks for."""
    coefficient: Scalar = 0.0
    decays: bool = True


@dataclasses.dataclass
class Group:
    """The parameters of one kind on one device: one op call."""

    kind: str
    index: Tensor
    """Positions of its parameters among all, for picking per-parameter scalars."""
    table: TensorTable
    choice: Choice

    def select(self, value: Scalar) -> Tensor:
        """A scalar as one fp32 value per parameter of the group, on its device."""
        if not isinstance(value, Tensor):
            return torch.full((len(self.table),), value, dtype=torch.float32, device=self.table.device)
        if value.dim():
            value = value[self.index.to(value.device)]
        return value.to(self.table.device, torch.float32).expand(len(self.table))


def run_pass(
    groups: Sequence[Group],
    config: PatchConfig,
    terms: Sequence[Term],
    *,
    decay: Scalar | None = None,
    momentum: tuple[float | Tensor, Scalar] | None = None,
    rounding: Rounding | None = None,
    decayed_by: Scalar = 1.0,
) -> None:
    """One call of an op per kind and device. ``momentum`` is (beta, -lr)."""
    draws = [term.draw for term in terms]
    for group in groups:
        low_rank = group.kind == "lowrank"
        perturb_factor = config.perturb_factor if low_rank else 1.0
        update_factor = config.update_factor if low_rank else 1.0

        def scale(term: Term, p: float = perturb_factor, u: float = update_factor) -> Scalar:
            standing = term.perturb * p * decayed_by if term.perturb and term.decays else term.perturb * p
            return standing + term.gradient * u

        select = group.select
        scales = torch.stack([select(scale(term)) for term in terms])
        common = {
            "seed": config.seed,
            "draws": draws,
            "scales": scales,
            "decay": None if decay is None else select(decay),
            "rounding": rounding,
            "backend": group.choice.backend,
        }
        if momentum is None:
            (ops.lowrank_update_ if low_rank else ops.dense_update_)(group.table, **common)  # type: ignore[arg-type]
        else:
            (ops.lowrank_momentum_ if low_rank else ops.dense_momentum_)(
                group.table,
                coefficients=torch.stack([select(term.coefficient) for term in terms]),
                alpha=select(momentum[1] * update_factor),
                beta=select(momentum[0]),
                **common,  # type: ignore[arg-type]
            )
