"""Random tables of awkward tensors in poisoned storage, and random arguments for every op: what correctness is checked on."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import noise, ops
from ..kernels.calls import Draw, Rounding
from ..kernels.registry import Backend
from ..kernels.table import DTYPES, TensorTable

LOWRANK = ("lowrank_update_", "lowrank_momentum_", "resample_")
DENSE = ("dense_update_", "dense_momentum_")
RANKS = (4, 1, 16, 2, 64, 8, 3, 9, 32, 5, 17, 33)
"""Those that matter most first, so that a check that runs out of time has seen them."""

_ODD = ((1, 5, 3), (1, 33, 129), (2, 17, 64), (1, 1, 70), (1, 64, 1), (3, 16, 40), (1, 0, 5), (1, 257, 72))
_LARGE = ((1, 1040, 2048), (1, 24, 8))  # enough aligned elements for the launches that move 128 bits at a time
_FEW_ROWS = ((1, 33, 129), (1, 64, 64))
_SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A case before its random inputs are drawn.

    Attributes:
        layout: "odd" (all dtypes in one table, gaps, offsets), "large" (aligned, contiguous) or "tiny".
        dtype: of all tensors; None for a mixture.
        rank: 0 for dense ops.
        draws, decay, stochastic: which arguments the op gets. For ``resample_``, ``decay`` says whether momentum is carried over.
    """

    op: str
    layout: str
    dtype: torch.dtype | None
    rank: int
    draws: int
    decay: bool
    stochastic: bool

    def __str__(self) -> str:
        dtype = "mixed dtypes" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        flags = [f"{self.draws} draws", *(["decay"] if self.decay else []), *(["stochastic"] if self.stochastic else [])]
        return f"{self.op} {self.layout} {dtype}" + (f" rank {self.rank}" if self.rank else "") + f", {', '.join(flags)}"


_KINDS = ((1, False, False), (2, True, True), (2, False, False), (1, True, False))


def plans(*, quick: bool) -> list[Plan]:
    """All cases, the most important first; ``quick`` for a few small ones, and one large enough for 128-bit access of each op."""
    if quick:
        small = [
            Plan(op, "tiny", dtype, rank if op in LOWRANK else 0, *_KINDS[i % 2])
            for op in (*LOWRANK, *DENSE)
            for i, (dtype, rank) in enumerate(((torch.bfloat16, 4), (None, 1), (torch.float32, 17)))
        ]
        ranks = {op: 4 if op in LOWRANK else 0 for op in (*LOWRANK, *DENSE)}
        return small + [Plan(op, "large", torch.bfloat16, rank, *_KINDS[1]) for op, rank in ranks.items()]
    found: list[Plan] = []
    for i, rank in enumerate(RANKS):
        for op in LOWRANK:
            found += [Plan(op, "odd", None, rank, *_KINDS[k]) for k in (0, 1)]
            # Every dtype takes a turn at every rank, with arguments that change from rank to rank.
            found += [Plan(op, "large", dtype, rank, *_KINDS[(i + d) % len(_KINDS)]) for d, dtype in enumerate(DTYPES)]
        if i == 0:
            found += _dense_plans()
    return found


def _dense_plans() -> Iterator[Plan]:
    for op in DENSE:
        for kind in _KINDS:
            yield Plan(op, "odd", None, 0, *kind)
            for dtype in DTYPES:
                yield Plan(op, "large", dtype, 0, *kind)


class Case:
    """Random inputs for a plan. Everything that is not addressed, gaps included, is NaN.

    Attributes:
        storages: what the weights lie in.
        table: the weights.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.seed = plan, seed
        rng = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        odd = plan.layout != "large"
        shapes = {"odd": _ODD, "large": _LARGE, "tiny": _FEW_ROWS}[plan.layout]
        self.storages: list[Tensor] = []
        xs = [self._weights(shape, plan.dtype or rng.choice(DTYPES), rng if odd else None) for shape in shapes]
        offsets = [rng.choice((0, 7, 1000)) if odd else 0 for _ in xs]
        cols = [rng.choice((0, 5, 64)) if odd else 0 for _ in xs]
        widths = [x.shape[2] + c + (rng.choice((0, 3)) if odd else 0) for x, c in zip(xs, cols, strict=True)]
        momentum = plan.op.endswith("momentum_") or (plan.op == "resample_" and plan.decay)
        vs = ns = None
        if plan.rank:
            vs = [noise.to_grid(self._normal(x.shape[0], plan.rank, x.shape[2])).half() for x in xs]
        if momentum:
            ns = [self._normal(*x.shape[:2], plan.rank or x.shape[2]) for x in xs]
        self.table = TensorTable(
            xs, [rng.getrandbits(32) for _ in xs], v=vs, n=ns, row_offsets=offsets, col_offsets=cols, global_cols=widths
        )
        self._arguments = self._draw_arguments(rng)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _weights(self, shape: tuple[int, int, int], dtype: torch.dtype, rng: random.Random | None) -> Tensor:
        batch, rows, cols = shape
        row_gap, batch_gap, lead = (rng.choice((0, 1, 3, 8)), rng.choice((0, 5)), rng.choice((0, 1, 2))) if rng else (0, 0, 0)
        row_stride = cols + row_gap
        batch_stride = rows * row_stride + batch_gap
        storage = torch.full((lead + batch * batch_stride + 64,), float("nan"), dtype=dtype)
        x = torch.as_strided(storage, shape, (batch_stride, row_stride, 1), lead)
        values = self._normal(*shape) * 0.1
        if rng and self.plan.rank <= 8:  # beyond it momentum products are compared within a bound, which needs numbers
            flat = values.view(-1)
            flat[: len(_SPECIAL)] = torch.tensor(_SPECIAL)[: flat.numel()]
        x.copy_(values)
        self.storages.append(storage)
        return x

    def _draw_arguments(self, rng: random.Random) -> dict[str, Any]:
        plan, count = self.plan, len(self.table)
        seed = rng.getrandbits(64)
        if plan.op == "resample_":
            return {"seed": seed, "window": rng.getrandbits(28), "reproject": plan.decay}
        draws = [Draw(rng.getrandbits(28), rng.getrandbits(8)) for _ in range(plan.draws)]
        found: dict[str, Any] = {
            "seed": seed,
            "draws": draws,
            "scales": 1e-2 * self._normal(plan.draws, count),
            "decay": 1.0 - 1e-2 * self._normal(count).abs() if plan.decay else None,
            "rounding": Rounding(rng.getrandbits(28), rng.getrandbits(4)) if plan.stochastic else None,
        }
        if plan.op.endswith("momentum_"):
            found |= {"coefficients": self._normal(plan.draws, count), "alpha": 1e-2 * self._normal(count)}
            found["beta"] = torch.rand(count, generator=self._generator)
        return found

    def on(self, device: torch.device) -> Case:
        """The same case on another device, with storage of its own in the same layout."""
        other = object.__new__(Case)
        other.plan, other.seed = self.plan, self.seed
        other.storages = [s.to(device, copy=True) for s in self.storages]
        xs = [
            torch.as_strided(s, x.shape, x.stride(), x.storage_offset()) for s, x in zip(other.storages, self.table.x, strict=True)
        ]

        def moved(tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
            return None if tensors is None else [t.to(device, copy=True) for t in tensors]

        table = self.table
        other.table = dataclasses.replace(table, x=xs, v=moved(table.v), n=moved(table.n), cache={})
        other._arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self._arguments.items()}
        return other

    def run(self, backend: Backend) -> None:
        """The op on the table."""
        getattr(ops, self.plan.op)(self.table, backend=backend, **self._arguments)

    @property
    def alpha(self) -> Tensor | None:
        """The factor of the momentum product, (tensors,), if the op has one."""
        return self._arguments.get("alpha")
