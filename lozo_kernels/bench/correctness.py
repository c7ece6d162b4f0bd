"""``lozo-kernels bench correctness``: compares every backend of a device with the CPU, bit for bit, on fresh random inputs."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import InputError
from ..kernels import ops
from ..kernels.calls import Draw
from ..kernels.registry import Backend, backend_names, choose_backend
from ..kernels.table import DTYPES
from ..model.text_table import text_table
from .arguments import add_choice, several
from .cases import OPS, Case, Op, compare, random_case
from .deadline import Deadline
from .document import first_line, progress, save_partial
from .layer_cases import EMBEDDING, LINEAR, LayerCase, LayerPlan, layer_plans, quick_layer_plans

Row = dict[str, Any]

RANKS = (4, 1, 16, 2, 64, 8, 3, 9, 32, 5, 17, 33)
"""The ranks that matter most come first, so that a check that runs out of time has seen them."""

_SHAPES = {
    "odd": ((1, 5, 3), (1, 33, 129), (2, 17, 64), (1, 1, 70), (1, 64, 1), (3, 16, 40), (1, 0, 5), (1, 257, 72)),
    "large": ((1, 1040, 2048), (1, 24, 8)),  # enough aligned elements for the launches that move 128 bits at a time
    "tiny": ((1, 33, 129), (1, 64, 64)),
}
_MOST_FAILURES = 20  # that a document lists
_SAVE_EVERY = 10  # cases


ALL_OPS = (*OPS, LINEAR, EMBEDDING)
"""What is checked, beside ``factor``. ``resample_`` re-projects momentum too."""


class Plan(NamedTuple):
    """A case before its random inputs are drawn.

    Attributes:
        op: its name.
        layout: of :data:`_SHAPES`: "odd" (gaps and offsets of any size), "large" (aligned) or "tiny".
        dtype: of all tensors; None for a mixture.
        rank: 0 for ops without one.
        draws: how many. A merge with a draw writes into other memory.
        decay: whether there is weight decay; for ``resample_``, whether momentum is carried over.
        stochastic: whether weights are rounded stochastically.
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

    def case(self, seed: int) -> Case:
        """Draws the case of a seed, on the CPU. The state of torch's generators stays as it is."""
        call = {"draws": self.draws, "decay": self.decay, "stochastic": self.stochastic, "reproject": self.decay}
        tensors: dict[str, Any] = {"n": self.decay, "size": 0.1, "special": 1e-3}
        tensors |= {"dtypes": DTYPES if self.dtype is None else (self.dtype,), "step": 8 if self.layout == "large" else 1}
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            shapes, rng = _SHAPES[self.layout], random.Random(seed)
            return random_case(rng, OPS[self.op], shapes, self.rank, call=call, apart=self.draws > 0, **tensors)


def plans(*, quick: bool) -> list[Plan | LayerPlan]:
    """Lists all cases, the most important first; with ``quick`` a few small ones, and for each op one that fast kernels take."""
    if quick:
        kinds = ((torch.bfloat16, 4), (None, 1), (torch.float32, 17))
        small = [_plan(op, "tiny", dtype, rank, i) for op in OPS.values() for i, (dtype, rank) in enumerate(kinds)]
        large = [_plan(op, "large", torch.bfloat16, 4, 1) for op in OPS.values()]
        return list(dict.fromkeys([*small, *quick_layer_plans(), *large]))
    found: list[Plan | LayerPlan] = []
    for i, rank in enumerate(RANKS):
        for op in sorted(OPS.values(), key=lambda op: op.along_rows):  # dense ops, which come once, first
            if op.along_rows:
                found += [_plan(op, "odd", None, rank, kind) for kind in (0, 1)]
                # Every dtype takes a turn at every rank, with arguments that change from rank to rank.
                found += [_plan(op, "large", dtype, rank, i + d) for d, dtype in enumerate(DTYPES)]
            elif i == 0:
                found += [_plan(op, "odd", None, 0, kind) for kind in range(4)]
                found += [_plan(op, "large", dtype, 0, kind) for kind in range(4) for dtype in DTYPES]
        found += layer_plans(rank, first=i == 0, turn=i)
    return list(dict.fromkeys(found))


def _plan(op: Op, layout: str, dtype: torch.dtype | None, rank: int, kind: int) -> Plan:
    """Plans a case with one of four kinds of arguments, as far as the op takes them."""
    most, decay, stochastic = ((False, False, False), (True, True, True), (True, False, False), (False, True, False))[kind % 4]
    dtype, rank = torch.float32 if op.factors else dtype, rank if op.along_rows else 0
    return Plan(op.name, layout, dtype, rank, op.draws[most], decay, stochastic and op.rounding)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    add_choice(parser, "ops", ALL_OPS, list(ALL_OPS), "only these ops (default: all)")
    parser.add_argument("--backends", type=several(str), help="only these, also such as serve the device only when asked")
    parser.add_argument("--seed", type=int, help="of the inputs (default: fresh)")


def measure(options: argparse.Namespace, document: Row) -> Row:
    """Counts the values that differ from those of the CPU."""
    truth = cpu_backend()
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    backends, not_run = candidates(options.device, truth, options.backends)
    chosen = [plan for plan in plans(quick=options.quick) if plan.op in options.ops]
    deadline = Deadline(options.seconds)
    document |= {"truth": f"{truth.name} on cpu", "seed": seed, "cases_done": 0, "cases": len(chosen)}
    document |= {"backends_not_run": not_run}

    def save(rows: list[Row], failures: list[str], done: int) -> None:
        document["cases_done"] = done
        if done % _SAVE_EVERY == 0:
            save_partial(document, options.output, rows=rows, failures=failures[:_MOST_FAILURES])

    rows, failures, done = hold(backends, truth, options.device, seed, chosen, deadline=deadline, after_each=save)
    return {"rows": rows, "failures": failures[:_MOST_FAILURES], "cases_done": done} | deadline.note()


def failed(document: Row) -> bool:
    """Whether a bit differs or an op fails."""
    return bool(document["failures"])


def cpu_backend() -> Backend:
    """Returns the backend that others are compared with: the native one, or plain PyTorch where that was not built."""
    try:
        return choose_backend("cpu", "native").backend
    except RuntimeError:
        return choose_backend("cpu", "eager").backend


def candidates(device: torch.device, truth: Backend, names: Sequence[str] | None = None) -> tuple[list[Backend], dict[str, str]]:
    """Finds the backends of a device that are to be checked, and says why others are not.

    Args:
        truth: the backend that others are compared with, which is not checked on the CPU.
        names: the backends that were asked for; None for all that serve the device without being asked for.

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


def hold(
    backends: Sequence[Backend],
    truth: Backend,
    device: torch.device,
    seed: int,
    chosen: Sequence[Plan | LayerPlan],
    deadline: Deadline | None = None,
    after_each: Callable[[list[Row], list[str], int], None] = lambda *_: None,
) -> tuple[list[Row], list[str], int]:
    """Compares backends with ``truth`` on the CPU.

    Args:
        deadline: after it no case is begun.
        after_each: called after every case with what would be returned then.

    Returns:
        A row for each backend and op, the failures in words, and how many cases were checked.
    """
    tally: dict[tuple[str, str], Row] = {}
    failures: list[str] = []

    def note(backend: Backend, op: str, what: str, counts: Row) -> None:
        empty = {"backend": backend.name, "op": op, "cases": 0, "values": 0, "wrong": 0, "errors": 0}
        row = tally.setdefault((backend.name, op), empty)
        for key, count in ({"cases": 1} | counts).items():
            if key != "text":
                row[key] += count
        if counts.get("wrong") or counts.get("errors"):
            failures.append(f"{backend.name} {what}: {counts['text']}")
            progress(failures[-1])

    done = 0
    for i, plan in enumerate(chosen):
        if deadline is not None and deadline.over():
            break
        done += 1
        case = plan.case(seed + i)
        want = case.on()
        want.run(truth)
        for backend in backends:
            note(backend, plan.op.rstrip("_"), f"{plan}, seed {seed + i}", _differences(backend, case.on(device), want))
        after_each(list(tally.values()), failures, done)
    for backend in backends:
        for i, (stream, rank) in enumerate((("U", 4), ("V", 1), ("S", 17), ("U", 64))):
            found = _wrong_factor(backend, truth, device, seed + i, stream, rank)
            note(backend, "factor", f"factor {stream} rank {rank}, seed {seed + i}", found)
    return list(tally.values()), failures, done


def _differences(backend: Backend, case: Case | LayerCase, want: Case | LayerCase) -> Row:
    """Runs and compares a case; returns its counts, and in words what is wrong."""
    try:
        case.run(backend)
        got = case.on()
        if isinstance(got, LayerCase):
            assert isinstance(want, LayerCase)
            found = got.compare(want)
        else:
            assert isinstance(want, Case)
            found = compare(got, want)
    except Exception as e:  # an op that cannot run is as wrong as one that gives other bits
        return {"errors": 1, "text": f"{type(e).__name__}: {first_line(e)}"}
    wrong = [c for c in found if c.wrong]
    text = "; ".join(c.text for c in wrong[:2])
    return {"values": sum(c.values for c in found), "wrong": sum(c.wrong for c in wrong), "text": text}


def _wrong_factor(backend: Backend, truth: Backend, device: torch.device, seed: int, stream: str, rank: int) -> Row:
    """Does the same for U, V or S on its own."""

    def make(by: Backend, where: torch.device | str) -> torch.Tensor:
        return ops.factor(seed, 133, rank, 12345, Draw(rank, rank), stream=stream, row_offset=rank, device=where, backend=by).cpu()

    want = make(truth, "cpu")
    try:
        wrong = int((make(backend, device) != want).sum())
    except Exception as e:
        return {"errors": 1, "text": f"{type(e).__name__}: {first_line(e)}"}
    return {"values": want.numel(), "wrong": wrong, "text": f"{wrong} of {want.numel()} values differ"}


def render(document: Row) -> str:
    """Formats the rows and the failures as text."""
    header = ("backend", "op", "cases", "values", "wrong", "errors")
    text = [text_table([header, *([str(row[key]) for key in header] for row in document["rows"])], left=2)]
    text.append(f"\n{document['cases_done']} of {document['cases']} cases against {document['truth']}, seed {document['seed']}")
    text += [f"not checked: {name}: {reason}" for name, reason in document["backends_not_run"].items()]
    return "\n".join([*text, *document["failures"]])
