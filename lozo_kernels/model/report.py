"""The types that Handle.report() returns."""

from __future__ import annotations

import dataclasses

import torch

from .parameters import Parameter
from .text_table import text_table


@dataclasses.dataclass(frozen=True)
class ParameterReport:
    """How one parameter is treated.

    Attributes:
        treatment: "low-rank r", "dense" or "left alone".
        backend: name of the backend that changes it, None if none does.
        side: where a probe's perturbation enters; None if it is in place, or not chosen yet.
        note: the matrices it is seen as, or the reason why it is left alone.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    treatment: str
    backend: str | None
    note: str
    side: str | None = None


def report_of(p: Parameter, rank: int, backend: str, note: str | None = None, side: str | None = None) -> ParameterReport:
    """How a trained parameter is treated; without a note, its matrices or elements are named."""
    t, (batch, rows, cols) = p.tensor, p.extent
    if note is None and not p.low_rank:
        note = f"{t.numel()} elements"
    elif note is None:
        note = f"{rows} x {cols}" if batch == 1 else f"{batch} matrices of {rows} x {cols}"
        if rank > min(rows, cols):
            note += f"; rank {rank} is above min(rows, columns), which wastes noise but is exact"
    if p.hashed_again:
        note = f"{note}; its name was hashed again, because another parameter's has the same tensor id"
    treatment = f"low-rank {rank}" if p.low_rank else "dense"
    return ParameterReport(p.name, p.aliases, tuple(t.shape), t.dtype, t.device, treatment, backend, note, side)


@dataclasses.dataclass(frozen=True)
class Report:
    """The treatment of every parameter and, for each device, why other backends were not used."""

    parameters: tuple[ParameterReport, ...]
    rejected_backends: dict[str, dict[str, str]]
    notes: tuple[str, ...] = ()
    """Remarks on how the model is treated, such as what a probe's check found."""

    def __str__(self) -> str:
        rows = [("parameter", "shape", "dtype", "device", "treatment", "side", "backend", "note")]
        for p in self.parameters:
            shape, dtype = "x".join(map(str, p.shape)) or "scalar", str(p.dtype).removeprefix("torch.")
            note = p.note + (f"; tied with {', '.join(p.aliases)}" if p.aliases else "")
            rows.append((p.name, shape, dtype, str(p.device), p.treatment, p.side or "-", p.backend or "-", note))
        lines = [text_table(rows, left=len(rows[0]))]
        for device, reasons in self.rejected_backends.items():
            lines += [f"{device}: {name} not used: {reason}" for name, reason in reasons.items()]
        return "\n".join([*lines, *self.notes])
