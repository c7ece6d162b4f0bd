"""``python -m bench exactness``: checks that U V^T is the exact sum in whatever order matrix units add.

U and V are multiples of 2**-8, so U V^T is an integer times 2**-16, and fp32 holds integers up to 2**24. Each product is compared
with the integer sum: through ``torch.mm`` of fp16 with fp32 sums (matrix units), and as the kernels of the device add it to zeros.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from lozo_kernels.bench.arguments import positive, rank_number, several
from lozo_kernels.bench.deadline import Deadline
from lozo_kernels.bench.document import first_line, save_partial
from lozo_kernels.kernels import noise, ops
from lozo_kernels.kernels.calls import Draw
from lozo_kernels.kernels.noise import MAX_RANK
from lozo_kernels.kernels.registry import Backend, choose_backend
from lozo_kernels.kernels.table import TensorTable
from lozo_kernels.model.text_table import text_table

Row = dict[str, Any]

_LIMIT = 1 << 24  # integers up to it are exact in fp32
_GREATEST = 4.8984375  # of the noise on its grid: 1254 * 2**-8
_SEED = 0x5EED
KERNEL_RANKS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 33, 48, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    parser.add_argument("--size", type=positive, default=1024, help="rows and columns of a product (default: 1024)")
    parser.add_argument("--draws", type=positive, default=16, help="products a rank (default: 16)")
    parser.add_argument("--rank", type=several(rank_number), default=list(range(1, MAX_RANK + 1)), help="default: 1 to 64")
    parser.add_argument(
        "--kernel-rank",
        type=several(rank_number),
        default=list(KERNEL_RANKS),
        help="those of them that go through the kernels, whose code is made for each rank "
        f"(default: {','.join(map(str, KERNEL_RANKS))})",
    )


def measure(options: argparse.Namespace, document: Row) -> Row:
    """Counts the sums that are not exact."""
    backend = choose_backend(options.device).backend
    missing = mm_missing(options.device)
    document["mm_not_run"] = missing
    rows: list[Row] = []
    deadline = Deadline(options.seconds)
    for rank in sorted(options.rank, key=lambda rank: rank not in options.kernel_rank):
        if deadline.over():
            break
        kernels = backend if rank in options.kernel_rank else None
        rows.append(count(rank, options.size, options.draws, options.device, kernels, missing is None))
        if rank * (_GREATEST * 256) ** 2 <= _LIMIT and missing is None:
            rows.append(extremes(rank, options.size, options.device))
        save_partial(document, options.output, rows=rows)
    return {"greatest_sum": max((row["greatest_sum"] for row in rows), default=0), "rows": rows} | deadline.note()


def failed(document: Row) -> bool:
    """Whether a sum within 2**24 is not exact."""
    return any(row["mm_wrong"] or row["kernel_wrong"] for row in document["rows"])


def mm_missing(device: torch.device) -> str | None:
    """Returns why torch cannot multiply fp16 into fp32 on a device, or None if it can."""
    try:
        mm(torch.zeros(16, 16, dtype=torch.float16, device=device), torch.zeros(16, 16, dtype=torch.float16, device=device))
    except (RuntimeError, TypeError, NotImplementedError) as e:
        return first_line(e)
    return None


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Multiplies fp16 matrices; the sums and the result are fp32."""
    return torch.mm(a, b, out_dtype=torch.float32)


def count(rank: int, size: int, draws: int, device: torch.device, backend: Backend | None, with_mm: bool) -> Row:
    """Counts the inexact sums of a rank over fresh draws of U and V.

    ``beyond`` counts sums of more than 2**24, which nothing promises; they are not in the other counts.

    Args:
        backend: whose kernels are checked too; None for none.
    """
    row: Row = {"rank": rank, "values": "noise", "sums": 0, "greatest_sum": 0, "beyond": 0}
    row |= {"mm_wrong": 0 if with_mm else None, "kernel_wrong": None if backend is None else 0}
    for draw in range(draws):
        tensor_id = noise.tensor_id(f"exactness.{rank}.{draw}")
        u = noise.factor(_SEED, size, rank, tensor_id, draw, device=device).half()
        v = noise.factor(_SEED, size, rank, tensor_id, draw, stream="V", device=device).half().t().contiguous()
        x = None
        if backend is not None:
            table = TensorTable([torch.zeros(1, size, size, device=device)], [tensor_id], v=[v[None]])
            ops.lowrank_update_(table, seed=_SEED, draws=[Draw(draw)], scales=1.0, backend=backend)
            x = table.x[0][0]
        _tally(row, integer_sums(u, v), kernel=x, product=mm(u, v) if with_mm else None)
    return row


def extremes(rank: int, size: int, device: torch.device) -> Row:
    """Counts them for the worst that the noise could be: every value the greatest, with random signs. Checks ``torch.mm`` only."""
    row: Row = {"rank": rank, "values": "extremes", "sums": 0, "greatest_sum": 0, "beyond": 0, "mm_wrong": 0, "kernel_wrong": None}
    generator = torch.Generator().manual_seed(rank)
    u, v = (
        ((torch.randint(0, 2, shape, generator=generator) * 2 - 1) * _GREATEST).half().to(device)
        for shape in ((size, rank), (rank, size))
    )
    _tally(row, integer_sums(u, v), kernel=None, product=mm(u, v))
    return row


def integer_sums(u: Tensor, v: Tensor) -> Tensor:
    """Computes U V^T in units of 2**-16 in fp64, which holds every sum."""
    return (u.double() * 256) @ (v.double() * 256)


def _tally(row: Row, exact: Tensor, *, kernel: Tensor | None, product: Tensor | None) -> None:
    held = exact.abs() <= _LIMIT
    row["sums"] += exact.numel()
    row["greatest_sum"] = max(row["greatest_sum"], int(exact.abs().max()))
    row["beyond"] += int((~held).sum())
    for name, found in (("kernel_wrong", kernel), ("mm_wrong", product)):
        if found is not None:
            row[name] += int(((found.double() * 65536 != exact) & held).sum())


def render(document: Row) -> str:
    """Formats the rows as text."""
    header = ("rank", "values", "sums", "greatest |sum|", "beyond 2^24", "mm wrong", "kernel wrong")
    fields = ("sums", "greatest_sum", "beyond", "mm_wrong", "kernel_wrong")
    lines = [
        (str(row["rank"]), row["values"], *("-" if row[f] is None else str(row[f]) for f in fields)) for row in document["rows"]
    ]
    text = text_table([header, *lines], left=2)
    return text + (f"\n\nmm not run: {document['mm_not_run']}" if document["mm_not_run"] else "")
