"""Cases of every op: a table of awkward tensors in poisoned storage, and the arguments of a call.

All that holds one backend to another takes its cases from here: ``bench correctness``, the check before figures (``gate.py``),
``lozo-kernels doctor``, the fuzzer and the tests.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import noise, op_table, ops
from ..kernels.calls import Draw, Rounding
from ..kernels.op_table import Op
from ..kernels.registry import Backend
from ..kernels.table import DTYPES, TensorTable

OPS = {**op_table.OPS, "resample_": Op("resample_", v=True, n="optional", draws=(0, 0), rounding=False)}
"""The ops that have cases, by name: those of the table of ops, and ``resample_``."""

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half the distance from 1 to the next value: the relative error of rounding to nearest."""

_SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -3e-45, 3e38, 65504.0, 6e-8, 1e-5)


@dataclasses.dataclass
class Case:
    """A call of an op.

    Attributes:
        table: the weights, with V and N where the op wants them.
        call: the other arguments, except ``out`` and ``backend``.
        out: the table that it writes to, for an op that can; None to write into ``table``.
    """

    op: Op
    table: TensorTable
    call: dict[str, Any]
    out: TensorTable | None = None

    def on(self, device: torch.device | str = "cpu") -> Case:
        """Copies the case to a device, on storage of its own with the same layout."""
        call = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.call.items()}
        return Case(self.op, copy_table(self.table, device), call, None if self.out is None else copy_table(self.out, device))

    def run(self, backend: Backend | None) -> None:
        """Makes the call."""
        into = {} if self.out is None else {"out": self.out}
        getattr(ops, self.op.name)(self.table, **self.call, **into, backend=backend)


class Compared(NamedTuple):
    """A comparison of one tensor: how many values it has, how many are wrong, and a text that says which tensor and which value."""

    values: int
    wrong: int
    text: str


def compare(got: Case, want: Case) -> list[Compared]:
    """Compares all storage of two cases after their calls bit for bit, gaps included. Any NaN equals any other."""
    found = []
    for name in ("x", "n", "v", "out"):
        theirs, ours = (case.out and case.out.x if name == "out" else getattr(case.table, name) for case in (got, want))
        pairs = enumerate(zip(theirs or (), ours or (), strict=True))
        found += [compare_storage(f"{name}[{t}]", x, y) for t, (x, y) in pairs]
    return found


def compare_storage(name: str, x: Tensor, y: Tensor) -> Compared:
    """Compares the whole storage of two tensors of one layout bit for bit. Any NaN equals any other."""
    a, b = storage_of(x), storage_of(y)
    wrong = as_bits(a) != as_bits(b)
    text = f"{name} {tuple(y.shape)} {str(y.dtype).removeprefix('torch.')}, strides {y.stride()}"
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        text += f": {int(wrong.sum())} of {wrong.numel()} values differ, the first {a[at].item()!r}, not {b[at].item()!r}"
    return Compared(wrong.numel(), int(wrong.sum()), text)


def as_bits(t: Tensor) -> Tensor:
    """Views a tensor as integers, in which every NaN is the same."""
    t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
    return t.contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16)


def storage_of(x: Tensor) -> Tensor:
    """Returns the whole storage that a tensor lies in, as a flat tensor of its dtype."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())  # type: ignore[call-overload]


def copy_tensor(t: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Copies a tensor to storage of its own with the same layout, gaps included."""
    return storage_of(t).to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


def copy_table(table: TensorTable, device: torch.device | str = "cpu") -> TensorTable:
    """Copies the tensors of a table in the same way."""

    def copied(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [copy_tensor(t, device) for t in tensors]

    v, n = (None if tensors is None else copied(tensors) for tensors in (table.v, table.n))
    return dataclasses.replace(table, x=copied(table.x), v=v, n=n, cache={}, checked=False)


def strided(
    rng: random.Random, shape: Sequence[int], dtype: torch.dtype, *, step: int = 1, size: float | None = None, special: float = 0.0
) -> Tensor:
    """Makes a random tensor (batch, rows, cols) in storage full of NaN, with gaps before it, between rows and between matrices.

    Args:
        step: gaps are multiples of this; kernels that move 128 bits at a time want 8.
        size: standard deviation of the values; None for one at random.
        special: the share of values that are infinite, NaN, zeros of both signs, very large or very small.
    """
    batch, rows, cols = shape
    row_stride = cols + step * rng.choice((0, 0, 1, 3, 8))
    batch_stride = rows * row_stride + step * rng.choice((0, 0, 5))
    lead = step * rng.choice((0, 0, 1, 2))
    storage = torch.full((lead + batch * batch_stride + 64,), float("nan"), dtype=dtype, device="cpu")
    values = torch.randn(tuple(shape), dtype=torch.float32, device="cpu") * (10 ** rng.uniform(-3, 0.5) if size is None else size)
    if special:
        chosen = torch.rand(values.shape, dtype=torch.float32, device="cpu") < special
        values[chosen] = torch.tensor(_SPECIAL, dtype=torch.float32, device="cpu")[
            torch.randint(len(_SPECIAL), (int(chosen.sum()),), dtype=torch.int64, device="cpu")
        ]
    return storage.as_strided(tuple(shape), (batch_stride, row_stride, 1), lead).copy_(values)


def random_table(
    rng: random.Random,
    op: Op,
    shapes: Sequence[Sequence[int]],
    rank: int = 0,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    n: bool = True,
    step: int = 1,
    size: float | None = None,
    special: float = 0.0,
) -> TensorTable:
    """Makes weights for an op, some of them shards of larger ones, with V and N as the op takes them.

    Args:
        shapes: (batch, rows, cols) of each. Where the tensors are factors, the rank takes the place of cols.
        n: whether there is N, for an op that can do without.
        step, size, special: as for :func:`strided`, and columns begin at multiples of ``step``.
    """
    if op.factors:
        shapes, dtypes = [(batch, rows, rank) for batch, rows, _ in shapes], (torch.float32,)
    xs = [strided(rng, shape, rng.choice(dtypes), step=step, size=size, special=special) for shape in shapes]
    firsts = [step * rng.choice((0, 0, 5, 64)) for _ in xs]
    vs = ns = None
    if op.v:
        vs = [noise.to_grid(torch.randn(x.shape[0], rank, x.shape[2], dtype=torch.float32, device="cpu")).half() for x in xs]
    if op.n == "needed" or (op.n == "optional" and n):
        ns = [torch.randn(*x.shape[:2], rank if op.v else x.shape[2], dtype=torch.float32, device="cpu") for x in xs]
    return TensorTable(
        xs,
        [rng.getrandbits(32) for _ in xs],
        v=vs,
        n=ns,
        row_offsets=[rng.choice((0, 0, 7, 1 << 20)) for _ in xs],
        col_offsets=firsts,
        global_cols=[x.shape[2] + first + step * rng.choice((0, 0, 3)) for x, first in zip(xs, firsts, strict=True)],
    )


def random_call(
    rng: random.Random,
    op: Op,
    count: int,
    *,
    draws: int | None = None,
    decay: bool | None = None,
    stochastic: bool | None = None,
    law: str | None = None,
    reproject: bool = True,
) -> dict[str, Any]:
    """Makes arguments for a table of ``count`` tensors. What is None is chosen at random."""
    call: dict[str, Any] = {"seed": rng.getrandbits(64)}
    if op.name == "resample_":
        return call | {"window": rng.getrandbits(28), "reproject": reproject}
    draws = rng.randint(*op.draws) if draws is None else draws
    parts = rng.choice((1, 2, 3, 7, 16, 33)) if op.signed else 1
    highest = noise.MAX_DIRECTION - parts
    call["draws"] = [Draw(rng.getrandbits(28), rng.choice((0, 0, 3, rng.randint(0, highest)))) for _ in range(draws)]
    call["scales"] = torch.randn(parts if op.signed else draws, count, dtype=torch.float32, device="cpu") * 10 ** rng.uniform(-4, 0)
    call["decay"] = (
        1 - 0.1 * torch.rand(count, dtype=torch.float32, device="cpu") if (rng.random() < 0.5 if decay is None else decay) else None
    )
    if op.rounding:
        rounds = rng.random() < 0.5 if stochastic is None else stochastic
        call["rounding"] = Rounding(rng.getrandbits(28), rng.getrandbits(24)) if rounds else None
    if not op.along_rows:
        call["law"] = rng.choice(noise.LAWS) if law is None else law
    if op.momentum:
        call |= {
            "coefficients": torch.randn(draws, count, dtype=torch.float32, device="cpu"),
            "alpha": 1e-2 * torch.randn(count, dtype=torch.float32, device="cpu"),
            "beta": torch.rand(count, dtype=torch.float32, device="cpu"),
        }
    return call


def random_case(
    rng: random.Random,
    op: Op,
    shapes: Sequence[Sequence[int]],
    rank: int = 0,
    *,
    call: dict[str, Any] | None = None,
    apart: bool = False,
    step: int = 1,
    **tensors: Any,
) -> Case:
    """Makes a case of an op.

    Args:
        call: arguments of :func:`random_call`; None to leave everything to chance.
        apart: whether the op, if it can, writes into other memory, which is laid out in another way.
        tensors: as for :func:`random_table`.
    """
    table = random_table(rng, op, shapes, rank, step=step, **tensors)
    out = None
    if op.out and apart:
        outs = [strided(rng, x.shape, x.dtype, step=step) for x in table.x]
        out = TensorTable([y.fill_(float("nan")) for y in outs], table.tensor_ids)
    return Case(op, table, random_call(rng, op, len(table), **(call or {"reproject": table.n is not None})), out)
