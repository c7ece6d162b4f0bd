"""What ``python -m bench.gpu`` runs: commands as data, in order, each with its time and the reason why it cannot run here."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lozo_kernels.bench import MEASUREMENTS

OK, FAILED, TIMED_OUT, SKIPPED, NOT_RUN = "ok", "failed", "timed out", "skipped", "not run"

ALLOWED = "{allowed}"
"""Stands in a command for the seconds that the stage has."""

Verdict = tuple[str, str | None]
"""A status and its reason."""


def by_return_code(code: int, log: str) -> Verdict:
    """Judges by the return code, where 0 is good. Otherwise the last line of the log says what was wrong."""
    if code == 0:
        return OK, None
    lines = [line for line in log.splitlines() if line.strip()]
    return FAILED, f"exit status {code}: {lines[-1].strip()[:200] if lines else 'no output'}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One subprocess.

    Attributes:
        name: of its log, and of its row in the summary.
        command: arguments; :data:`ALLOWED` within one is replaced.
        limit: most seconds.
        share: seconds that it is planned with: what is left of the budget is divided among the stages left in this proportion.
        red_if: statuses of this one after which no figures are measured.
        figures: not run after that.
        output: file that the command writes, in the folder of results; an older one is removed first.
        keep_log: file in the folder of results that gets a copy of the log.
        skip: why it cannot run here.
        environment: variables for the command.
        verdict: what a return code and a log mean.
    """

    name: str
    command: tuple[str, ...]
    limit: float = 60
    share: float = 30
    red_if: tuple[str, ...] = ()
    figures: bool = False
    output: str | None = None
    keep_log: str | None = None
    skip: str | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    verdict: Callable[[int, str], Verdict] = by_return_code


def pytest_verdict(code: int, log: str) -> Verdict:
    """Knows that exit status 5 of pytest means that nothing was collected."""
    return (SKIPPED, "no test is marked gpu") if code == 5 else by_return_code(code, log)


def profiler_verdict(code: int, log: str) -> Verdict:
    """Knows that performance counters are often for administrators only."""
    if "ERR_NVGPUCTRPERM" in log:
        return SKIPPED, "performance counters are not permitted to this user"
    if "No kernels were profiled" in log:
        return FAILED, "the kernel to profile was not launched"
    return by_return_code(code, log)


def backend_verdict(code: int, log: str) -> Verdict:
    """Knows that a backend that is asked for by name need not be there."""
    if code and "cannot serve" in log:
        return SKIPPED, log.strip().splitlines()[-1][:200]
    return by_return_code(code, log)


def _bench(name: str, arguments: str, output: Path, *, device: str, **settings: Any) -> Stage:
    """Makes a stage that is a command of ``lozo-kernels bench`` or of ``python -m bench``."""
    file = f"{name}.json"
    words = arguments.split("|")
    command = (sys.executable, "-m", *(("lozo_kernels", "bench") if words[0] in MEASUREMENTS else ("bench",)), *words)
    command += ("--device", device, "--output", str(output / file))
    return Stage(name, command, output=file, **settings)


def _missing(program: str) -> str | None:
    return None if shutil.which(program) else f"there is no {program} here"


def _without(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


_MACHINE = (
    "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,mig.mode.current,ecc.mode.current"
)


def gpu_stages(output: Path, device: str = "cuda", capability: str | None = None) -> list[Stage]:
    """Returns all stages for a machine with a GPU; what counts most comes first.

    Args:
        capability: as in "9.0"; CUDA code is built for it alone, which is quicker.
    """
    only_this = {"LOZO_KERNELS_CUDA_ARCHS": capability.replace(".", "")} if capability else {}
    python = sys.executable
    no_compiler = None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "there is no C++ compiler here"
    whole: dict[str, Any] = {"figures": True, "skip": _without("transformers")}
    ranks = "4,1,2,8,16,64,32"

    def sanitizer(tool: str) -> Stage:
        command: tuple[str, ...] = (
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--target-processes",
            "all",
            python,
        )
        command += ("-m", "lozo_kernels", "bench", "correctness", "--quick", "--device", device)
        # Otherwise torch hands out parts of larger blocks, in which an access out of bounds goes unnoticed.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Stage(tool, command, 75, 25, keep_log=f"{tool}.txt", skip=_missing("compute-sanitizer"), environment=alone)

    profile: tuple[str, ...] = (
        "ncu",
        "--clock-control",
        "none",
        "--set",
        "full",
        "--kernel-name",
        "regex:lowrank_update",
        "--launch-skip",
        "2",
    )
    profile += ("--launch-count", "1", "--target-processes", "all", python, "-m", "bench.launch", "--device", device)

    def bench(name: str, arguments: str, **settings: Any) -> Stage:
        return _bench(name, arguments, output, device=device, **settings)

    return [
        Stage(
            "machine",
            ("nvidia-smi", f"--query-gpu={_MACHINE}", "--format=csv"),
            20,
            3,
            keep_log="machine.txt",
            skip=_missing("nvidia-smi"),
        ),
        Stage("build", (python, "setup.py", "build_ext", "--inplace"), 150, 110, skip=no_compiler, environment=only_this),
        bench("correctness", f"correctness|--seconds|{ALLOWED}", limit=120, share=80, red_if=(FAILED, TIMED_OUT, NOT_RUN)),
        Stage(
            "tests",
            (python, "-m", "pytest", "python_tests", "-m", "gpu", "-q", "-p", "no:cacheprovider"),
            100,
            60,
            red_if=(FAILED,),
            keep_log="tests.txt",
            skip=_without("pytest"),
            verdict=pytest_verdict,
        ),
        bench("exactness", "exactness", limit=60, share=25),
        bench(
            "throughput-opt-13b",
            f"perturb|--model-shapes|opt-13b|--dtype|bfloat16|--rank|{ranks}|--repeats|15|--peer-repeats|4|--no-compile",
            limit=170,
            share=100,
            **whole,
        ),
        bench(
            "throughput-8192x8192",
            f"perturb|--shapes|8192x8192|--dtype|bfloat16|--rank|{ranks}|--repeats|50|--peer-repeats|10|--no-compile",
            limit=70,
            share=35,
            figures=True,
        ),
        bench(
            "step-opt-13b",
            "step|--model|opt-13b|--dtype|bfloat16|--placement|inplace|"
            "--tokens|4096,128,512,2048,8192|--length|256|--repeats|4|--peer-repeats|1",
            limit=150,
            share=90,
            **whole,
        ),
        bench(
            "memory-opt-13b",
            "memory|--model|opt-13b|--dtype|bfloat16|--placement|inplace|--tokens|1024|--methods|"
            "lozo,lozo-m,mezo,mezo-m,lozo-fused,published lozo,published lozo-m,published mezo,published mezo-m",
            limit=90,
            share=35,
            **whole,
        ),
        bench(
            "fits-opt-66b",
            "fits|--model|opt-66b|--tokens|512|--methods|lozo,mezo",
            limit=80,
            share=35,
            environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            **whole,
        ),
        bench(
            "step-opt-1.3b",
            "step|--model|opt-1.3b|--dtype|bfloat16|--placement|inplace|"
            "--tokens|128,512,2048,4096,8192|--length|256|--repeats|7|--peer-repeats|2",
            limit=60,
            share=30,
            **whole,
        ),
        *(
            bench(
                f"probe-{model}",
                f"step|--model|{model}|--dtype|bfloat16|--methods|lozo|--placement|inplace,probe,batched|"
                "--tokens|2048,64|--length|32|--repeats|7|--peer-repeats|1",
                limit=90,
                share=30,
                **whole,
            )
            for model in ("opt-1.3b", "opt-13b")
        ),
        bench(
            "throughput-dtypes",
            "perturb|--model-shapes|opt-13b|--dtype|float16,float32|--rank|4|--repeats|10|--peer-repeats|3|--no-compile",
            limit=60,
            share=30,
            **whole,
        ),
        bench(
            "throughput-models",
            "perturb|--model-shapes|llama-3-8b,qwen3-4b,opt-1.3b|--dtype|bfloat16|--rank|4|--repeats|15|--peer-repeats|3|--no-compile",
            limit=60,
            share=30,
            **whole,
        ),
        *(
            bench(
                f"throughput-{backend}",
                "perturb|--shapes|8192x8192|--dtype|bfloat16|--rank|4,1,16,64|--repeats|30|--peer-repeats|3|--no-compile",
                limit=45,
                share=20,
                figures=True,
                environment={"LOZO_KERNELS_BACKEND": backend},
                verdict=backend_verdict,
            )
            for backend in ("cuda", "triton")
        ),
        bench(
            "throughput-compiled",
            "perturb|--shapes|8192x8192|--model-shapes|opt-13b|--dtype|bfloat16|--rank|4|--repeats|10|--peer-repeats|3|--compile",
            limit=110,
            share=45,
            **whole,
        ),
        Stage(
            "tune",
            (python, "-m", "lozo_kernels", "tune", "--seconds", ALLOWED, "--output", str(output / "tune.json")),
            100,
            40,
            output="tune.json",
            figures=True,
        ),
        Stage("profile", profile, 60, 20, figures=True, keep_log="profile.txt", skip=_missing("ncu"), verdict=profiler_verdict),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        _plots(output),
    ]


def smoke_stages(output: Path) -> list[Stage]:
    """Returns the same stages for tiny CPU tensors, with no limits of their own. Those that need a GPU are skipped and say so."""
    arguments = {
        "correctness": "correctness|--quick",
        "exactness": "exactness|--size|48|--draws|1|--rank|1,4,64",
        "throughput-opt-13b": "perturb|--model-shapes|opt-tiny|--dtype|bfloat16|--rank|1,4|--repeats|2|--peer-repeats|1",
        "throughput-8192x8192": "perturb|--shapes|48x70|--dtype|bfloat16,float16|--rank|1,4|--repeats|2|--peer-repeats|1",
        "probe-opt-13b": "step|--model|opt-tiny|--methods|lozo|--placement|probe,batched|--dtype|bfloat16|--tokens|16|--repeats|1|"
        "--peer-repeats|1",
        "step-opt-13b": "step|--model|opt-tiny|--dtype|bfloat16|--tokens|16,32|--repeats|1|--peer-repeats|1",
        "memory-opt-13b": "memory|--model|opt-tiny|--dtype|bfloat16|--tokens|16|--methods|lozo,published lozo",
        "fits-opt-66b": "fits|--model|opt-tiny|--tokens|16",
    }
    stages = []
    for full in gpu_stages(output):
        stage = dataclasses.replace(full, limit=math.inf)
        if stage.name in arguments:
            small = _bench(stage.name, arguments[stage.name], output, device="cpu")
            stages.append(dataclasses.replace(stage, command=(*small.command, "--threads", "1"), environment={}))
        elif stage.name == "plots":
            stages.append(stage)
        else:
            needs = (
                "not part of a smoke run" if stage.name.startswith(("throughput", "step", "probe", "build")) else "it needs a GPU"
            )
            stages.append(dataclasses.replace(stage, skip=needs))
    return stages


def _plots(output: Path) -> Stage:
    return Stage("plots", (sys.executable, "-m", "bench.plots", str(output)), 60, 12, skip=_without("matplotlib"))
