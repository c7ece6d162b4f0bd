"""``python -m bench.sass``: compiles every GPU kernel for every target, reads the machine code, fails on what is wrong with it."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lozo_kernels.bench.arguments import positive
from lozo_kernels.bench.deadline import EXIT_INCOMPLETE, Deadline
from lozo_kernels.bench.document import dumps
from lozo_kernels.bench.environment import commit, portable, versions
from lozo_kernels.errors import InputError

from . import cuda, report, summary
from .budgets import budget_for
from .cache import CACHE, Cache
from .checks import defects
from .facts import Facts
from .pool import list_jobs, read_all
from .rows import row_of
from .targets import TARGETS
from .toolchain import OLDEST, Toolchain, in_folder, installed

CATALOGUE = "bench.sass.catalogue"
NAIVE = "bench.sass.naive"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check, ``report`` or ``summary``.

    Returns:
        0; 1 if a kernel has a defect; 2 for a wrong command line, one that chooses no kernel, or a Triton that is missing; 75 if
        the time that ``--seconds`` gives was over before all were read, and those that were have none.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["report"]:
        return report.main(words[1:])
    if words[:1] == ["summary"]:
        return summary.main(words[1:])
    options = _parser().parse_args(words)
    try:
        toolchain = installed() if options.triton is None else in_folder(options.triton)
    except InputError as error:
        print(f"bench.sass: {error}", file=sys.stderr)
        return 2
    cache = Cache(options.cache)
    deadline = Deadline(options.seconds)
    jobs, facts, remarks = _read(options, cache, toolchain, deadline)
    if deadline.passed and not jobs:
        print("bench.sass:", *remarks, file=sys.stderr)
        return EXIT_INCOMPLETE
    if not jobs:
        print("bench.sass: no kernel fits these filters", *remarks, sep="\n", file=sys.stderr)
        return 2
    rows, found = _check(jobs, facts)
    document = {
        "versions": versions() | {"triton": toolchain.version if toolchain is not None else None},
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "command": shlex.join(["python", "-m", "bench.sass", *map(portable, words)]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "remarks": remarks,
        "defects": found,
        "targets": [report.target_row(TARGETS[name]) for name in TARGETS if any(r["target"] == name for r in rows)],
        "rows": rows,
    } | deadline.note()
    text = dumps(document)
    if options.output is not None:
        options.output.write_text(text + "\n")
    print(text if options.json else report.table(document))
    if options.json:
        print(*remarks, *found, sep="\n", file=sys.stderr)
    checked = sum(not job["naive"] for job in jobs)
    first = f", the first: {found[0]}" if found else ""
    print(f"{checked} kernels checked, {len(found)} defects{first}", file=sys.stderr, flush=True)
    return 1 if found else EXIT_INCOMPLETE if deadline.passed else 0


def _read(
    options: argparse.Namespace, cache: Cache, toolchain: Toolchain | None, deadline: Deadline
) -> tuple[list[dict[str, Any]], list[Facts], list[str]]:
    """Reads the chosen kernels; returns them, their facts, and remarks about what is left out and why."""
    remarks: list[str] = []
    jobs: list[dict[str, Any]] = []
    facts: list[Facts] = []
    if toolchain is None:
        remarks.append("Triton kernels are not checked: triton is not installed (pip install triton)")
    else:
        vendors = sorted({TARGETS[name].vendor for name in options.target})
        catalogues = options.catalogue if options.no_naive else [*options.catalogue, NAIVE]
        listed = [job for catalogue in catalogues for job in list_jobs(catalogue, vendors, cache, toolchain)]
        jobs += [job | {"target": name} for job in listed for name in options.target if TARGETS[name].vendor == job["vendor"]]
        jobs = [job for job in jobs if _chosen(job, options)]
        progress = _Progress(len(jobs))
        answers = read_all(jobs, cache, options.jobs, progress.step, toolchain, deadline.over)
        progress.end()
        if None in answers:
            remarks.append(f"{answers.count(None)} of {len(jobs)} Triton kernels are not checked: the time was over")
        jobs = [job for job, answer in zip(jobs, answers, strict=True) if answer is not None]
        facts = [answer for answer in answers if answer is not None]
    if not options.no_cuda:
        targets = [name for name in options.target if TARGETS[name].vendor == "nvidia"]
        found, read, reasons = cuda.read(targets, cache, options.jobs)
        chosen = [(job, f) for job, f in zip(found, read, strict=True) if _chosen(job, options)]
        jobs += [job for job, _ in chosen]
        facts += [f for _, f in chosen]
        remarks += reasons
    return jobs, facts, remarks


def _chosen(job: dict[str, Any], options: argparse.Namespace) -> bool:
    return (
        (job["default"] or not options.default)
        and (options.kernel is None or any(fnmatch.fnmatchcase(job["kernel"], pattern) for pattern in options.kernel))
        and (options.dtype is None or job["dtype"] in options.dtype)
        and (options.rank is None or job["rank"] is None or job["rank"] in options.rank)
    )


def _check(jobs: list[dict[str, Any]], facts: list[Facts]) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the rows in order, and a line for every defect."""
    rows, found_defects = [], []
    for job, found in zip(jobs, facts, strict=True):
        budget = None if job["naive"] else budget_for(job)
        row = row_of(job, found, budget)
        rows.append(row)
        if not job["naive"]:
            place = f"{job['kernel']} {job['target']} {job['dtype']} rank {'-' if job['rank'] is None else job['rank']}"
            found_defects += [f"{place}: {defect}" for defect in defects(job, found, row, budget)]
        elif found.broken is not None:
            found_defects.append(f"{job['kernel']} {job['target']} {job['dtype']}: {found.broken}")
    return rows, found_defects


class _Progress:
    """A counter on a terminal."""

    def __init__(self, total: int) -> None:
        self._done, self._total, self._shown = 0, total, sys.stderr.isatty()

    def step(self) -> None:
        self._done += 1
        if self._shown:
            print(f"\r{self._done} of {self._total} kernels read", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._shown:
            print(file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sass",
        description=__doc__,
        epilog="report FILE draws a result of --output; summary FILE FILE prints the table of docs/gpu.md.",
    )
    parser.add_argument("--json", action="store_true", help="print the document instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the document to a file too")
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="names or patterns")
    parser.add_argument(
        "--target", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS)
    )
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help="bfloat16, float16, float32, any, none")
    parser.add_argument("--rank", nargs="+", type=int, metavar="R", help="dense kernels are always included")
    parser.add_argument("--default", action="store_true", help="only what training uses by default")
    parser.add_argument(
        "--seconds", type=positive, help="begin nothing more after so long, from the start of the process (default: read all)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that compile (default: all cores)"
    )
    parser.add_argument(
        "--triton",
        metavar="FOLDER",
        help=f"read what the Triton in a folder of its own makes; {OLDEST}: the oldest supported one, which make setup installs",
    )
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help=f"default {CACHE}")
    parser.add_argument("--catalogue", nargs="+", default=[CATALOGUE], metavar="MODULE", help=f"default {CATALOGUE}")
    parser.add_argument("--no-naive", action="store_true", help="leave out what naive kernels would give")
    parser.add_argument("--no-cuda", action="store_true", help="leave out the CUDA C++ kernels")
    return parser


if __name__ == "__main__":
    sys.exit(main())
