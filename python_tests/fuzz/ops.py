"""Every op of ``lozo_kernels.ops`` on random tables, against ``reference.py`` and ``noise.py``, all of the storage compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lozo_kernels import Draw, Rounding, TensorTable, choose_backend
from lozo_kernels.kernels import noise, ops, reference
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

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
EXACT_RANK = 8


@dataclasses.dataclass(frozen=True)
class Op:
    """What a kind of op takes."""

    name: str
    low_rank: bool
    momentum: bool = False
    merge: bool = False
    factors: bool = False


OPS = (
    Op("lowrank_update_", True),
    Op("dense_update_", False),
    Op("lowrank_momentum_", True, momentum=True),
    Op("dense_momentum_", False, momentum=True),
    Op("factor_update_", False, factors=True),
    Op("lowrank_merge_", True, momentum=True, merge=True),
    Op("dense_merge_", False, merge=True),
    Op("resample_", True),
)


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
    op = case.of(*OPS)
    carry = op.name == "resample_" and case.chance(50)
    momentum = op.momentum or carry or (op.name == "dense_merge_" and case.chance(60))
    parts = make_parts(case, low_rank=op.low_rank, momentum=momentum, factors=op.factors)
    if case.chance(2):
        case.notes.append("a table for another op")
        op = case.of(*OPS)
    call = _arguments(case, op, len(parts.x) if isinstance(parts.x, list) else 0, carry)
    out = _out(case, parts) if op.merge and isinstance(parts.x, list) else None
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
            _expected(case, op, parts, copies, out_copies, call)
        views = []
        for name in ("x", "v", "n"):
            pairs = zip(getattr(parts, name) or (), getattr(copies, name) or (), strict=True)
            views += [(name, *pair) for pair in pairs]
        shadow.check(case, views + [("out", *pair) for pair in zip(out or (), out_copies or (), strict=True)])
    return outcome


def _copy(shadow: Shadow, values: Any) -> Any:
    return [shadow.of(v) for v in values] if isinstance(values, list) else values


def _expected(case: Choices, op: Op, parts: Parts, at: Parts, out_copies: Any, call: dict[str, Any]) -> None:
    """Makes of the copies what the op has to make of the originals."""
    for t, x in enumerate(at.x):
        if not x.numel():
            continue
        row, col, width = (value[t] if value else 0 for value in (at.rows, at.cols, at.widths))
        place = _Place(x, call["seed"], at.ids[t], row, col, width if at.widths else x.shape[2])
        v = None if at.v is None else at.v[t]
        n = None if at.n is None else at.n[t]
        if op.name == "resample_":
            new = place.right(v.shape[1], call["window"])
            if call["reproject"]:
                wanted = reference.reproject(n, v, new)
                size = n.double().abs() @ (v.double() @ new.double().transpose(1, 2) / x.shape[2]).abs()
                _near(case, parts.n[t], wanted, size, (v.shape[1] + 4) * 2.0**-23)
                n.copy_(parts.n[t])
            v.copy_(new)
            continue
        count, draws = len(at.x), call["draws"]
        scales = _each(call["scales"], (len(draws), count))[:, t]
        decay = None if call.get("decay") is None else _each(call["decay"], (count,))[t]
        rank = x.shape[2] if op.factors else 0 if v is None else v.shape[1]
        ds = [place.left(rank, d) if rank else place.dense(d) for d in draws]
        if op.name.endswith("momentum_"):
            coefficients, alpha, beta = (_each(call[k], s)[..., t] for k, s in _momentum_shapes(len(draws), count).items())
            n.copy_(reference.momentum(n, ds, list(coefficients), beta))
            y = _update(x, v, ds, scales, decay)
            product = n if v is None else reference.momentum_product(n, v)
            y = reference.apply_momentum(y, product, alpha)
            if rank > EXACT_RANK:
                size = x.double().abs() + sum(s.abs() * 5.0**2 * rank for s in scales) + alpha.abs() * (n.abs() @ v.float().abs())
                bound = 8 * (rank + 8) * 2.0**-24
                _near(case, parts.x[t], y, size, bound, 2 * UNIT[x.dtype])
                x.copy_(parts.x[t])
                continue
        elif op.merge and v is not None:
            y = reference.lowrank_merge(x, v, n, ds, list(scales), decay)
        elif op.merge:
            y = reference.dense_merge(x, n, ds, list(scales), decay)
        else:
            y = _update(x, v, ds, scales, decay)
        rounding = call.get("rounding")
        if rounding is None or x.dtype == torch.float32:
            y = reference.round_nearest(y, x.dtype)
        else:
            y = reference.round_stochastic(y, place.bits(rounding), x.dtype)
        (x if out_copies is None else out_copies[t]).copy_(y)


def _update(x: Tensor, v: Tensor | None, ds: list[Tensor], scales: Tensor, decay: Tensor | None) -> Tensor:
    if v is None:
        return reference.dense_update(x, ds, list(scales), decay)
    return reference.lowrank_update(x, v, ds, list(scales), decay)


def _near(case: Choices, now: Tensor, wanted: Tensor, size: Any, relative: float, unit: float = 0.0) -> None:
    """Within a bound wherever nothing overflowed; bits are not promised here."""
    wanted = wanted.double()
    bound = relative * size + unit * wanted.abs() + 2.0**-24
    fits = wanted.isfinite() & (bound + wanted.abs() < 3e4)
    good = (now.double() - wanted).abs() <= bound
    expect(bool((good | ~fits).all()), "a result is out of its bound", case)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor is in the noise, row by row."""

    x: Tensor
    seed: int
    tensor_id: int
    row: int
    col: int
    width: int

    def left(self, rank: int, draw: Draw) -> Tensor:
        batch, rows, _ = self.x.shape
        u = noise.factor(
            self.seed, batch * rows, rank, self.tensor_id, int(draw.step), row_offset=self.row, direction=draw.direction
        )
        return u.view(batch, rows, rank)

    def right(self, rank: int, window: int) -> Tensor:
        first = [self.col + b * self.width for b in range(len(self.x))]
        made = [
            noise.factor(self.seed, self.x.shape[2], rank, self.tensor_id, window, stream="V", row_offset=offset)
            for offset in first
        ]
        return torch.stack(made).transpose(1, 2).half()

    def dense(self, draw: Draw) -> Tensor:
        return self._by_row(noise.dense, draw.step, draw.direction)

    def bits(self, rounding: Rounding) -> Tensor:
        return self._by_row(noise.rounding_bits, rounding.step, rounding.index)

    def _by_row(self, make: Any, step: Any, direction: int) -> Tensor:
        batch, rows, cols = self.x.shape
        offsets = [(self.row + i) * self.width + self.col for i in range(batch * rows)]
        made = [make(self.seed, cols, self.tensor_id, int(step), offset=o, direction=direction) for o in offsets]
        return torch.stack(made).view(batch, rows, cols)


def _each(value: Any, shape: tuple[int, ...]) -> Tensor:
    value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return value.detach().to(torch.float32).expand(shape)


def _momentum_shapes(draws: int, count: int) -> dict[str, tuple[int, ...]]:
    return {"coefficients": (draws, count), "alpha": (count,), "beta": (count,)}


def _arguments(case: Choices, op: Op, count: int, carry: bool) -> dict[str, Any]:
    call: dict[str, Any] = {"seed": case.whole("seed", 1 << 64, 3)}
    call["backend"] = case.of(None, None, *(choose_backend("cpu", name).backend for name in ("native", "eager")))
    for odd in case.odd(1, *ODD_THINGS[1:], note="backend"):
        call["backend"] = odd
    if op.name == "resample_":
        return call | {"window": case.whole("window", noise.MAX_DRAW), "reproject": carry}
    call["draws"] = draws = [_draw(case) for _ in range(case.of(0, 1, 1) if op.merge else case.of(1, 2))]
    for odd in case.odd(3, [_draw(case) for _ in range(3)], [], None, [3], [None], note="draws"):
        call["draws"], draws = odd, odd or ()
    call["scales"] = _scalars(case, (len(draws), count), "scales")
    if case.chance(30):
        call["decay"] = _scalars(case, (count,), "decay")
    if case.chance(30) and not op.factors:
        call["rounding"] = Rounding(_step(case), case.whole("rounding index", noise.MAX_DIRECTION, 3))
        for odd in case.odd(2, "stochastic", 3, note="rounding"):
            call["rounding"] = odd
    if op.momentum and not op.merge:
        call |= {name: _scalars(case, shape, name) for name, shape in _momentum_shapes(len(draws), count).items()}
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
