"""``python -m bench rehearsal``: whether ``make bench-gpu`` fits into its nine minutes, measured as far as that goes without a GPU.

Every kernel that a stage launches is really compiled, into an empty cache. Then the stage's launches are made on a stubbed driver:
what they compile (nothing) and what they take of the host is what is left to the stage. What a process needs to start, what the
host computes for ``correctness``, and the stage ``machine-code``, are measured too. What the device will take is assumed
(``bench/stages.py``), and so is the time to make a context on it. CPU seconds are those of this machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import compiling, runner, stages
from bench.evidence import REPO
from lozo_kernels.bench.arguments import positive
from lozo_kernels.bench.deadline import EXIT_INCOMPLETE
from lozo_kernels.bench.document import progress, save_partial
from lozo_kernels.errors import InputError
from lozo_kernels.model.text_table import number, text_table

Row = dict[str, Any]

SPARE = 0.2
"""Of the whole time that has to be left."""
_CONTEXT = 4.0  # seconds that CUDA is assumed to need at the start of a process
_UNEVEN = 1.15  # the last of several parallel processes is not done when the mean of them is
_FULL_MODEL = 6.0  # seconds to make OPT-13B on a device, beside what its goal rows take
_START = {
    "torch": "import lozo_kernels.bench",
    "transformers": "import lozo_kernels.bench.models; from transformers import OPTForCausalLM",
    "triton": "import triton.runtime.jit, triton.compiler",
}
_COMPUTING = ("probe", "tests")
"""Stages whose calls compute here, on the CPU, what a device computes there: of them only the loading of kernels counts."""
_LIKE = {"probe-opt-1.3b": "probe"}  # stages that launch what another does
_TRANSFORMERS = ("throughput", "step", "memory", "probe", "fits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    compiling.add_arguments(parser)
    parser.add_argument("--cores", type=positive, default=8, help="of the machine with the GPU (default: 8)")
    parser.add_argument("--minutes", type=float, default=9.0, help="that bench-gpu has (default: 9)")
    parser.add_argument("--kernel", help="names of kernels whose machine code is read, as a pattern (default: all); for tests")
    parser.add_argument("--build-seconds", type=float, help="CPU seconds of building csrc (default: build it)")


def measure(options: argparse.Namespace, document: Row) -> Row:
    """Compiles, reads, and adds up.

    Raises:
        InputError: kernels cannot be compiled here.
    """
    document |= {"cores": options.cores, "minutes": options.minutes, "spare": SPARE}
    document["assumed"] = "seconds of the device and of its contexts; see bench/stages.py"
    start = {name: _cpu(sys.executable, "-c", code) for name, code in _START.items()}
    document["start_cpu_seconds"] = {name: round(seconds, 1) for name, seconds in start.items()}
    with tempfile.TemporaryDirectory() as folder:
        document["machine_code"] = _machine_code(options, Path(folder))
    document["build_cpu_seconds"] = round(_build() if options.build_seconds is None else options.build_seconds, 1)
    with tempfile.TemporaryDirectory() as folder:
        cold = _kernels(options, Path(folder), document)
        compiled = _codes(Path(folder))
        document |= {"kernels": cold["rows"], "launches": _launches(options, Path(folder), document, cold["rows"])}
        document["compiled_again"] = _codes(Path(folder)) - compiled
    rows = plan(options, document)
    needed = sum(row["needed_seconds"] for row in rows if row["goal"])
    most = 60 * options.minutes * (1 - SPARE)
    document["goals_need_seconds"], document["goals_may_need_seconds"] = round(needed, 1), round(most, 1)
    document["fits"] = needed <= most and all(r["fits"] for r in rows if r["goal"])
    return {"rows": rows} | ({} if cold.get("complete", True) else {"complete": False})


def plan(options: argparse.Namespace, document: Row) -> list[Row]:
    """Returns a row for each stage, in order: what it needs, and what it is given when all before it take what they need."""
    start, cores = document["start_cpu_seconds"], options.cores
    compiled = {row["stage"]: row for row in document["kernels"]}
    launching = _launching(document)
    host = document["correctness_host_seconds"] = round(_correctness_host(), 1)
    chosen = [s for s in stages.gpu_stages(Path("OUTPUT")) if s.skip is None or s.goal]
    left, rows = 60.0 * options.minutes, []
    for i, stage in enumerate(chosen):
        parts = {"start": 0.0, "compile": 0.0, "launch": 0.0, "host": 0.0, "device": stage.device}
        if stage.name == "build":
            parts["compile"] = _UNEVEN * document["build_cpu_seconds"] / cores
        elif stage.name == "kernels":
            parts["start"] = start["transformers"] + start["triton"]
            parts["host"], parts["compile"] = _ahead(list(compiled), compiled, cores)
        elif stage.name == "machine-code":
            # It starts a process that lists kernels, and then those that read them.
            parts["start"] = 3 * start["torch"] + 2 * start["triton"]
            parts["compile"] = _UNEVEN * document["machine_code"]["cpu_seconds"] / cores
        elif stage.name != "machine":
            whole = stage.name.startswith(_TRANSFORMERS)
            parts["start"] = start["transformers" if whole else "torch"] + start["triton"] + _CONTEXT
            parts["launch"] = launching.get(_LIKE.get(stage.name, stage.name), 0.0)
            parts["host"] = host if stage.name == "correctness" else 0.0
            parts["host"] += _FULL_MODEL if whole and stage.name != "throughput" else 0.0
        needed = least = sum(parts.values())
        given = max(0.0, runner.allowed_seconds(chosen[i:], left))
        # It begins nothing more after a part of its time, so what it needs has to fit into that.
        most = runner.MARGIN * given if stages.ALLOWED in stage.command else given
        if stage.name == "kernels":
            # Those of stages with a goal are compiled first; what is not compiled by the end of its time, later stages compile.
            least = parts["start"] + sum(_ahead([s.name for s in chosen if s.goal], compiled, cores))
            parts["compile"] -= max(0.0, needed - max(least, most))
            needed = sum(parts.values())
        row: Row = {"stage": stage.name, "goal": stage.goal, "planned_seconds": stage.share, "given_seconds": round(given, 1)}
        row |= {f"{name}_seconds": round(seconds, 1) for name, seconds in parts.items()} | {"needed_seconds": round(needed, 1)}
        row["fits"] = least <= most if stage.goal else None
        row |= {"goals_need_seconds": round(least, 1)} if stage.name == "kernels" else {}
        rows.append(row)
        left -= needed if stage.goal else given
    return rows


def _ahead(names: list[str], compiled: dict[str, Row], cores: int) -> tuple[float, float]:
    """Returns the seconds of finding what stages launch, and those of compiling it on all cores that come on top."""
    rows = [compiled[name] for name in names if name in compiled]
    total = sum(_compiling(row, list(compiled.values())) for row in rows)
    finding = sum(row["finding_seconds"] for row in rows)
    slowest = max((row["slowest_seconds"] for row in rows), default=0.0)
    return finding, max(slowest, _UNEVEN * (total + finding) / cores - finding)


def _launching(document: Row) -> dict[str, float]:
    """Returns for each stage the CPU seconds of its launches, each kernel loaded from the cache.

    A stage whose kernels were not all compiled in the time of the measurement is taken to load each as fast as the others do.
    """
    rows = {row["stage"]: row for row in document["kernels"]}
    found = {row["stage"]: row["cpu_seconds"] for row in document["launches"] if row["stage"] not in _COMPUTING}
    loads = sum(max(0.0, seconds - rows[name]["finding_seconds"]) for name, seconds in found.items())
    load = loads / max(1, sum(rows[name]["kernels"] for name in found))
    seen = 0
    for name, row in rows.items():
        seen += row["kernels"]
        if name in _COMPUTING:
            found[name] = load * seen  # at most: all that it and the stages before it have
        else:
            found.setdefault(name, row["finding_seconds"] + load * row["kernels"])
    return found


def _compiling(row: Row, rows: list[Row]) -> float:
    """Returns the CPU seconds of compiling the kernels of a stage. What was not compiled counts as the mean of those that were."""
    measured = row if row["compiled"] else {key: sum(r[key] for r in rows) for key in ("cpu_seconds", "compiled")}
    return float(row["cpu_seconds"] + (row["kernels"] - row["compiled"]) * measured["cpu_seconds"] / max(1, measured["compiled"]))


def _kernels(options: argparse.Namespace, folder: Path, document: Row, *more: str) -> Row:
    """Runs the stage ``kernels`` in a process of its own, whose cache is in a folder; returns its document."""
    result = folder / "kernels.json"
    command = [sys.executable, "-m", "bench", "kernels", "--capability", options.capability, "--output", str(result), *more]
    command += ["--processes", str(options.processes), "--nice", str(options.nice), "--stages", ",".join(options.stages)]
    command += ["--rank", ",".join(map(str, options.rank))] if options.rank else []
    command += ["--seconds", str(options.seconds)] if options.seconds and not more else []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    with (folder / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=log)
        while process.poll() is None:
            time.sleep(1.0)
            if options.output is not None and result.exists() and not more:
                save_partial(
                    document | {"kernels": json.loads(result.read_text(encoding="utf-8"))["rows"]}, options.output, rows=[]
                )
    if process.returncode not in (0, EXIT_INCOMPLETE):
        raise InputError(f"the kernels cannot be compiled: {(folder / 'log').read_text(encoding='utf-8')[-500:].strip()}")
    found: Row = json.loads(result.read_text(encoding="utf-8"))
    return found


def _launches(options: argparse.Namespace, folder: Path, document: Row, rows: list[Row]) -> list[Row]:
    """Makes the launches of the stages whose kernels, and those of the stages before them, are all compiled."""
    ready = [row["stage"] for row in itertools.takewhile(lambda row: row["compiled"] + len(row["failed"]) == row["kernels"], rows)]
    if not ready:
        return []
    only = argparse.Namespace(**{**vars(options), "stages": ready})
    return list(_kernels(only, folder, document, "--launch")["rows"])


def _codes(folder: Path) -> int:
    """Counts the machine codes in the cache."""
    return sum(1 for _ in folder.rglob("*.cubin"))


def _machine_code(options: argparse.Namespace, folder: Path) -> Row:
    """Runs the stage ``machine-code`` with empty caches, for as long as it takes; returns its CPU seconds and what it found."""
    progress("machine code")
    result = folder / "machine-code.json"
    stage = next(s for s in stages.gpu_stages(folder, capability=options.capability) if s.name == "machine-code")
    words = [word for word in stage.command if word not in ("--seconds", stages.ALLOWED)]
    words += ["--cache", str(folder / "sass"), "--jobs", str(options.processes)]
    words += ["--kernel", options.kernel] if options.kernel else []
    words += ["--rank", *map(str, options.rank)] if options.rank else []
    seconds = _cpu(*words, environment={"TRITON_CACHE_DIR": str(folder / "triton")}, good=(0, 1))
    found = json.loads(result.read_text())
    return {"kernels": len(found["rows"]), "cpu_seconds": round(seconds, 1), "defects": found["defects"]}


def _correctness_host() -> float:
    """Returns the CPU seconds of drawing the cases of ``correctness`` and of computing them on the CPU."""
    code = "import torch; torch.set_num_threads(1); from lozo_kernels.bench import main; import sys; sys.exit(main(['correctness',"
    code += "'--backends', 'native']))"
    progress("correctness on the host")
    return _cpu(sys.executable, "-c", code)


def _build() -> float:
    """Builds csrc for one GPU into a folder of its own; returns its CPU seconds."""
    progress("building csrc")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder]
        return _cpu(*command, environment={"LOZO_KERNELS_CUDA": "1", "LOZO_KERNELS_CUDA_ARCHS": "90"})


def _cpu(*command: str, environment: dict[str, str] | None = None, good: tuple[int, ...] = (0,)) -> float:
    """Runs a command that ends with a good status; returns its CPU seconds and those of its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, cwd=REPO, env=os.environ | (environment or {}), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode not in good:
        raise InputError(f"{' '.join(command)[:200]}: exit status {done.returncode}: {done.stderr.strip()[-300:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def failed(document: Row) -> bool:
    """Whether what has a goal does not fit, or a kernel was compiled that the stage before had to compile."""
    return bool(document["compiled_again"]) or not document["fits"]


def render(document: Row) -> str:
    """Formats the rows as text."""
    parts = ("start", "compile", "launch", "host", "device")
    header = ("stage", "goal", *parts, "needs s", "planned s", "given s", "fits")
    lines = [
        (
            row["stage"],
            "yes" if row["goal"] else "",
            *(number(row[f"{part}_seconds"], ".1f") for part in parts),
            number(row["needed_seconds"], ".1f"),
            number(row["planned_seconds"], ".0f"),
            number(row["given_seconds"], ".1f"),
            "" if row["fits"] is None else "yes" if row["fits"] else "NO",
        )
        for row in document["rows"]
    ]
    text = text_table([header, *lines], left=2)
    text += f"\n\nStages with a goal need {document['goals_need_seconds']} s of {document['goals_may_need_seconds']}: "
    text += f"{document['minutes']:g} minutes with {document['cores']} cores, less {SPARE:.0%} to spare"
    done, count = (sum(row[key] for row in document["kernels"]) for key in ("compiled", "kernels"))
    text += f"\n{done} of {count} kernels were compiled"
    text += (
        "" if done == count else ", each of the others is taken to need as long as the mean of its stage or, without one, of all"
    )
    code = document["machine_code"]
    text += f"\nmachine code of {code['kernels']} kernels: {code['cpu_seconds']} s of CPU, {len(code['defects'])} defects"
    return text + f"\nkernels compiled a second time: {document['compiled_again']}; assumed: {document['assumed']}"
