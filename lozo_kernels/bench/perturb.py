"""``lozo-kernels bench perturb``: one pass over the weights, in GB/s, beside the floor and the peers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..environment import OtherLoad, environment, last_level_cache
from ..registry import Backend, choose_backend
from . import peers
from .arguments import DTYPE_NAMES, add_common, check_output, dtype_name, model_name, positive, rank_number, several, shape_label
from .document import format_table, progress, publish
from .gate import check, check_small
from .timing import Contender, Seconds, interleave, median, paired_ratio, spread, synchronizer
from .weights import OpCall, Weights, dense_calls, lowrank_calls, make_weights, nbytes

Row = dict[str, Any]

TARGETS = (
    ("lowrank_update", "float32", (1, 2, 4), "floor", 0.85),
    ("lowrank_update", "float32", (8,), "floor", 0.70),
    ("lowrank_update", "bfloat16", (1, 2, 4), "floor", 0.60),
    ("lowrank_update", "bfloat16", (8,), "floor", 0.45),
    ("dense_update", "float32", (None,), "floor", 0.25),
    ("dense_update", "bfloat16", (None,), "floor", 0.13),
    ("lowrank_update", "float32", (4,), "addmm", 1.7),
    ("lowrank_update", "bfloat16", (4,), "addmm", 1.7),
    ("lowrank_update", "float32", (1, 2, 4, 8), "reference", 20.0),
    ("lowrank_update", "bfloat16", (1, 2, 4, 8), "reference", 20.0),
    ("dense_update", "float32", (None,), "reference", 12.0),
    ("dense_update", "bfloat16", (None,), "reference", 12.0),
)
"""The project's goals on two threads of an AVX-512 CPU: op, dtype, ranks, compared with what, the least ratio of speeds."""

BESIDE: dict[str, dict[str, tuple[str, int]]] = {
    "lowrank_update": {"addmm": ("addmm", 1), "reference": ("published lozo", 1)},
    "lowrank_update_2": {"addmm": ("addmm of twice the rank", 1), "reference": ("published lozo", 2)},
    "lowrank_momentum": {"addmm": ("addmm momentum", 1), "reference": ("published lozo-m", 1)},
    "dense_update": {"reference": ("published mezo", 1)},
}
"""For every op and column, what it is compared with and how many passes of that do the same work."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this measurement."""
    add_common(parser)
    parser.add_argument("--dtype", type=several(dtype_name), default=["bfloat16", "float32"], help="default: bfloat16,float32")
    parser.add_argument("--rank", type=several(rank_number), default=[1, 2, 4, 8], help="default: 1,2,4,8")
    parser.add_argument("--shapes", type=several(shape_label), help="matrices, as in 8192x8192,32768x2048, which is the default")
    parser.add_argument(
        "--model-shapes", type=several(model_name), help="models whose weight list is one case; default without --shapes: opt-125m"
    )
    parser.add_argument("--repeats", type=positive, default=20, help="interleaved rounds (default: 20)")
    parser.add_argument("--peer-repeats", type=positive, default=3, help="rounds that the slow published code joins (default: 3)")


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures and prints.

    Raises:
        InputError: the result cannot be written.
        GateError: an op disagrees with its reference; nothing is printed.
    """
    check_output(options.output)
    labels = [*(options.shapes or ()), *(options.model_shapes or ())]
    if not labels:
        labels = ["8192x8192", "32768x2048", "opt-125m"]
    backend = choose_backend(options.device).backend
    document = environment(options.device, argv)
    others = OtherLoad()
    rows: list[Row] = []
    details: list[Row] = []
    for label in labels:
        for name in options.dtype:
            for row, detail in measure(
                label, DTYPE_NAMES[name], options.rank, options.device, backend, options.repeats, options.peer_repeats
            ):
                rows.append(row)
                details.append(detail)
    document["cpus_used_by_others"] = others.mean()
    document |= {"targets": judge(details), "rows": rows, "details": details}
    publish(document, render, as_json=options.json, output=options.output)
    return 0


def measure(
    label: str,
    dtype: torch.dtype,
    ranks: Sequence[int],
    device: torch.device,
    backend: Backend,
    repeats: int,
    peer_repeats: int = 3,
) -> Iterator[tuple[Row, Row]]:
    """The rows of one set of weights, each with its details: ratios within a round, and quantiles.

    Args:
        label: as for :func:`~lozo_kernels.bench.weights.make_weights`.

    Raises:
        GateError: an op disagrees with its reference.
    """
    torch.manual_seed(0)
    weights = make_weights(label, dtype, device)
    floor = torch.ones(nbytes(weights.matrices) // 4, device=device)
    cache = last_level_cache()
    if device.type == "cpu" and cache is not None and nbytes(weights.matrices) < 4 * cache:
        progress(f"{label}: less than four times the last-level cache of {cache >> 20} MiB, so this is not memory speed")
    for rank in ranks:
        calls = lowrank_calls(weights.lowrank_table(rank, backend), backend)
        yield from _measure_calls(weights, calls, lowrank_peers(weights, rank), floor, repeats, peer_repeats)
    calls = dense_calls(weights.dense_table(), backend)
    yield from _measure_calls(weights, calls, dense_peers(weights), floor, repeats, peer_repeats)


def lowrank_peers(weights: Weights, rank: int) -> dict[str, peers.Pass]:
    """What the low-rank ops are compared with, by the names of :data:`BESIDE`."""
    xs = weights.matrices
    return {
        "addmm": peers.addmm_pass(xs, rank),
        # Two draws are one product of twice the rank, once [U0 U1] and [V V] lie side by side.
        "addmm of twice the rank": peers.addmm_pass(xs, 2 * rank),
        "addmm momentum": peers.addmm_momentum_pass(xs, rank),
        "published lozo": peers.published_lozo_pass(xs, rank),
        "published lozo-m": peers.published_lozo_m_pass(xs, rank),
    }


def dense_peers(weights: Weights) -> dict[str, peers.Pass]:
    """What the dense op is compared with."""
    return {"published mezo": peers.published_mezo_pass(weights.all)}


def _measure_calls(
    weights: Weights, calls: dict[str, OpCall], others: dict[str, peers.Pass], floor: Tensor, repeats: int, peer_repeats: int
) -> Iterator[tuple[Row, Row]]:
    table = next(iter(calls.values())).table
    dtype = str(table.x[0].dtype).removeprefix("torch.")
    progress(f"{weights.label} {dtype}" + (f" rank {table.rank}" if table.rank else " dense"))
    for name, call in calls.items():
        check_small(name, table.x[0].dtype, call)
        check(name, weights.label, call)
    contenders = {"floor": Contender(peers.floor_pass(floor))} | {name: Contender(call.run) for name, call in calls.items()}
    for name, other in others.items():
        slow = name.startswith("published")
        contenders[name] = Contender(other, peer_repeats if slow else None, warm_up=not slow)
    seconds = interleave(contenders, repeats, synchronize=synchronizer(floor.device))

    moved = nbytes(table.x)
    for name in calls:
        beside: dict[str, tuple[int, Seconds]] = {"floor": (nbytes([floor]), seconds["floor"])}
        for column, (other_name, passes) in BESIDE[name].items():
            beside[column] = (moved, {i: passes * s for i, s in seconds[other_name].items()})
        key = {"op": name, "dtype": dtype, "rank": table.rank or None, "shape": weights.label}
        row = key | {"gbps": gbps(moved, seconds[name])}
        row |= {f"{column}_gbps": gbps(*beside[column]) if column in beside else None for column in ("floor", "addmm", "reference")}
        ratios = {column: round(paired_ratio(s, seconds[name]) * moved / size, 4) for column, (size, s) in beside.items()}
        times = {"op": spread(seconds[name])} | {column: spread(s) for column, (_, s) in beside.items()}
        yield row, key | {"ratios": ratios, "seconds": times}


def gbps(size: int, seconds: Seconds) -> float:
    """GB/s of a median pass that reads and writes ``size`` bytes."""
    return round(2e-9 * size / median(seconds.values()), 2)


def judge(details: Sequence[Row]) -> list[Row]:
    """Every target that was measured, with the worst ratio of speeds."""
    judged = []
    for op, dtype, ranks, peer, least in TARGETS:
        ratios = [
            d["ratios"][peer]
            for d in details
            if d["op"] == op and d["dtype"] == dtype and d["rank"] in ranks and peer in d["ratios"]
        ]
        if ratios:
            judged.append(
                {"op": op, "dtype": dtype, "ranks": list(ranks), "ratio_to": peer, "target": least}
                | {"worst": min(ratios), "met": min(ratios) >= least}
            )
    return judged


def render(document: Row) -> str:
    """The rows and the targets as text."""

    def ratio(detail: Row, peer: str, form: str) -> str:
        return form.format(detail["ratios"][peer]) if peer in detail["ratios"] else "-"

    header = ("op", "dtype", "rank", "shape", "GB/s", "of floor", "x addmm_", "x published")
    lines = [
        (
            row["op"],
            row["dtype"],
            str(row["rank"] or "-"),
            row["shape"],
            f"{row['gbps']:.1f}",
            ratio(detail, "floor", "{:.2f}"),
            ratio(detail, "addmm", "{:.2f}"),
            ratio(detail, "reference", "{:.1f}"),
        )
        for row, detail in zip(document["rows"], document["details"], strict=True)
    ]
    table = format_table(header, lines, left=4)
    goals = [
        f"{'met   ' if t['met'] else 'missed'}  {t['op']} {t['dtype']}"
        + (f" rank {', '.join(map(str, t['ranks']))}" if t["ranks"] != [None] else "")
        + f": worst {t['worst']:g} of {t['ratio_to']}, target {t['target']:g}"
        for t in document["targets"]
    ]
    return "\n".join([table, "", *goals]) if goals else table
