"""``python -m bench kernels``: compiles what the later stages of ``make bench-gpu`` launch, on all cores, into Triton's cache.

It needs no GPU. Stages whose kernels are found quickly come first, so that the compiling processes have work; the tuner's are last.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

from bench import launched, stages
from bench.ahead import Compilers, Note, forget, stubbed
from lozo_kernels.bench.arguments import add_choice, positive, several
from lozo_kernels.bench.deadline import Deadline, process_seconds
from lozo_kernels.bench.document import progress, save_partial
from lozo_kernels.errors import InputError
from lozo_kernels.kernels.backends.triton.launcher import Launcher
from lozo_kernels.model.text_table import text_table

Row = dict[str, Any]

_MORE = ("llama-3-8b", "qwen3-4b", "opt-1.3b")


Make = Callable[[Note], None]
"""Makes the calls of a stage."""


def launches(device_name: str | None) -> dict[str, Make]:
    """Returns for each stage a function that makes its calls."""
    d = device_name
    probed = next(iter(stages.PROBED.values()))
    return {
        "throughput": lambda note: launched.throughput(note, d, ["opt-13b", "8192x8192"], ["bfloat16"], stages.RANKS),
        "step": lambda note: launched.step(note, d, stages.STEP_METHODS),
        "memory": lambda note: launched.step(note, d, stages.GOAL_METHODS),
        "correctness": lambda note: launched.correctness(note, d),
        "tests": lambda note: launched.tests(note, d),
        "exactness": lambda note: launched.exactness(note, d),
        "probe": lambda note: launched.probe(note, d, list(stages.PROBED), probed, stages.PROBED_LENGTH),
        "throughput-dtypes": lambda note: launched.throughput(note, d, ["opt-13b"], ["float16", "float32"], [4]),
        "throughput-models": lambda note: launched.throughput(note, d, _MORE, ["bfloat16"], [4]),
        "memcheck": lambda note: launched.correctness(note, d, quick=True),
        "tune": lambda note: launched.tuning(note, d),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    parser.add_argument("--capability", default="9.0", help="of the NVIDIA GPU to compile for (default: 9.0)")
    parser.add_argument("--device-name", help="of the GPU, whose tile sizes are taken (default: the default sizes)")
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1, help="that compile (default: one a core)")
    parser.add_argument("--nice", type=int, default=0, help="how much they stand back for other processes (default: 0)")
    add_choice(parser, "stages", launches(None), list(launches(None)), "whose kernels (default: all)")
    parser.add_argument("--rank", type=several(positive), help="of the stage exactness (default: all of it); for tests")
    parser.add_argument(
        "--launch", action="store_true", help="compile nothing ahead: launch on a driver that does nothing, to see what that costs"
    )


def measure(options: argparse.Namespace, document: Row) -> Row:
    """Compiles, and tells what each stage took.

    Raises:
        InputError: Triton is missing or was asked to interpret kernels.
    """
    document |= {"capability": options.capability, "device_name": options.device_name, "processes": options.processes}
    deadline, rows = Deadline(options.seconds), []
    chosen = {name: make for name, make in launches(options.device_name).items() if name in options.stages}
    if options.rank:
        chosen["exactness"] = lambda note: launched.exactness(note, options.device_name, options.rank)
    try:
        with stubbed(options.capability):
            if options.launch:
                return {"rows": [_launched(name, make) for name, make in chosen.items()]}
            compilers = Compilers(options.processes, options.nice)
            try:
                seconds = {name: _found(name, make, compilers) for name, make in chosen.items() if not deadline.over()}
                document["found_after_seconds"] = round(process_seconds(), 1)
                while not compilers.wait(10.0):
                    save_partial(document, options.output, rows=_rows(compilers, seconds))
                    if deadline.over():
                        break
                rows = _rows(compilers, seconds)
            finally:
                compilers.close()
    except (ImportError, RuntimeError) as e:
        raise InputError(f"nothing can be compiled: {e}") from None
    document["seconds_to_the_end"] = round(process_seconds(), 1)
    return {"rows": rows} | deadline.note()


def _launched(name: str, make: Make) -> Row:
    """Makes the launches of a stage as a process of its own does."""
    forget()
    progress(f"{name}: launching")
    launcher, start = Launcher(), time.process_time()
    make(launcher)
    return {"stage": name, "launches": launcher.launches, "cpu_seconds": round(time.process_time() - start, 1), "failed": []}


def _found(name: str, make: Make, compilers: Compilers) -> float:
    """Finds what a stage launches. Returns the CPU seconds that this took."""
    start = time.process_time()
    make(compilers.note(name))
    progress(f"{name}: {len(compilers.stages[name])} kernels that no stage before it has")
    return time.process_time() - start


def _rows(compilers: Compilers, seconds: dict[str, float]) -> list[Row]:
    rows = []
    for name, done in compilers.done().items():
        failed = [c.failed for c in done if c.failed is not None]
        row: Row = {"stage": name, "kernels": len(compilers.stages[name]), "compiled": len(done) - len(failed)}
        row |= {
            "cpu_seconds": round(sum(c.seconds for c in done), 1),
            "slowest_seconds": round(max((c.seconds for c in done), default=0), 1),
        }
        rows.append(row | {"finding_seconds": round(seconds.get(name, 0.0), 1), "failed": failed})
    return rows


def failed(document: Row) -> bool:
    """Whether a kernel of another stage than ``tune``, whose sizes are tried out, could not be compiled."""
    return any(row["failed"] for row in document["rows"] if row["stage"] != "tune")


def render(document: Row) -> str:
    """Formats the rows as text."""
    keys: tuple[str, ...] = ("stage", "kernels", "compiled", "cpu_seconds", "slowest_seconds", "finding_seconds")
    if document["rows"] and "launches" in document["rows"][0]:
        keys = ("stage", "launches", "cpu_seconds")
    header = tuple(key.replace("_", " ") for key in keys)
    text = [text_table([header, *([str(row[key]) for key in keys] for row in document["rows"])], left=1)]
    return "\n".join([*text, *(text for row in document["rows"] for text in row["failed"])])
