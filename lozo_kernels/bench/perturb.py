"""``lozo-kernels bench perturb``: the speed of one pass over the weights in GB/s, beside the floor and the peers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError
from ..kernels.registry import Backend, choose_backend
from ..model.text_table import text_table
from . import peers
from .arguments import DTYPE_NAMES, add_choice, positive, rank_number, several, shape_label
from .clock import Clock, clock_for
from .deadline import Deadline
from .document import first_line, progress, save_partial
from .environment import last_level_cache
from .gate import check, check_small
from .models import MODELS, parameter_shapes
from .op_calls import OpCall, Weights, dense_calls, lowrank_calls, make_weights, nbytes
from .timing import Contender, Seconds, interleave, median, paired_ratio, spread

Row = dict[str, Any]

BESIDE: dict[str, dict[str, tuple[str, int]]] = {
    "lowrank_update": {"addmm": ("addmm", 1), "reference": ("published lozo", 1), "compiled": ("compiled lozo", 1)},
    "lowrank_update_2": {
        "addmm": ("addmm of twice the rank", 1),
        "reference": ("published lozo", 2),
        "compiled": ("compiled lozo", 2),
    },
    "lowrank_momentum": {"addmm": ("addmm momentum", 1), "reference": ("published lozo-m", 1)},
    "lowrank_signed_update": {"addmm": ("addcmul of two products", 1)},
    "dense_update": {"reference": ("published mezo", 1), "compiled": ("compiled mezo", 1), "foreach": ("foreach", 1)},
    "dense_update_signs": {"reference": ("published mezo", 1)},
}
"""For every op and column, what it is compared with and how many passes of that do the same work."""

COLUMNS = ("floor", "copy", "inplace", "addmm", "reference", "compiled", "foreach")
"""What a row compares its op with: ``{column}_gbps``."""

_FLOOR_BYTES = 8 << 30  # a floor needs a buffer of its own beside the weights, and more bytes do not change its speed
_HOST_CALLS = 5
_NOISE_BYTES = 2 << 30  # on the CPU, where too much memory ends the process: what a peer may hold beside the weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    add_choice(parser, "dtype", DTYPE_NAMES, ["bfloat16", "float32"])
    parser.add_argument("--rank", type=several(rank_number), default=[1, 2, 4, 8], help="default: 1,2,4,8")
    parser.add_argument("--shapes", type=several(shape_label), help="matrices, as in 8192x8192,32768x2048, which is the default")
    text = "models whose weight list is one case; needs transformers; default without --shapes: opt-125m"
    add_choice(parser, "model-shapes", MODELS, None, text)
    parser.add_argument("--repeats", type=positive, default=20, help="interleaved rounds (default: 20)")
    parser.add_argument("--peer-repeats", type=positive, default=3, help="rounds that the slow published code joins (default: 3)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also measure the published expressions through torch.compile (default: on a GPU only)",
    )
    parser.add_argument("--compile-rank", type=several(rank_number), default=[4], help="at these ranks (default: 4)")


def measure(options: argparse.Namespace, document: Row) -> Row:
    """Measures every op on every set of weights.

    Raises:
        InputError: a model was asked for without transformers.
        GateError: an op disagrees with its reference.
    """
    backend = choose_backend(options.device).backend
    clock = clock_for(options.device, cold=True)
    on_gpu = options.device.type == "cuda"
    document |= {"caches": clock.cold, "floor": "copy_" if on_gpu else "mul_"}
    compiling = on_gpu if options.compile is None else options.compile
    bench = PerturbBench(
        options.device, backend, clock, options.repeats, options.peer_repeats, options.compile_rank if compiling else []
    )
    rows: list[Row] = []
    details: list[Row] = []
    deadline = Deadline(options.seconds)
    for label in _labels(options):
        for name in options.dtype:
            if deadline.over():
                break
            for row, detail in bench.measure(label, DTYPE_NAMES[name], options.rank, deadline):
                rows.append(row)
                details.append(detail)
                save_partial(document, options.output, rows=rows, details=details)
    return {"rows": rows, "details": details} | deadline.note()


def _labels(options: argparse.Namespace) -> list[str]:
    labels = [*(options.model_shapes or ()), *(options.shapes or ())]
    if labels:
        return labels
    labels = ["8192x8192", "32768x2048"]
    try:
        parameter_shapes("opt-125m")
        labels.append("opt-125m")
    except InputError as e:
        progress(f"opt-125m is left out: {e}")
    return labels


class PerturbBench:
    """Measures ops on one set of weights after the other.

    Args:
        compile_ranks: ranks at which the published expressions are compiled too; the dense one is, if there is any.
    """

    def __init__(
        self,
        device: torch.device,
        backend: Backend,
        clock: Clock,
        repeats: int,
        peer_repeats: int = 3,
        compile_ranks: Sequence[int] = (),
    ) -> None:
        self.device, self.backend, self.clock = device, backend, clock
        self.repeats, self.peer_repeats = repeats, peer_repeats
        self.compile_ranks = compile_ranks

    def measure(
        self, label: str, dtype: torch.dtype, ranks: Sequence[int], deadline: Deadline | None = None
    ) -> Iterator[tuple[Row, Row]]:
        """Yields the rows of one set of weights, each with its details: ratios within a round, and quantiles.

        Dense rows come before those of the ranks.

        Args:
            label: as for :func:`~lozo_kernels.bench.op_calls.make_weights`.
            deadline: after it no rank is begun.

        Raises:
            GateError: an op disagrees with its reference.
        """
        torch.manual_seed(0)
        weights = make_weights(label, dtype, self.device)
        floors = self._floors(nbytes(weights.matrices))
        cache = last_level_cache()
        if self.device.type == "cpu" and cache is not None and nbytes(weights.matrices) < 4 * cache:
            progress(f"{label}: less than four times the last-level cache of {cache >> 20} MiB, so this is not memory speed")
        yield from self._measure_calls(weights, dense_calls(weights.dense_table(), self.backend), 0, floors)
        for rank in ranks:
            if deadline is not None and deadline.over():
                return
            calls = lowrank_calls(weights.lowrank_table(rank, self.backend), self.backend)
            yield from self._measure_calls(weights, calls, rank, floors)

    def _floors(self, size: int) -> dict[str, tuple[int, peers.Pass]]:
        """Returns for each floor the bytes of its buffer and a pass over it."""
        buffer = torch.ones(min(size, _FLOOR_BYTES) // 4, device=self.device, dtype=torch.float32)
        floors = {"inplace": peers.inplace_pass(buffer)}
        if self.device.type == "cuda":
            floors["copy"] = peers.copy_pass(buffer)
        floors["floor"] = floors.get("copy", floors["inplace"])
        return {column: (nbytes([buffer]), call) for column, call in floors.items()}

    def _measure_calls(
        self, weights: Weights, calls: dict[str, OpCall], rank: int, floors: Mapping[str, tuple[int, peers.Pass]]
    ) -> Iterator[tuple[Row, Row]]:
        table = next(iter(calls.values())).case.table
        dtype = str(table.x[0].dtype).removeprefix("torch.")
        progress(f"{weights.label} {dtype}" + (f" rank {rank}" if rank else " dense"))
        for name, call in calls.items():
            check_small(name, table.x[0].dtype, call)
            check(name, weights.label, call)
        contenders = {column: Contender(call) for column, (_, call) in floors.items() if column != "floor"}
        contenders |= {name: Contender(call.run) for name, call in calls.items()}
        ready, not_run = self._peers(weights, rank)
        seconds = interleave(contenders | ready, self.repeats, clock=self.clock)
        seconds["floor"] = seconds["copy" if "copy" in seconds else "inplace"]

        moved = nbytes(table.x)
        for name in calls:
            beside: dict[str, tuple[int, Seconds]] = {column: (size, seconds[column]) for column, (size, _) in floors.items()}
            missing: dict[str, str] = {}
            for column, (other, passes) in BESIDE[name].items():
                if other in not_run:
                    missing[column] = not_run[other]
                else:
                    beside[column] = (moved, {i: passes * s for i, s in seconds[other].items()})
            key = {"op": name, "dtype": dtype, "rank": rank or None, "shape": weights.label}
            row: Row = key | {"gbps": gbps(moved, seconds[name])}
            row |= {f"{column}_gbps": gbps(*beside[column]) if column in beside else None for column in COLUMNS}
            row |= {"host_us": self._host_us(calls[name]), "not_run": missing}
            ratios = {column: round(paired_ratio(s, seconds[name]) * moved / size, 4) for column, (size, s) in beside.items()}
            times = {"op": spread(seconds[name])} | {column: spread(s) for column, (_, s) in beside.items()}
            yield row, key | {"ratios": ratios, "seconds": times}

    def _host_us(self, call: OpCall) -> float | None:
        """Returns the microseconds until a call on a GPU returns, before its work is done. None elsewhere."""
        if self.device.type != "cuda":
            return None
        seconds = []
        for _ in range(_HOST_CALLS):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            call.run()
            seconds.append(time.perf_counter() - start)
        return round(1e6 * median(seconds), 1)

    def _peers(self, weights: Weights, rank: int) -> tuple[dict[str, Contender], dict[str, str]]:
        """Prepares the peers that run here, and says why the others do not. Rank 0 means the dense op."""
        ready: dict[str, Contender] = {}
        not_run: dict[str, str] = {}
        for name in peers.LOWRANK if rank else peers.DENSE:
            reason = self._left_out(name, weights, rank)
            if reason is not None:
                not_run[name] = reason
                continue
            slow = name.startswith("published")
            try:
                call = peers.LOWRANK[name](weights.matrices, rank) if rank else peers.DENSE[name](weights.all)
                if not slow or self.device.type == "cuda":
                    call()
            except Exception as e:  # whatever a peer or its compiler dies of, this library is measured all the same
                not_run[name] = f"{type(e).__name__}: {first_line(e)}"
                progress(f"{name} cannot run: {not_run[name]}")
                continue
            ready[name] = Contender(call, self.peer_repeats if slow else None, warm_up=False)
        return ready, not_run

    def _left_out(self, name: str, weights: Weights, rank: int) -> str | None:
        """Returns why a peer is not tried, or None."""
        if name == "foreach" and self.device.type == "cpu" and nbytes(weights.all) > _NOISE_BYTES:
            return f"not tried: it holds noise of {nbytes(weights.all) >> 20} MiB beside the weights"
        if name.startswith("compiled") and not self.compile_ranks:
            return "not asked for (--compile)"
        if name.startswith("compiled") and rank and rank not in self.compile_ranks:
            return f"not asked for at this rank (--compile-rank {','.join(map(str, self.compile_ranks))})"
        return None


def gbps(size: int, seconds: Seconds) -> float:
    """Converts the median time of a pass that reads and writes ``size`` bytes to GB/s."""
    return round(2e-9 * size / median(seconds.values()), 2)


def render(document: Row) -> str:
    """Formats the rows as text."""

    def ratio(detail: Row, peer: str, form: str) -> str:
        return form.format(detail["ratios"][peer]) if peer in detail["ratios"] else "-"

    columns = [("floor", "of floor", "{:.2f}"), ("addmm", "x addmm_", "{:.2f}"), ("reference", "x published", "{:.1f}")]
    extra = [("compiled", "x compiled", "{:.2f}"), ("foreach", "x no noise", "{:.2f}")]
    columns += [c for c in extra if any(c[0] in detail["ratios"] for detail in document["details"])]
    header = ("op", "dtype", "rank", "shape", "GB/s", *(title for _, title, _ in columns))
    lines = [
        [row["op"], row["dtype"], str(row["rank"] or "-"), row["shape"], f"{row['gbps']:.1f}"]
        + [ratio(detail, column, form) for column, _, form in columns]
        for row, detail in zip(document["rows"], document["details"], strict=True)
    ]
    return text_table([header, *lines], left=4)
