"""Reading SASS: what ``nvdisasm -c -g`` and ``cuobjdump -res-usage`` print."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

from .program import Access, Block, Instruction, Line, Resources, blocks_of

LANES = 32

_SECTION = re.compile(r"^\.text\.([\w$.]+):")
_LABEL = re.compile(r"^(\.L[\w.$]+):")
_SOURCE = re.compile(r'^\s*//## File "([^"]*)"')
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.[\w]+)*)\b(.*?);")
_PLACE = re.compile(r"`\((\.L[\w.$]+)\)")
_PREDICATE = re.compile(r"\bU?P\d")
_USAGE = re.compile(r"Function ([\w$.]+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")

_FLOAT = {"FFMA", "FMUL", "FADD", "FFMA32I", "FMUL32I", "FADD32I"}
_FLOAT_PAIR = {"FFMA2", "FMUL2", "FADD2"}
_HALF = {"HFMA2", "HADD2", "HMUL2", "HFMA2_MMA"}
_SPECIAL = {"MUFU", "POPC", "FLO", "BREV", "F2F", "F2I", "I2F", "FRND"}
_GLOBAL_LOADS = {"LDG", "LD", "LDGSTS"}
_GLOBAL_STORES = {"STG", "ST", "RED", "REDG", "ATOM", "ATOMG"}
_SHARED = {"LDS", "STS", "ATOMS"}
_SHARED_MATRICES = {"LDSM", "STSM"}
_LOCAL = {"LDL", "STL"}
_CONSTANT = {"LDC", "LDCU", "ULDC"}
_CONTROL = {
    *("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "BAR", "WARPSYNC", "DEPBAR", "YIELD", "SYNCS", "WARPGROUP", "BREAK", "ERRBAR"),
    *("MEMBAR", "CCTL", "FENCE", "LDGDEPBAR", "NANOSLEEP", "ACQBULK", "PREEXIT", "ELECT", "VOTE", "SHFL", "S2R", "CS2R"),
}


def disassemble(cubin: bytes, tools: Path) -> tuple[str, str]:
    """Returns what nvdisasm and cuobjdump, found in ``tools``, say about a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        commands = ([str(tools / "nvdisasm"), "-c", "-g", str(path)], [str(tools / "cuobjdump"), "-res-usage", str(path)])
        code, usage = (subprocess.run(c, check=True, capture_output=True, text=True).stdout for c in commands)
    return code, usage


def resources(usage: str) -> dict[str, Resources]:
    """Reads what every function needs."""
    return {
        name: Resources(int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in _USAGE.findall(usage)
    }


def functions(code: str) -> dict[str, list[Block]]:
    """Reads the blocks of every function."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for text in code.splitlines():
        section = _SECTION.match(text)
        if section:
            lines = sections.setdefault(section[1], [])
        lines.append(text)
    return {name: blocks_of(_lines(body)) for name, body in sections.items()}


def _lines(body: list[str]) -> list[Line]:
    """Reads the lines of a function."""
    source = ""
    found = []
    for text in body:
        if match := _SOURCE.match(text):
            source = Path(match[1]).name
        elif match := _LABEL.match(text):
            found.append(Line(None, (match[1],)))
        elif match := _INSTRUCTION.match(text):
            predicate, opcode, operands = match[1], match[2], match[3]
            if opcode != "NOP":
                found.append(_line(predicate, opcode, operands, source))
    return found


def _line(predicate: str | None, opcode: str, operands: str, source: str) -> Line:
    instruction = instruction_of(opcode, operands, source)
    base = opcode.split(".")[0]
    if base in ("BRX", "JMX", "JMP", "BRXU", "JMXU"):
        raise ValueError(f"cannot follow {opcode}")
    # Warps that have not diverged never take BRA.DIV.
    if base == "BRA" and ".DIV" not in opcode:
        place = _PLACE.search(operands)
        if place is None:
            raise ValueError(f"cannot follow {opcode}{operands}")
        conditional = predicate is not None or _PREDICATE.search(operands[: place.start()]) is not None
        return Line(instruction, target=place[1], falls=conditional)
    # A jump to the end of the kernel may be a call that never returns.
    if base == "CALL" and (place := _PLACE.search(operands)) is not None:
        return Line(dataclasses.replace(instruction, call=False), target=place[1], falls=predicate is not None)
    if base == "EXIT":
        return Line(instruction, falls=predicate is not None, ends=True)
    if base == "RET":
        return Line(instruction, falls=False)
    return Line(instruction)


def instruction_of(opcode: str, operands: str, source: str) -> Instruction:
    """Reads one instruction. A fused multiply-add to -0 is a rounded multiply."""
    base, *modifiers = opcode.split(".")
    pipe, work = _pipe(base, modifiers)
    bits = _bits(modifiers)
    access = None
    if base in _GLOBAL_LOADS | _GLOBAL_STORES:
        access = Access(base in _GLOBAL_STORES, bits)
    return Instruction(
        opcode,
        source,
        pipe,
        work,
        access,
        fused=0 if not base.startswith("FFMA") or operands.rstrip().endswith("-RZ") else 2 if base in _FLOAT_PAIR else 1,
        flushes="FTZ" in modifiers and base in _FLOAT | _FLOAT_PAIR,
        local=base in _LOCAL,
        call=base == "CALL" and "guardrail_trap" not in operands,  # ptxas's assertions about tensor memory
        waits=base == "NANOSLEEP" or "TRYWAIT" in modifiers,
    )


def _bits(modifiers: list[str]) -> int:
    for modifier in modifiers:
        if modifier in ("8", "16", "32", "64", "128", "256"):
            return int(modifier)
        if modifier in ("U8", "S8", "U16", "S16"):
            return int(modifier[1:])
    return 32


_PIPES = (
    (_FLOAT | _HALF, "fma"),
    (_FLOAT_PAIR, "fma"),
    ({"IDP"}, "imad"),
    (_SPECIAL, "special"),
    ({"HMMA", "HGMMA", "IMMA", "QGMMA", "UTCHMMA"}, "tensor"),
    (_GLOBAL_LOADS | _GLOBAL_STORES, "global"),
    (_SHARED | _SHARED_MATRICES, "shared"),
    (_LOCAL | _CONSTANT | _CONTROL | {"R2UR", "S2UR", "LDTM", "STTM"}, "other"),
)


def _pipe(base: str, modifiers: list[str]) -> tuple[str, float]:
    """Returns the pipe that an instruction of a warp occupies, and how much work it is there."""
    if base == "IMAD":
        return "wide" if {"WIDE", "HI"} & set(modifiers) else "imad", 1.0
    pipe = next((name for opcodes, name in _PIPES if base in opcodes), "other" if base.startswith("U") else "alu")
    if pipe == "tensor":
        return pipe, _multiply_adds(modifiers)
    if base in _SHARED_MATRICES:
        return pipe, 128.0 * (int(modifiers[-1]) if modifiers[-1].isdigit() else 1)  # matrices of 128 bytes
    if pipe in ("global", "shared"):
        # A warp's narrow access occupies the pipe as 32 bits a thread do.
        return pipe, max(_bits(modifiers), 32) / 8 * LANES
    return pipe, 2.0 if base in _FLOAT_PAIR else 1.0


def _multiply_adds(modifiers: list[str]) -> float:
    """Counts the multiply-adds of one warp. tcgen05 (UTC...) is issued by one thread of a block and counts as nothing."""
    for modifier in modifiers:
        if modifier in ("16816", "1688"):
            return 16.0 * 8 * int(modifier[3:])
        shape = re.fullmatch(r"64x(\d+)x(\d+)", modifier)
        if shape:
            return 64.0 * int(shape[1]) * int(shape[2]) / 4
    return 0.0
