"""Every op of ``lozo_kernels.ops`` on random tables, against ``reference.py`` and ``noise.py``, all of the storage compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lozo_kernels import Draw, Rounding, TensorTable, choose_backend
from lozo_kernels.bench.cases import OPS, UNIT, Case, Op
from lozo_kernels.kernels import noise, ops
from python_tests.fuzz.choices import (
    ANSWER,
    ODD_NUMBERS,
    ODD_THINGS,
    Choices,
    all_bytes,
    attempt,
    expect,
    reference_answer,
    same_bits,
)
from python_tests.fuzz.tables import Parts, make_parts, strided
from python_tests.truth import promised


class Shadow:
    """Copies of storages, seen as the originals are, what is shared shared."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, t: Any) -> Any:
        if not isinstance(t, Tensor) or t.layout != torch.strided or t.device.type != "cpu":
            return t
        whole = all_bytes(t)
        _, copy = self._copies.setdefault(whole.data_ptr(), (whole, whole.clone()))
        like = torch.tensor([], dtype=t.dtype)
        return like.set_(copy.untyped_storage(), t.storage_offset(), t.shape, t.stride())  # type: ignore[call-overload]

    def check(self, case: Choices, views: Sequence[tuple[str, Tensor, Tensor]]) -> None:
        """The originals hold what the copies hold: views first, a NaN being a NaN, then every byte."""
        for what, now, wanted in views:
            expect(same_bits(now, wanted), f"{what} of {tuple(now.shape)} {now.dtype} is wrong", case)
            wanted.copy_(now)
        for now, wanted in self._copies.values():
            expect(torch.equal(now, wanted), "something beside the tensors was written", case)


def run_op(case: Choices) -> str:
    """One op on one table."""
    op = case.of(*OPS.values())
    carry = op.name == "resample_" and case.chance(50)
    momentum = op.n == "needed" or carry or (op.name == "dense_merge_" and case.chance(60))
    parts = make_parts(case, low_rank=op.v, momentum=momentum, factors=op.factors)
    if case.chance(2):
        case.notes.append("a table for another op")
        op = case.of(*OPS.values())
    call = _arguments(case, op, len(parts.x) if isinstance(parts.x, list) else 0, carry)
    out = _out(case, parts) if op.out and isinstance(parts.x, list) else None
    memory, shadow = parts.memory(), Shadow()
    for t in out or ():
        memory.add(t)
    copies = Parts(*(_copy(shadow, getattr(parts, field.name)) for field in dataclasses.fields(Parts)))
    out_copies = None if out is None else _copy(shadow, out)

    def change() -> None:
        table = parts.table()
        if out is not None:
            call["out"] = TensorTable(out, [0] * len(out))
        getattr(ops, op.name)(table, **call)

    outcome, _ = attempt(case, memory, change)
    if outcome == ANSWER:
        expect("shared" not in case.notes, "tensors that share storage were taken", case)
        with reference_answer(case):
            out_table = None if out_copies is None else TensorTable(out_copies, [0] * len(out_copies))
            _expected(Case(op, copies.table(), call, out_table))
        views = []
        for name in ("x", "v", "n"):
            pairs = zip(getattr(parts, name) or (), getattr(copies, name) or (), strict=True)
            views += [(name, *pair) for pair in pairs]
        shadow.check(case, views + [("out", *pair) for pair in zip(out or (), out_copies or (), strict=True)])
    return outcome


def _copy(shadow: Shadow, values: Any) -> Any:
    return [shadow.of(v) for v in values] if isinstance(values, list) else values


def _expected(at: Case) -> None:
    """Makes of the copies what the op has to make of the originals."""
    targets = at.table.x if at.out is None else at.out.x
    for t, x in enumerate(at.table.x):
        if not x.numel() and not (at.op.momentum and at.table.n is not None and at.table.n[t].numel()):
            continue
        y, n, v = promised(at, t)
        for old, new in ((targets[t], y), (n is not None and at.table.n[t], n), (v is not None and at.table.v[t], v)):
            if new is not None:
                old.copy_(new)


def _arguments(case: Choices, op: Op, count: int, carry: bool) -> dict[str, Any]:
    call: dict[str, Any] = {"seed": case.whole("seed", 1 << 64, 3)}
    call["backend"] = case.of(None, None, *(choose_backend("cpu", name).backend for name in ("native", "eager")))
    for odd in case.odd(1, *ODD_THINGS[1:], note="backend"):
        call["backend"] = odd
    if op.name == "resample_":
        return call | {"window": case.whole("window", noise.MAX_DRAW), "reproject": carry}
    call["draws"] = draws = [_draw(case) for _ in range(case.of(0, 1, 1) if op.out else case.of(1, op.draws[1]))]
    for odd in case.odd(3, [_draw(case) for _ in range(3)], [], None, [3], [None], note="draws"):
        call["draws"], draws = odd, odd or ()
    # Examples have the directions from that of the draw on, as far as there are any.
    first = getattr(draws[0], "direction", 0) if op.signed and draws else 0
    room = noise.MAX_DIRECTION - first if isinstance(first, int) else 1
    examples = min(case.of(1, 2, 5), max(1, room)) if op.signed else len(draws)
    call["scales"] = _scalars(case, (examples, count), "scales")
    if case.chance(30):
        call["decay"] = _scalars(case, (count,), "decay")
    if case.chance(30) and not op.factors:
        call["rounding"] = Rounding(_step(case), case.whole("rounding index", noise.MAX_DIRECTION, 3))
        for odd in case.odd(2, "stochastic", 3, note="rounding"):
            call["rounding"] = odd
    if not op.along_rows and case.chance(50):
        call["law"] = "rademacher"
        for odd in case.odd(2, "gaussian", None, [], note="law"):
            call["law"] = odd
    if op.momentum:
        shapes = {"coefficients": (len(draws), count), "alpha": (count,), "beta": (count,)}
        call |= {name: _scalars(case, shape, name) for name, shape in shapes.items()}
    return call


def _draw(case: Choices) -> Draw:
    return Draw(_step(case), case.of(0, case.whole("direction", noise.MAX_DIRECTION, 3)))


def _step(case: Choices) -> Any:
    step = case.whole("step", noise.MAX_DRAW, 3)
    if isinstance(step, int) and case.chance(10) and 0 <= step < noise.MAX_DRAW:  # a tensor is not read, and so not refused
        step = torch.tensor(step)
        for odd in case.odd(10, step.float(), step.view(1), step.to("meta"), step.to_sparse(), note="step tensor"):
            step = odd
    return step


def _scalars(case: Choices, shape: tuple[int, ...], name: str) -> Any:
    """A number, or what broadcasts to a shape."""
    values = torch.randn(shape, dtype=torch.float64) * case.of(1e-2, 1.0)
    if case.chance(6) and values.numel():
        values.view(-1)[0] = case.of(*ODD_NUMBERS[:4], 1e20)
    form = case.of("number", "list", "tensor", "each", "row", "grad")
    for odd in case.odd(3, "sparse", "meta", "complex", "shape", "ragged", "huge", "thing", note=name):
        form = odd
    strange = {
        "sparse": lambda: values.to_sparse(),
        "meta": lambda: values.to("meta"),
        "complex": lambda: torch.complex(values, values),
        "shape": lambda: torch.zeros(*shape, 3, 2),
        "ragged": lambda: [[0.1], [0.1, 0.2]],
        "huge": lambda: case.of(1e300, -1e300, 10**400),
        "thing": lambda: case.of(*ODD_THINGS[:-1]),
        "list": lambda: values.tolist() if values.numel() else 0.0,
        "tensor": lambda: values.to(case.of(torch.float32, torch.float64, torch.bfloat16)),
        "each": lambda: values[..., :1].to(torch.float32) if shape[-1] else values,
        "row": lambda: values[0] if len(shape) > 1 and shape[0] else values,
        "grad": lambda: values.float().requires_grad_(),
        "number": lambda: case.of(0.01, -0.5, 0, 1, *ODD_NUMBERS[:4]),
    }
    return strange[form]()


def _out(case: Choices, parts: Parts) -> list[Tensor] | None:
    """Where a merge writes: nowhere else, elsewhere, or into what is not for it."""
    good = all(isinstance(x, Tensor) and x.dim() == 3 and x.dtype in UNIT and x.device.type == "cpu" for x in parts.x)
    if not case.chance(60) or not good:
        return None
    out = [strided(case, tuple(x.shape), x.dtype) for x in parts.x]
    for odd in case.odd(12, "same", "shifted", "dtype", "shape", "count", note="out") if out else ():
        x = parts.x[0]
        if odd == "same":
            out = list(parts.x)
        elif odd == "shifted":
            out[0] = torch.as_strided(x, x.shape, x.stride(), x.storage_offset() + 1) if x.layout == torch.strided else x
        elif odd == "dtype":
            out[0] = out[0].to(torch.float64)
        elif odd == "shape":
            out[0] = out[0].transpose(0, 1)
        else:
            out = out[:-1]
    return out
