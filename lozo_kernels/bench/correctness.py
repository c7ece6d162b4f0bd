"""``lozo-kernels bench correctness``: every backend of a device held to the CPU, bit for bit, on fresh random inputs."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import ops
from ..kernels.calls import Draw
from ..kernels.registry import Backend, backend_names, choose_backend
from .arguments import add_common, check_output, positive, several
from .cases import Case, plans
from .document import first_line, format_table, progress, publish, where
from .environment import OtherLoad

Row = dict[str, Any]

_EXACT_MOMENTUM_RANK = 8  # above it momentum products are bounded, not promised in bits
_MOST_FAILURES = 20  # that a document lists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this measurement."""
    add_common(parser)
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--backends", type=several(str), help="only these, also such as serve the device only when asked")
    parser.add_argument("--seconds", type=positive, help="begin no further case after so long (default: all cases)")
    parser.add_argument("--seed", type=int, help="of the inputs (default: fresh)")


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Checks and prints.

    Returns:
        0, or 1 if a bit differs or an op fails.

    Raises:
        InputError: the result cannot be written.
    """
    check_output(options.output)
    document = where(options.device, argv)
    others = OtherLoad()
    truth = cpu_backend()
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    backends, not_run = candidates(options.device, truth, options.backends)
    rows, failures, done, total = compare(backends, truth, options.device, seed, options.quick, options.seconds)
    document |= {"truth": f"{truth.name} on cpu", "seed": seed, "cases_done": done, "cases": total, "backends_not_run": not_run}
    document["cpus_used_by_others"] = others.mean()
    document |= {"targets": [], "rows": rows, "failures": failures[:_MOST_FAILURES]}
    publish(document, render, as_json=options.json, output=options.output)
    return 1 if failures else 0


def cpu_backend() -> Backend:
    """What others are held to: the native backend, or plain PyTorch where it was not built."""
    try:
        return choose_backend("cpu", "native").backend
    except RuntimeError:
        return choose_backend("cpu", "eager").backend


def candidates(device: torch.device, truth: Backend, names: Sequence[str] | None = None) -> tuple[list[Backend], dict[str, str]]:
    """The backends that serve a device, less the truth itself, and why the others are not checked.

    Args:
        names: those asked for; None for all that serve without being asked.

    Raises:
        InputError: there is no backend of that name.
    """
    unknown = set(names or ()) - set(backend_names())
    if unknown:
        raise InputError(f"no backend {', '.join(sorted(unknown))}; there are {', '.join(backend_names())}")
    found: list[Backend] = []
    not_run: dict[str, str] = {}
    for name in names or backend_names():
        try:
            backend = choose_backend(device, name).backend
        except RuntimeError as e:
            not_run[name] = first_line(e)
            continue
        reason = backend.opt_in_reason(device) if names is None else None
        if reason is not None:
            not_run[name] = reason
        elif backend is truth and device.type == "cpu":
            not_run[name] = "it is what the others are held to"
        else:
            found.append(backend)
    return found, not_run


def compare(
    backends: Sequence[Backend], truth: Backend, device: torch.device, seed: int, quick: bool, seconds: float | None
) -> tuple[list[Row], list[str], int, int]:
    """A row for each backend and op, the failures in words, how many cases were checked, and how many there are."""
    tally: dict[tuple[str, str], Row] = {}
    failures: list[str] = []
    chosen = plans(quick=quick)
    end = None if seconds is None else time.monotonic() + seconds
    done = 0
    for i, plan in enumerate(chosen):
        if end is not None and time.monotonic() > end:
            break
        done += 1
        case = Case(plan, seed + i)
        want = case.on(torch.device("cpu"))
        want.run(truth)
        for backend in backends:
            key = (backend.name, plan.op.rstrip("_"))
            row = tally.setdefault(key, {"backend": key[0], "op": key[1], "cases": 0, "values": 0, "wrong": 0, "errors": 0})
            row["cases"] += 1
            got = case.on(device)
            try:
                got.run(backend)
                values, wrong = count_wrong(got.on(torch.device("cpu")), want)
            except Exception as e:  # an op that cannot run is as wrong as one that gives other bits
                row["errors"] += 1
                failures.append(f"{backend.name} {plan}, seed {case.seed}: {type(e).__name__}: {first_line(e)}")
                progress(failures[-1])
                continue
            row["values"] += values
            row["wrong"] += wrong
            if wrong:
                failures.append(f"{backend.name} {plan}, seed {case.seed}: {wrong} of {values} values differ")
                progress(failures[-1])
    for backend in backends:
        row, wrong_factors = check_factors(backend, truth, device, seed)
        tally[(backend.name, "factor")] = row
        failures += wrong_factors
    return list(tally.values()), failures, done, len(chosen)


def check_factors(backend: Backend, truth: Backend, device: torch.device, seed: int) -> tuple[Row, list[str]]:
    """U, V and S on their own."""
    row: Row = {"backend": backend.name, "op": "factor", "cases": 0, "values": 0, "wrong": 0, "errors": 0}
    failures = []
    for i, (stream, rank) in enumerate((("U", 4), ("V", 1), ("S", 17), ("U", 64))):
        arguments: dict[str, Any] = {"stream": stream, "row_offset": 3 * i}
        position = (seed + i, 133, rank, 12345 + i, Draw(i, i))
        want = ops.factor(*position, backend=truth, **arguments)
        row["cases"] += 1
        try:
            got = ops.factor(*position, device=device, backend=backend, **arguments).cpu()
        except Exception as e:
            row["errors"] += 1
            failures.append(f"{backend.name} factor {stream} rank {rank}: {type(e).__name__}: {first_line(e)}")
            continue
        row["values"] += want.numel()
        wrong = int((got != want).sum())
        row["wrong"] += wrong
        if wrong:
            failures.append(f"{backend.name} factor {stream} rank {rank}, seed {seed + i}: {wrong} values differ")
    return row, failures


def count_wrong(got: Case, want: Case) -> tuple[int, int]:
    """How many values were compared - all storage, V and the momentum - and how many of them differ."""
    bounded = want.plan.op == "lowrank_momentum_" and want.plan.rank > _EXACT_MOMENTUM_RANK
    pairs = [*zip(got.table.v or (), want.table.v or (), strict=True), *zip(got.table.n or (), want.table.n or (), strict=True)]
    wrong = sum(int((_bits(g) != _bits(w)).sum()) for g, w in pairs)
    values = sum(w.numel() for _, w in pairs)
    for t, (g, w) in enumerate(zip(got.storages, want.storages, strict=True)):
        values += w.numel()
        wrong += _outside(got, want, t) if bounded else int((_bits(g) != _bits(w)).sum())
    return values, wrong


def _bits(t: Tensor) -> Tensor:
    """Bits, with every NaN made the same."""
    t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
    return t.contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16)


def _outside(got: Case, want: Case, t: int) -> int:
    """How many values of a tensor differ by more than two summations of its momentum product may, or lie in a gap and changed."""
    table = want.table
    assert table.v is not None and table.n is not None and want.alpha is not None
    x, y = table.x[t].double(), got.table.x[t].double()
    sums = want.alpha[t].abs().double() * (table.n[t].abs().double() @ table.v[t].abs().double()) + x.abs()
    unit = torch.finfo(table.x[t].dtype).eps
    bound = 2 * table.rank * 2.0**-23 * sums + 2 * unit * x.abs() + 2.0**-23
    gaps = int((got.storages[t].isnan() != want.storages[t].isnan()).sum())
    return gaps + int((~((x - y).abs() <= bound)).sum())


def render(document: Row) -> str:
    """The rows and the failures as text."""
    header = ("backend", "op", "cases", "values", "wrong", "errors")
    lines = [
        (r["backend"], r["op"], str(r["cases"]), str(r["values"]), str(r["wrong"]), str(r["errors"])) for r in document["rows"]
    ]
    text = [format_table(header, lines, left=2)]
    text.append(f"\n{document['cases_done']} of {document['cases']} cases against {document['truth']}, seed {document['seed']}")
    text += [f"not checked: {name}: {reason}" for name, reason in document["backends_not_run"].items()]
    return "\n".join([*text, *document["failures"]])
