"""Runs stages one after the other within a budget of time. A stage that fails or hangs costs itself only."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.stages import ALLOWED, FAILED, INCOMPLETE, NOT_RUN, SKIPPED, TIMED_OUT, Stage

_LEAST_SECONDS = 4.0  # less than an interpreter needs to start
_GRACE = 3.0  # between asking a stage to end and ending it
MARGIN = 0.8  # of its time that a stage that was told it may use, before it is stopped

Record = dict[str, Any]


def run_stages(
    stages: Sequence[Stage],
    output: Path,
    *,
    seconds: float,
    root: Path,
    environment: Mapping[str, str],
    after_each: Callable[[list[Record]], object] = lambda _: None,
) -> list[Record]:
    """Returns a record for each stage, in order: name, status, reason, return code, seconds, seconds allowed, command, files.

    Args:
        output: folder of results; logs go to its folder ``logs``.
        seconds: for all stages together.
        root: where commands run.
        environment: of the commands, to which a stage adds its own.
        after_each: called with the records so far.
    """
    (output / "logs").mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    records: list[Record] = []
    red: str | None = None
    for i, stage in enumerate(stages):
        remove_results(stage, output)
        allowed = allowed_seconds(stages[i:], end - time.monotonic())
        record: Record = {"stage": stage.name, "status": SKIPPED, "reason": stage.skip, "return_code": None, "seconds": 0.0}
        record |= {"allowed_seconds": round(allowed, 1), "command": list(stage.command), "files": []}
        if stage.skip is not None:
            pass
        elif stage.figures and red is not None:
            record |= {"status": NOT_RUN, "reason": f"correctness failed ({red})"}
        elif allowed < _LEAST_SECONDS:
            record |= {"status": NOT_RUN, "reason": "no time was left"}
        else:
            record |= run_stage(stage, output, allowed=allowed, root=root, environment=environment)
        if record["status"] in stage.red_if:
            red = red or f"{stage.name} {record['status']}"
        records.append(record)
        after_each(records)
    return records


def allowed_seconds(stages: Sequence[Stage], left: float) -> float:
    """Returns what the first of the stages left may take of the seconds left; see :class:`~bench.stages.Stage`."""
    stage, later = stages[0], [s for s in stages[1:] if s.skip is None]
    free = left - sum(s.share for s in later if s.goal)
    if not stage.goal:
        free *= stage.share / (stage.share + sum(s.share for s in later if not s.goal))
    elif free < stage.share:  # earlier ones took more than planned: all goals get less
        free = left * stage.share / (stage.share + sum(s.share for s in later if s.goal))
    return min(stage.limit, free)


def remove_results(stage: Stage, output: Path) -> None:
    """Removes the results of an earlier run, so that none is taken for one of this run."""
    for name in (stage.output, stage.keep_log):
        if name is not None:
            (output / name).unlink(missing_ok=True)


def run_stage(stage: Stage, output: Path, *, allowed: float, root: Path, environment: Mapping[str, str]) -> Record:
    """Runs one command; returns status, reason, return code, seconds and files."""
    command = [word.replace(ALLOWED, str(max(1, int(MARGIN * allowed)))) for word in stage.command]
    log_path = output / "logs" / f"{stage.name}.txt"
    start = time.monotonic()
    code: int | None = None
    reason: str | None
    with log_path.open("w") as log:
        try:
            with started(command, log, root, {**environment, **stage.environment}) as process:
                code = process.wait(timeout=allowed)
        except subprocess.TimeoutExpired:
            status, reason = TIMED_OUT, f"stopped after {allowed:.0f} s"
        except OSError as e:
            status, reason = FAILED, f"cannot be started: {e}"
    text = log_path.read_text(errors="replace")
    if code is not None:
        status, reason = stage.verdict(code, text)
    if status in (TIMED_OUT, INCOMPLETE):
        status, reason = out_of_time(stage, output, reason)
    if stage.keep_log is not None:
        (output / stage.keep_log).write_text(text)
    files = [name for name in (stage.output, stage.keep_log) if name is not None and (output / name).exists()]
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "reason": reason, "return_code": code, "seconds": seconds, "command": command, "files": files}


def out_of_time(stage: Stage, output: Path, reason: str | None) -> tuple[str, str | None]:
    """Judges a stage whose time was over by what it had written: wrong bits are a failure, and nothing at all is no result."""
    try:
        document = json.loads((output / (stage.output or "")).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return TIMED_OUT, reason
    if document.get("failures"):
        return FAILED, str(document["failures"][0])[:200]
    if not any(document.get(key) for key in ("rows", "tiles")):
        return TIMED_OUT, f"{reason}; nothing was measured until then"
    return INCOMPLETE, f"{reason}; what it had measured until then is kept"


@contextlib.contextmanager
def started(command: Sequence[str], log: Any, root: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process in a group of its own, and ends the whole group afterwards."""
    process = subprocess.Popen(
        command, cwd=root, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        yield process
    finally:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE)
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
