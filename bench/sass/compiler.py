"""Compiles kernels of a catalogue ahead of time and reads them. Imports Triton: only workers do that, see pool.py."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lozo_kernels.kernels.backends.triton import weights

from . import amd, nvidia
from .facts import Facts, Work, facts_of
from .targets import Target

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_FAR = 100_000


def _number_lines_of_weights_apart() -> None:
    """Gives functions of weights.py line numbers that no other file has.

    ptxas leaves out a change of file where the number of the line stays the same. What a line of another file does would then be
    taken for a line of weights.py, or the other way round, and accesses to weights would not add up.
    """
    for function in vars(weights).values():
        if isinstance(function, triton.JITFunction):
            # Triton 3.6 counts lines from the first name, later versions from the second.
            for name in ("starting_line_number", "def_file_line_number"):
                if hasattr(function, name):
                    setattr(function, name, getattr(function, name) + _FAR)


_number_lines_of_weights_apart()


@functools.cache
def compilations(catalogue: str, vendor: str) -> list[Any]:
    """Returns the catalogue's list for a vendor."""
    return list(importlib.import_module(catalogue).compilations(vendor=vendor))


def describe(compilation: Any, vendor: str) -> dict[str, Any]:
    """Describes a compilation for the parent process, as JSON."""
    return {
        "kernel": compilation.kernel,
        "dtype": compilation.dtype,
        "rank": compilation.rank,
        "aligned": compilation.aligned,
        "exact": compilation.exact,
        "fused": compilation.fused,
        "tile_elements": compilation.tile_elements,
        "iterations": compilation.iterations,
        "ahead": bool(compilation.constants.get("AHEAD")),
        "itemsize": compilation.itemsize,
        "stored_bytes": compilation.itemsize if compilation.writes else 0,
        "bytes_per_element": compilation.bytes_per_element,
        "read_bytes": compilation.read_bytes,
        "default": compilation.default,
        "threads": _threads(compilation, 32 if vendor == "nvidia" else 64),
        "naive": getattr(compilation, "naive", False),
        "key": _key(compilation),
    }


def read(compilation: Any, target: Target) -> Facts:
    """Compiles for a target and reads the machine code."""
    stored = compilation.tile_elements * compilation.itemsize if compilation.writes else 0
    work = Work(
        bytes_per_thread=stored / _threads(compilation, target.lanes),
        iterations=compilation.iterations,
        longest=not getattr(compilation, "naive", False),
        nested=compilation.nested,
    )
    compiled = _compile(compilation, target)
    if target.vendor == "amd":
        text = compiled.asm["amdgcn"]
        return facts_of(amd.blocks(text), amd.resources(text), work)
    code, usage = nvidia.disassemble(compiled.asm["cubin"], _TOOLS)
    name = compiled.metadata.name
    facts = facts_of(nvidia.functions(code)[name], nvidia.resources(usage)[name], work)
    return Facts(**{**vars(facts), "shared_bytes": max(facts.shared_bytes, compiled.metadata.shared)})


def _compile(compilation: Any, target: Target) -> Any:
    names = compilation.function.arg_names
    signature = {n: "constexpr" if n in compilation.constants else compilation.signature[n] for n in names}
    constants = {n: compilation.constants[n] for n in names if n in compilation.constants}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in compilation.divisible}
    source = ASTSource(fn=compilation.function, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget("cuda" if target.vendor == "nvidia" else "hip", target.arch, target.lanes)
    return triton.compile(source, target=gpu, options=dict(compilation.options))


def _threads(compilation: Any, lanes: int) -> int:
    return int(compilation.options["num_warps"]) * lanes


def _key(compilation: Any) -> str:
    """Makes a key that tells a compilation from all others, now and after changes of sources."""
    parts = [
        compilation.function.cache_key,
        compilation.kernel,
        compilation.dtype,
        compilation.rank,
        compilation.signature,
        compilation.divisible,
    ]
    parts += [compilation.constants, compilation.options, compilation.tile_elements, compilation.iterations, compilation.nested]
    return repr(parts)
