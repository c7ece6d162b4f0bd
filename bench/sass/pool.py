"""Worker processes that compile and read.

Workers are processes of their own because kernels are Python that Triton interprets when TRITON_INTERPRET is set before its import,
as the tests do; theirs is a clean environment.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .cache import ROOT, Cache, fingerprint
from .facts import Facts
from .toolchain import Toolchain

_KEPT = ("TRITON_HOME", "TRITON_CACHE_DIR")  # where files go; everything else of Triton's changes what it compiles


class Worker:
    """A process of worker.py.

    Args:
        toolchain: the Triton that it imports.
    """

    def __init__(self, toolchain: Toolchain) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "MLIR_", "LLVM_")) or k in _KEPT}
        clean["OMP_NUM_THREADS"] = "1"
        clean["PYTHONPATH"] = toolchain.import_path()
        command = [sys.executable, "-m", "bench.sass.worker"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=clean, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._errors: list[str] = []
        threading.Thread(target=self._drain, daemon=True).start()

    def ask(self, request: dict[str, Any]) -> Any:
        """Returns the answer to a request.

        Raises:
            RuntimeError: the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            raise RuntimeError(f"the compiling process ended with status {code}: {''.join(self._errors[-5:]).strip()}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _drain(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors.append(line)


_COMPILER = Path(__file__).with_name("compiler.py")


@functools.cache
def _fingerprint_of_list(catalogue: str, toolchain: Toolchain) -> str:
    kernels = (ROOT / "lozo_kernels" / "kernels" / "backends" / "triton").rglob("*")
    files = sorted(path for path in kernels if path.suffix in (".py", ".json"))
    spec = importlib.util.find_spec(catalogue)
    if spec is not None and spec.origin is not None:
        files.append(Path(spec.origin))
    return fingerprint(toolchain.version, _COMPILER, files)


@functools.cache
def _fingerprint(toolchain: Toolchain) -> str:
    """Of a kernel that was read: its own sources are in its key, so that a change of one leaves what was read of the others."""
    return fingerprint(toolchain.version, _COMPILER, ())


def list_jobs(catalogue: str, vendors: Iterable[str], cache: Cache, toolchain: Toolchain) -> list[dict[str, Any]]:
    """Lists what a catalogue can compile: the fields of ``compiler.describe`` with "catalogue", "vendor", "index" and "triton"."""
    worker: Worker | None = None
    jobs = []
    try:
        for vendor in vendors:
            made_from = _fingerprint_of_list(catalogue, toolchain)
            listed = cache.get(made_from, f"list {vendor}")
            if listed is None:
                worker = worker or Worker(toolchain)
                listed = worker.ask({"do": "list", "catalogue": catalogue, "vendor": vendor})
                cache.put(made_from, f"list {vendor}", listed)
            place = {"catalogue": catalogue, "vendor": vendor, "triton": toolchain.version}
            jobs += [{**d, **place, "index": i} for i, d in enumerate(listed)]
    finally:
        if worker is not None:
            worker.close()
    return jobs


def read_all(
    jobs: Sequence[dict[str, Any]],
    cache: Cache,
    processes: int,
    done: Callable[[], None],
    toolchain: Toolchain,
    over: Callable[[], bool] = lambda: False,
) -> list[Facts | None]:
    """Reads the facts of every job (of :func:`list_jobs`, with a "target"), compiled by so many processes.

    Args:
        done: called after each.
        over: whether no more are to be begun. Those that were not have None. What has a goal (bf16, dense and rank 4) comes first.
    """
    answers: list[Any] = [None] * len(jobs)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i, job in sorted(enumerate(jobs), key=lambda place: _urgency(place[1])):
        answers[i] = cache.get(_fingerprint(toolchain), _job_key(job))
        if answers[i] is None:
            waiting.put(i)
        else:
            done()

    def serve() -> None:
        worker: Worker | None = None
        while (i := _next(waiting)) is not None and not over():
            worker = worker or Worker(toolchain)
            try:
                answers[i] = worker.ask({"do": "read"} | {k: jobs[i][k] for k in ("catalogue", "vendor", "index", "target")})
            except RuntimeError as error:
                answers[i], worker = {"broken": str(error)}, None
            if answers[i]["broken"] is None:  # what failed may have failed for want of memory
                cache.put(_fingerprint(toolchain), _job_key(jobs[i]), answers[i])
            done()
        if worker is not None:
            worker.close()

    threads = [threading.Thread(target=serve) for _ in range(min(processes, waiting.qsize()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [None if answer is None else Facts.from_json(answer) for answer in answers]


def _urgency(job: dict[str, Any]) -> tuple[bool, bool, bool]:
    return not job["default"], job["dtype"] != "bfloat16", job["rank"] not in (None, 4)


def _next(waiting: queue.SimpleQueue[int]) -> int | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


def _job_key(job: dict[str, Any]) -> str:
    return f"{job['key']} {job['naive']} {job['target']}"
