"""The CUDA C++ kernels of csrc/cuda, compiled by nvcc. A file holds many kernels, so a file and a target are read at once."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import nvidia
from .cache import ROOT, Cache, fingerprint
from .facts import Facts, Work, facts_of

_SOURCES = ROOT / "csrc" / "cuda"
_INCLUDE = ROOT / "csrc" / "include"
CODE_FLAGS = ("-std=c++17", "-O3", "-fmad=false")
"""The flags of setup.py that matter to the code of kernels."""

_FLAGS = (*CODE_FLAGS, "-cubin", "-lineinfo", '-DLOZO_CUDA_ARCHITECTURES=""')
# The functions that read and write weights, V and N are in this file; tables are read elsewhere.
_ACCESS = ("device.h",)
# Options that are known only when a kernel runs (stochastic rounding) are branches: the shortest path leaves them out.
_WORK = Work(bytes_per_thread=None, sources=_ACCESS, longest=False)

_NAME = re.compile(r"_ZN4lozo(\d+)(\w+)")
_DTYPES = {"INS_4bf16E": ("bfloat16", 2), "INS_3f16E": ("float16", 2), "If": ("float32", 4)}
_RANKS_A_STEP = 16


def read(targets: Sequence[str], cache: Cache, processes: int) -> tuple[list[dict[str, Any]], list[Facts], list[str]]:
    """Reads every kernel for every target; returns what is known of it, its facts, and remarks about what is left out."""
    files = sorted(_SOURCES.glob("*.cu"))
    nvcc = _nvcc()
    tools = _tools(nvcc)
    if not files or nvcc is None or tools is None:
        missing = "there are none" if not files else "nvcc is missing" if nvcc is None else "nvdisasm and cuobjdump are missing"
        return [], [], [f"CUDA C++ kernels are not checked: {missing}"]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    headers = sorted([*_SOURCES.glob("*.h"), *_INCLUDE.rglob("*.h")])
    made_from = fingerprint(version, Path(__file__), [*files, *headers])

    def one(place: tuple[Path, str]) -> dict[str, Any]:
        file, target = place
        key = f"{file.name} {target}"
        answer = cache.get(made_from, key)
        if answer is None:
            answer = _read(nvcc, tools, file, target)
            if all(found["broken"] is None for found in answer.values()):
                cache.put(made_from, key, answer)
        return dict(answer)

    places = [(file, target) for target in targets for file in files]
    with ThreadPoolExecutor(max_workers=processes) as pool:
        answers = list(pool.map(one, places))
    jobs, facts = [], []
    for (_, target), answer in zip(places, answers, strict=True):
        for name, found in answer.items():
            jobs.append(describe(name) | {"target": target})
            facts.append(Facts.from_json(found))
    return jobs, facts, []


def describe(name: str) -> dict[str, Any]:
    """Describes a kernel by its mangled name, as ``compiler.describe`` does, or by the name of a file that did not compile."""
    match = _NAME.match(name)
    length = int(match[1]) if match else 0
    op, arguments = (match[2][:length], match[2][length:]) if match else (name, "")
    aligned = op.endswith("_aligned")
    dtype, itemsize = next(
        (v for k, v in _DTYPES.items() if arguments.startswith(k)), ("any" if op.endswith("_any") else "none", 0)
    )
    numbers = [int(n) for n in re.findall(r"Li(\d+)E", arguments)]
    rank = _RANKS_A_STEP * numbers[0] if len(numbers) == 2 else None
    signs = op.startswith("dense_") and "Lb1E" in arguments
    ratios = not signs and "ILb1E" in arguments
    suffix = "_2" if numbers[-1:] == [2] else "_ratios" if ratios else ""
    stored = itemsize + (4 if op.startswith("dense_momentum") and aligned else 0)
    return {
        "triton": None,
        "kernel": "cuda_" + op.removesuffix("_aligned") + suffix + ("_signs" if signs else ""),
        "dtype": dtype,
        "rank": rank,
        "aligned": aligned,
        # The ratios are divided in fp64, which fuses inside; products with N are written with fused multiply-adds.
        "exact": not ratios and op not in _FUSED,
        "tile_elements": None,
        "itemsize": itemsize,
        "stored_bytes": stored,
        "bytes_per_element": 2 * stored,
        "default": aligned and numbers[-1:] == [1],
        "naive": False,
    }


_FUSED = ("lowrank_merge_aligned", "lowrank_merge_any", "resample_momentum")


def _nvcc() -> str | None:
    """Finds the compiler that setup.py would take."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    names = (os.environ.get("NVCC"), str(Path(home) / "bin" / "nvcc"), "nvcc")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _tools(nvcc: str | None) -> Path | None:
    """Finds nvdisasm and cuobjdump: beside nvcc, or in Triton's package."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return next((f for f in folders if (f / "nvdisasm").exists() and (f / "cuobjdump").exists()), None)


def _read(nvcc: str, tools: Path, file: Path, target: str) -> dict[str, Any]:
    """Returns the facts of every kernel in a file, as JSON; under the file's name, what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.cubin"
        command = [nvcc, *_FLAGS, f"-arch={target}", "-I", str(_INCLUDE), "-o", str(out), str(file)]
        compiled = subprocess.run(command, capture_output=True, text=True)
        if compiled.returncode:
            errors = [line for line in compiled.stderr.splitlines() if "error" in line]
            return {file.name: dataclasses.asdict(Facts(broken=f"nvcc: {errors[0] if errors else compiled.stderr.strip()}"))}
        code, usage = nvidia.disassemble(out.read_bytes(), tools)
    needs = nvidia.resources(usage)
    return {name: dataclasses.asdict(facts_of(blocks, needs[name], _WORK)) for name, blocks in nvidia.functions(code).items()}
