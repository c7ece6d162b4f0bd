"""What the machine code of one kernel says, as plain numbers, from which checks, model and tables are made."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .flow import Loop, Path, heaviest_path
from .program import Block, Instruction, Resources

WIDE = 128
"""Bits of a vector access."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What the reader must know of a kernel to follow it.

    Attributes:
        bytes_per_thread: of weights that a thread reads, and writes, in a full tile; 0 if the kernel does not touch weights. None:
            the size of a tile is known only when the kernel runs, and one trip of the main loop is all that is counted.
        iterations: trips of the only loop, where no weights tell them.
        sources: names of the files whose loads and stores are those of weights. They are told apart by the line table, because
            registers that hold addresses say nothing, and table, V and scalars are loaded in the same loops.
        longest: count the longest path, not the shortest.
        nested: trips of a loop inside the main one, if it has one.
    """

    bytes_per_thread: float | None
    iterations: int = 1
    sources: tuple[str, ...] = ("weights.py",)
    longest: bool = True
    nested: int | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """All counts are of one thread. The path is that through a full tile, or one trip of the main loop, see :class:`Work`.

    Attributes:
        loads, stores: bytes of weights on the path, by the bits of the access.
        narrow: accesses to weights below 128 bits anywhere, by opcode.
        other_narrow_stores: stores below 128 bits to global memory, but not to weights, anywhere, by opcode.
        fused, flushing: by opcode, anywhere.
        fused_on_path: fused multiply-adds on the path.
        local: accesses to spill memory anywhere.
        calls: functions called on the path.
        instructions: on the path, or of one trip of the main loop where that is all that is counted.
        loop_instructions, loop_bytes: of one trip of the main loop; bytes of weights stored in it. 0 without one.
        trips: of the main loop.
        unknown_loops: loops on the path whose trips nobody knows; they are counted once.
        pipes: work on the path by execution unit.
        broken: why the path could not be found, or the kernel not be compiled.
    """

    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    mode_flushes: bool = False
    loads: dict[int, int] = dataclasses.field(default_factory=dict)
    stores: dict[int, int] = dataclasses.field(default_factory=dict)
    narrow: dict[str, int] = dataclasses.field(default_factory=dict)
    other_narrow_stores: dict[str, int] = dataclasses.field(default_factory=dict)
    fused: dict[str, int] = dataclasses.field(default_factory=dict)
    flushing: dict[str, int] = dataclasses.field(default_factory=dict)
    fused_on_path: int = 0
    local: int = 0
    calls: int = 0
    instructions: int = 0
    loop_instructions: int = 0
    loop_bytes: int = 0
    trips: int = 1
    unknown_loops: int = 0
    pipes: dict[str, float] = dataclasses.field(default_factory=dict)
    broken: str | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Facts:
        """Reads what ``dataclasses.asdict`` wrote as JSON, which makes strings of the keys."""
        data = dict(data)
        for key in ("loads", "stores"):
            data[key] = {int(bits): count for bits, count in data.get(key, {}).items()}
        return cls(**data)


def facts_of(blocks: Sequence[Block], resources: Resources, work: Work) -> Facts:
    """Reads a kernel."""
    every = [i for b in blocks for i in b.instructions]

    def is_weight(i: Instruction) -> bool:
        return i.access is not None and i.source in work.sources

    def moved(instructions: Iterable[Instruction]) -> int:
        return sum(i.access.bits // 8 for i in instructions if i.access is not None and is_weight(i))

    def stored(instructions: Iterable[Instruction]) -> int:
        return moved(i for i in instructions if i.access is not None and i.access.store)

    common: dict[str, Any] = {
        "registers": resources.registers,
        "spill_bytes": resources.spill_bytes,
        "shared_bytes": resources.shared_bytes,
        "mode_flushes": resources.flushes,
        "narrow": _opcodes(i for i in every if is_weight(i) and i.access is not None and i.access.bits < WIDE),
        "other_narrow_stores": _opcodes(
            i for i in every if i.access and i.access.store and not is_weight(i) and i.access.bits < WIDE
        ),
        "fused": _opcodes(i for i in every if i.fused),
        "flushing": _opcodes(i for i in every if i.flushes),
        "local": sum(i.local for i in every),
    }
    try:
        path = heaviest_path(blocks, lambda b: moved(b.instructions), longest=work.longest)
        counts = [[of(b.instructions) for b in blocks] for of in (stored, moved, lambda some: sum(i.fused for i in some))]
        main = _set_trips(path, *counts, work)
    except ValueError as error:
        return Facts(**common, broken=str(error))
    trip = main.path.visits() if main is not None else Counter()
    visits = trip if trip and work.bytes_per_thread is None else path.visits()
    pipes: defaultdict[str, float] = defaultdict(float)
    sizes: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for block, count in visits.items():
        for i in blocks[block].instructions:
            pipes[i.pipe] += count * i.work
            if i.access is not None and is_weight(i):
                sizes[i.access.store][i.access.bits] += count * i.access.bits // 8
    return Facts(
        **common,
        loads=dict(sizes[False]),
        stores=dict(sizes[True]),
        calls=sum(count * sum(i.call for i in blocks[block].instructions) for block, count in visits.items()),
        fused_on_path=sum(count * sum(i.fused for i in blocks[block].instructions) for block, count in visits.items()),
        instructions=sum(count * len(blocks[block].instructions) for block, count in visits.items()),
        loop_instructions=sum(count * len(blocks[block].instructions) for block, count in trip.items()),
        loop_bytes=sum(count * stored(blocks[block].instructions) for block, count in trip.items()),
        trips=1 if main is None or main.trips is None else main.trips,
        unknown_loops=sum(loop.trips is None and not _waits(loop, blocks) for loop in path.loops()),
        pipes=dict(pipes),
    )


def _opcodes(instructions: Iterable[Instruction]) -> dict[str, int]:
    return dict(Counter(i.opcode for i in instructions))


def _waits(loop: Loop, blocks: Sequence[Block]) -> bool:
    return any(i.waits for block in loop.path.visits() for i in blocks[block].instructions)


def _set_trips(path: Path, stored: Sequence[int], every: Sequence[int], fused: Sequence[int], work: Work) -> Loop | None:
    """Finds the main loop and its trips. Compilers unroll and peel, so trips follow from the weights that a full tile stores."""
    loops = list(path.loops())
    if work.bytes_per_thread == 0:
        return _reading_loop(loops, every, work)

    def bytes_of(way: Path) -> int:
        return sum(count * stored[block] for block, count in way.visits().items())

    main = _storing_loop(loops, bytes_of, fused, work)
    if main is None:
        return None
    for loop in loops:
        if work.bytes_per_thread is None or (loop.trips is None and main in loop.path.loops()):
            loop.trips = 1
    if work.bytes_per_thread is None:
        return main
    trips, rest = divmod(work.bytes_per_thread - bytes_of(path), bytes_of(main.path))
    if rest or trips < 0:
        raise ValueError(
            f"stores of weights do not add up: {bytes_of(main.path)} bytes a trip and "
            f"{bytes_of(path)} outside the loop make no {work.bytes_per_thread:g} bytes"
        )
    main.trips = int(trips)
    return main


def _share_trips(loops: Sequence[Loop], fused: Sequence[int], trips: int | None) -> None:
    """Sets the trips of the loops inside a main one. Of one loop, compilers make one that is unrolled and one for what remains: a
    trip of the first is as many as it has times the fused multiply-adds of the second."""
    sizes = {id(loop): sum(fused[block] * count for block, count in loop.path.visits().items()) for loop in loops}
    least = min(sizes.values(), default=0)
    for loop in sorted(loops, key=lambda loop: -sizes[id(loop)]):
        if trips is None or trips == 1 or not least:
            loop.trips = trips
        else:
            loop.trips, trips = divmod(trips, sizes[id(loop)] // least)


def _reading_loop(loops: Sequence[Loop], every: Sequence[int], work: Work) -> Loop | None:
    """Finds the main loop of a kernel that only reads weights. Such a kernel waits in further loops."""
    reading = [loop for loop in loops if any(every[block] for block in loop.path.visits())] or loops
    if len(reading) != 1:
        return None
    reading[0].trips = work.iterations
    return reading[0]


def _storing_loop(loops: Sequence[Loop], bytes_of: Callable[[Path], int], fused: Sequence[int], work: Work) -> Loop | None:
    """Finds the innermost loop that stores most. Others that store are its remainders, which a full tile skips."""
    storing = [loop for loop in loops if bytes_of(loop.path) and not any(bytes_of(inner.path) for inner in loop.path.loops())]
    for loop in storing:
        loop.trips = 0
        _share_trips(list(loop.path.loops()), fused, work.nested)
    return max(storing, key=lambda loop: bytes_of(loop.path), default=None)
