"""Reading the assembly text that LLVM writes for CDNA: instructions, kernel descriptor and metadata."""

from __future__ import annotations

import re
from pathlib import Path

from .program import Access, Block, Instruction, Line, Resources, blocks_of

LANES = 64

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"')
_LOCATION = re.compile(r"^\s*\.loc\s+(\d+)\s")
_LABEL = re.compile(r"^(\.?[A-Za-z_][\w.$]*):")
_INSTRUCTION = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\b([^;]*)")
_FUSED = re.compile(
    r"v_(?:pk_)?(?:fma|fmac|fmaak|fmamk|mad|mac|madak|madmk|fma_mix|mad_mix|fma_mixlo|fma_mixhi)_(?:legacy_)?f32|v_fma_mix"
)
_MFMA = re.compile(r"v_s?mfmac?_f32_(\d+)x(\d+)x(\d+)")
_VECTOR_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store|atomic)_?(\w*)")
_SHARED_BITS = re.compile(r"_b(\d+)")
_DWORDS = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
# Integer multiplications and transcendentals run at a quarter of the rate.
_QUARTER = re.compile(r"v_(?:mul_lo_u32|mul_hi_[iu]32|mad_[iu]64_[iu]32|(?:exp|log|sin|cos|rcp|rsq|sqrt)_)")
# These wait or hint; they do no work.
_IDLE = re.compile(r"s_(?:waitcnt|nop|sleep|setprio|code_end|clause|sched)")


def resources(text: str) -> Resources:
    """Reads what the one kernel in the text needs."""

    def number(key: str) -> int:
        match = re.search(rf"^\s*(?:- )?{re.escape(key)}:?\s+(\d+)", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"the assembly does not state {key}")
        return int(match[1])

    # Scalar registers are spilled to lanes of vector registers. Where those run out, memory of a thread is stated too.
    spilled = 4 * number(".vgpr_spill_count")
    denormals = 3  # keep subnormals, both of arguments and of results
    return Resources(
        number(".vgpr_count"),
        max(spilled, number(".private_segment_fixed_size")),
        number(".group_segment_fixed_size"),
        number(".amdhsa_float_denorm_mode_32") != denormals,
    )


def blocks(text: str) -> list[Block]:
    """Reads the blocks of the one kernel in the text."""
    files: dict[str, str] = {}
    source = ""
    found: list[Line] = []
    for line in text.splitlines():
        if match := _FILE.match(line):
            files[match[1]] = Path(match[2]).name
        elif match := _LOCATION.match(line):
            source = files.get(match[1], "")
        elif match := _LABEL.match(line):
            if match[1].startswith(".Lfunc_end"):
                break
            found.append(Line(None, (match[1],)))
        elif (match := _INSTRUCTION.match(line)) and not _IDLE.match(match[1]):
            found.append(_line(match[1], match[2].strip(), source))
    return blocks_of(found)


def _line(opcode: str, operands: str, source: str) -> Line:
    instruction = instruction_of(opcode, operands, source)
    if opcode == "s_endpgm":
        return Line(instruction, falls=False, ends=True)
    if opcode == "s_branch":
        return Line(instruction, target=operands, falls=False)
    if opcode.startswith("s_cbranch"):
        return Line(instruction, target=operands)
    if opcode == "s_setpc_b64":
        raise ValueError(f"cannot follow {opcode}")
    return Line(instruction)


def instruction_of(opcode: str, operands: str, source: str) -> Instruction:
    """Reads one instruction. A fused multiply-add to -0 is a rounded multiply: LLVM has no other with an fp16 argument."""
    bare = re.sub(r"_(?:e32|e64|dpp|sdwa)$", "", opcode)
    access = None
    pipe, work = _pipe(bare)
    if match := _VECTOR_ACCESS.match(bare):
        bits = _access_bits(match[2])
        access = Access(match[1] != "load", bits)
        pipe, work = "global", max(bits, 32) / 8 * LANES
    return Instruction(
        opcode,
        source,
        pipe,
        work,
        access,
        fused=_fused(bare, operands),
        local=bare.startswith("scratch_"),
        call=bare == "s_swappc_b64",
    )


def _fused(bare: str, operands: str) -> int:
    if _FUSED.match(bare) is None or (bare == "v_fma_mix_f32" and "neg(0)" in operands):
        return 0
    return 2 if bare.startswith("v_pk_") else 1


def _access_bits(suffix: str) -> int:
    if suffix in _DWORDS:
        return _DWORDS[suffix]
    return 8 if "byte" in suffix else 16 if "short" in suffix else 32


def _pipe(bare: str) -> tuple[str, float]:
    if match := _MFMA.match(bare):
        return "tensor", float(int(match[1]) * int(match[2]) * int(match[3]))
    if bare.startswith("v_"):
        return ("quarter" if _QUARTER.match(bare) else "alu"), 1.0
    if bare.startswith("ds_"):
        bits = _SHARED_BITS.search(bare)
        return "shared", (max(int(bits[1]), 32) if bits else 32) / 8 * LANES
    return "other", 1.0
