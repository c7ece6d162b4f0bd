"""What ``python -m bench.gpu`` runs: commands as data, in order, each with its time and the reason why it cannot run here."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.sass.targets import TARGETS
from lozo_kernels.bench import MEASUREMENTS
from lozo_kernels.bench.deadline import EXIT_INCOMPLETE

OK, FAILED, TIMED_OUT, SKIPPED, NOT_RUN = "ok", "failed", "timed out", "skipped", "not run"
INCOMPLETE = "incomplete"
"""Its time was over before it had measured everything, and nothing was wrong until then."""

ALLOWED = "{allowed}"
"""Stands in a command for the seconds that the stage has."""

DEFECTS = "defects"
"""The machine code of kernels is worse than it is held to be. That is no wrong bit: those are found by ``correctness``."""

Verdict = tuple[str, str | None]
"""A status and its reason."""


def by_return_code(code: int, log: str) -> Verdict:
    """Judges by the return code, where 0 is good. Otherwise the last line of the log says what was wrong."""
    if code == 0:
        return OK, None
    if code == EXIT_INCOMPLETE:
        return INCOMPLETE, "its time was over before all was measured"
    lines = [line for line in log.splitlines() if line.strip()]
    return FAILED, f"exit status {code}: {lines[-1].strip()[:200] if lines else 'no output'}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One subprocess.

    Attributes:
        name: of its log, and of its row in the summary.
        command: arguments; :data:`ALLOWED` within one is replaced.
        limit: most seconds.
        share: seconds that it is planned with.
        goal: it has its ``share`` for certain, and more up to its limit while the goals after it keep theirs. What they leave is
            divided among the other stages in proportion to their shares.
        device: of ``share``, the seconds that the device is expected to work. They are an assumption, from the bytes and operations
            of what has a goal and the published speed of an H200; everything else that a stage takes, ``bench rehearsal`` measures.
        red_if: statuses of this one after which no figures are measured. An incomplete one is never among them.
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
    goal: bool = False
    device: float = 0
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


def machine_code_verdict(code: int, log: str) -> Verdict:
    """Knows that a defect of machine code makes figures worse, and no bit wrong."""
    lines = [line for line in log.splitlines() if "kernels checked, " in line]
    return (DEFECTS, lines[-1].strip()[:200]) if code == 1 and lines else by_return_code(code, log)


def backend_verdict(code: int, log: str) -> Verdict:
    """Knows that a backend that is asked for by name need not be there."""
    if code and "cannot serve" in log:
        return SKIPPED, log.strip().splitlines()[-1][:200]
    return by_return_code(code, log)


def _bench(name: str, arguments: str, output: Path, *, device: str, device_seconds: float = 0, **settings: Any) -> Stage:
    """Makes a stage that is a command of ``lozo-kernels bench`` or of ``python -m bench``."""
    words = [*arguments.split("|"), *(("--seconds", ALLOWED) if math.isfinite(settings.get("limit", 60)) else ())]
    command = (*(("lozo_kernels", "bench") if words[0] in MEASUREMENTS else ("bench",)), *words, "--device", device)
    return _writing(name, command, output, device=device_seconds, **settings)


def _writing(name: str, command: tuple[str, ...], output: Path, **settings: Any) -> Stage:
    """Makes a stage of a module and its arguments, which writes NAME.json in the folder of results."""
    file = f"{name}.json"
    return Stage(name, (sys.executable, "-m", *command, "--output", str(output / file)), output=file, **settings)


def _missing(program: str) -> str | None:
    return None if shutil.which(program) else f"there is no {program} here"


def _without(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def _without_disassembler() -> str | None:
    """Says where Triton's package lacks the program that machine code is read with, as some builds of it do."""
    spec = importlib.util.find_spec("triton")
    program = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm" if spec and spec.origin else None
    return None if program and program.exists() else "Triton's package has no nvdisasm"


_MACHINE = (
    "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,mig.mode.current,ecc.mode.current"
)


RANKS = (4, 1, 2, 8, 16, 64, 32)
GOAL_METHODS = ("lozo", "lozo-m", "mezo", "mezo-m")
STEP_METHODS = ("lozo", "mezo", "lozo-m", "lozo-fused")
PROBED = {"opt-13b": (2048, 64), "opt-1.3b": (2048, 64)}
"""The models whose probes have a goal, and the tokens of it."""
PROBED_LENGTH = 32
TESTS = ("python_tests/test_gpu.py", "python_tests/test_gpu_probes.py", "python_tests/test_graphs.py")
"""The files with tests marked gpu. ``test_triton.py`` runs on a GPU too, with ``make test``; here ``correctness`` does its work."""


def gpu_stages(output: Path, device: str = "cuda", capability: str | None = None, name: str | None = None) -> list[Stage]:
    """Returns all stages for a machine with a GPU; what counts most comes first.

    Args:
        capability: as in "9.0"; CUDA code is built for it alone, which is quicker.
        name: of the device, whose tile sizes the kernels are compiled with.
    """
    bench = functools.partial(_bench, output=output, device=device)
    return [*_before_figures(output, bench, capability, name), *_goals(bench), *_more(output, bench, device)]


def _before_figures(output: Path, bench: Callable[..., Stage], capability: str | None, name: str | None) -> list[Stage]:
    only_this = {"LOZO_KERNELS_CUDA_ARCHS": capability.replace(".", "")} if capability else {}
    python = sys.executable
    no_compiler = None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "there is no C++ compiler here"
    query = ("nvidia-smi", f"--query-gpu={_MACHINE}", "--format=csv")
    capability = capability or "9.0"
    compiling = f"kernels|--capability|{capability}" + (f"|--device-name|{name}" if name else "")
    return [
        Stage("machine", query, 20, 2, goal=True, keep_log="machine.txt", skip=_missing("nvidia-smi")),
        Stage(
            "build",
            (python, "setup.py", "build_ext", "--inplace"),
            150,
            45,
            goal=True,
            skip=no_compiler,
            environment=only_this | {"LOZO_KERNELS_CUDA": "1"},
        ),
        _bench("kernels", compiling, output, device="cpu", limit=180, share=110, goal=True, skip=_without("triton")),
        _machine_code(output, "sm_" + capability.replace(".", "")),
        bench("correctness", "correctness", limit=90, share=50, goal=True, device_seconds=6, red_if=(FAILED, TIMED_OUT, NOT_RUN)),
        Stage(
            "tests",
            (python, "-m", "pytest", *TESTS, "-m", "gpu", "-q", "-p", "no:cacheprovider"),
            60,
            30,
            goal=True,
            device=5,
            red_if=(FAILED,),
            keep_log="tests.txt",
            skip=_without("pytest"),
            verdict=pytest_verdict,
        ),
        bench("exactness", "exactness", limit=40, share=20, goal=True, device_seconds=3),
    ]


def _machine_code(output: Path, target: str) -> Stage:
    """Reads what the installed Triton makes of the default kernels for this device. Defects are reported and stop no figures."""
    command = ("bench.sass", "--target", target, "--default", "--no-cuda", "--no-naive", "--seconds", ALLOWED)
    unknown = None if target in TARGETS else f"bench.sass knows {', '.join(TARGETS)}, and not {target}"
    skip = unknown or _without("triton") or _without_disassembler()
    return _writing("machine-code", command, output, limit=60, share=30, goal=True, skip=skip, verdict=machine_code_verdict)


def _goals(bench: Callable[..., Stage]) -> list[Stage]:
    """Every goal, first in its stage: OPT-13B before other shapes, 4,096 tokens before others, LOZO before other methods."""
    whole: dict[str, Any] = {"figures": True, "skip": _without("transformers")}
    ranks = ",".join(map(str, RANKS))
    probed = [
        bench(
            "probe" if model == "opt-13b" else f"probe-{model}",
            f"step|--model|{model}|--dtype|bfloat16|--methods|lozo|--placement|probe,batched,inplace|"
            f"--tokens|{','.join(map(str, tokens))}|--length|{PROBED_LENGTH}|--repeats|7|--peer-repeats|1",
            limit=60,
            share=40 if model == "opt-13b" else 22,
            goal=True,
            device_seconds=18 if model == "opt-13b" else 5,
            **whole,
        )
        for model, tokens in PROBED.items()
    ]
    return [
        bench(
            "throughput",
            f"perturb|--model-shapes|opt-13b|--shapes|8192x8192|--dtype|bfloat16|--rank|{ranks}|"
            "--repeats|15|--peer-repeats|4|--no-compile",
            limit=110,
            share=50,
            goal=True,
            device_seconds=28,
            **whole,
        ),
        bench(
            "step",
            f"step|--model|opt-13b|--dtype|bfloat16|--methods|{','.join(STEP_METHODS)}|--placement|inplace,captured|"
            "--tokens|4096,128,512,2048,8192|--length|256|--repeats|4|--peer-repeats|1",
            limit=110,
            share=35,
            goal=True,
            device_seconds=16,
            **whole,
        ),
        bench(
            "memory",
            "memory|--model|opt-13b|--dtype|bfloat16|--placement|inplace|--tokens|1024|--methods|"
            f"{','.join(GOAL_METHODS)},lozo-fused,published lozo,published lozo-m,published mezo,published mezo-m",
            limit=60,
            share=25,
            goal=True,
            device_seconds=8,
            **whole,
        ),
        *probed,
    ]


def _more(output: Path, bench: Callable[..., Stage], device: str) -> list[Stage]:
    """What has no goal, with the time that is left."""
    whole: dict[str, Any] = {"figures": True, "skip": _without("transformers")}
    python = sys.executable

    def sanitizer(tool: str) -> Stage:
        command: tuple[str, ...] = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
        command += (python, "-m", "lozo_kernels", "bench", "correctness", "--quick", "--device", device, "--seconds", ALLOWED)
        # Otherwise torch hands out parts of larger blocks, in which an access out of bounds goes unnoticed.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Stage(tool, command, 75, 25, keep_log=f"{tool}.txt", skip=_missing("compute-sanitizer"), environment=alone)

    profile: tuple[str, ...] = ("ncu", "--clock-control", "none", "--set", "full", "--kernel-name", "regex:lowrank_update")
    profile += ("--launch-skip", "2", "--launch-count", "1", "--target-processes", "all")
    profile += (python, "-m", "bench.launch", "--device", device)
    return [
        bench(
            "step-opt-1.3b",
            "step|--model|opt-1.3b|--dtype|bfloat16|--placement|inplace|"
            "--tokens|128,512,2048,4096,8192|--length|256|--repeats|7|--peer-repeats|2",
            limit=60,
            share=30,
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
        bench(
            "throughput-cuda",
            "perturb|--shapes|8192x8192|--dtype|bfloat16|--rank|4,1,16,64|--repeats|30|--peer-repeats|3|--no-compile",
            limit=45,
            share=20,
            figures=True,
            environment={"LOZO_KERNELS_BACKEND": "cuda"},
            verdict=backend_verdict,
        ),
        _writing("tune", ("lozo_kernels", "tune", "--seconds", ALLOWED), output, limit=100, share=40, figures=True),
        bench(
            "throughput-compiled",
            "perturb|--shapes|8192x8192|--model-shapes|opt-13b|--dtype|bfloat16|--rank|4|--repeats|10|--peer-repeats|3|--compile",
            limit=110,
            share=45,
            **whole,
        ),
        _writing(
            "serving",
            ("bench.serving", "cost", "--device", device),
            output,
            limit=150,
            share=60,
            figures=True,
            skip=_without("vllm"),
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
        "throughput": "perturb|--model-shapes|opt-tiny|--shapes|48x70|--dtype|bfloat16,float16|--rank|1,4|--repeats|2|"
        "--peer-repeats|1",
        "probe": "step|--model|opt-tiny|--methods|lozo|--placement|probe,batched|--dtype|bfloat16|--tokens|16|--repeats|1|"
        "--peer-repeats|1",
        "step": "step|--model|opt-tiny|--dtype|bfloat16|--placement|inplace,captured|--tokens|16,32|--repeats|1|--peer-repeats|1",
        "memory": "memory|--model|opt-tiny|--dtype|bfloat16|--tokens|16|--methods|lozo,published lozo",
        "fits-opt-66b": "fits|--model|opt-tiny|--tokens|16",
    }
    stages = []
    for full in gpu_stages(output):
        stage = dataclasses.replace(full, limit=math.inf)
        if stage.name in arguments:
            small = _bench(stage.name, arguments[stage.name], output, device="cpu", limit=math.inf)
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
