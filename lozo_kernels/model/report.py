"""What Handle.report() returns."""

from __future__ import annotations

import dataclasses

import torch

from .text_table import text_table


@dataclasses.dataclass(frozen=True)
class ParameterReport:
    """How one parameter is treated.

    Attributes:
        treatment: "low-rank r", "dense" or "left alone".
        backend: name of the backend that changes it, None if none does.
        side: of a probe, where the perturbation enters; None for in place or not chosen yet.
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


@dataclasses.dataclass(frozen=True)
class Report:
    """Every parameter, and for each device the backends that were passed over with the reason."""

    parameters: tuple[ParameterReport, ...]
    rejected_backends: dict[str, dict[str, str]]
    notes: tuple[str, ...] = ()
    """What a probe's check found."""

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
