"""Machine code as the readers hand it over: instructions with what matters about each, in blocks that branch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Access:
    """One access of a thread to global memory."""

    store: bool
    bits: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a warp or wave.

    Attributes:
        opcode: with its modifiers.
        source: name of the file that the line table says it comes from, "" without line table.
        pipe: the execution unit: a key of :attr:`~bench.sass.targets.Target.clocks`, or "shared", "global" or "tensor".
        work: how often it uses the pipe: 1; bytes of a warp for "shared" and "global"; multiply-adds of a warp for "tensor".
        fused: the fused multiply-adds in fp32 that it makes in a thread: two if it works on pairs.
        flushes: takes subnormal fp32 numbers for zero.
        local: reads or writes memory that spills go to.
        call: of a function whose instructions are counted nowhere.
        waits: a loop around it waits for other units and has one trip when they are done.
    """

    opcode: str
    source: str = ""
    pipe: str = "other"
    work: float = 1.0
    access: Access | None = None
    fused: int = 0
    flushes: bool = False
    local: bool = False
    call: bool = False
    waits: bool = False


@dataclasses.dataclass
class Block:
    """Instructions without a branch between them. ``successors`` are positions of blocks; ``ends``: the program may end there."""

    instructions: list[Instruction]
    successors: list[int]
    ends: bool = False


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the compiler says that a thread needs.

    Attributes:
        spill_bytes: stack and local memory of a thread.
        flushes: the kernel runs in a mode that takes subnormal fp32 numbers for zero.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    flushes: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of assembly before blocks are made: an instruction and where it may go.

    Attributes:
        labels: the names of this place.
        target: label of a branch.
        falls: whether the next line may follow.
        ends: whether the program may end here.
    """

    instruction: Instruction | None
    labels: tuple[str, ...] = ()
    target: str | None = None
    falls: bool = True
    ends: bool = False


def blocks_of(lines: Iterable[Line]) -> list[Block]:
    """Cuts lines into blocks: at labels and after branches."""
    groups: list[list[Line]] = [[]]
    at: dict[str, int] = {}
    for line in lines:
        if line.labels and groups[-1]:
            groups.append([])
        at.update(dict.fromkeys(line.labels, len(groups) - 1))
        if line.instruction is None:
            continue
        groups[-1].append(line)
        if line.target is not None or not line.falls or line.ends:
            groups.append([])
    blocks = []
    for i, group in enumerate(groups):
        last = group[-1] if group else Line(None)
        successors = []
        if last.target is not None:
            successors.append(at[last.target])
        if last.falls and i + 1 < len(groups) and i + 1 not in successors:
            successors.append(i + 1)
        blocks.append(Block([line.instruction for line in group if line.instruction is not None], successors, last.ends))
    return blocks
