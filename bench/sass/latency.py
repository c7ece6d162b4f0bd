"""The predicted share of a copy's speed that reads in flight allow: memory answers late, and a program waits for what it reads.

A multiprocessor that is to read its share of a copy's bandwidth with a latency of L must have bandwidth * L bytes in flight. How
many it has follows from the programs that fit on it (by registers, threads, shared memory and the largest number that it takes),
the bytes that each reads at a time, and how long it takes until the next ones are asked for:

    a kernel that reads ahead       the longest of L, computing and issuing;
    one that does not               L + computing, or issuing if that is longer.

Computing is what a block's instructions take in one warp, at one every 3.5 clocks; issuing is what those of all programs take of
the multiprocessor's slots, of which nine in ten are taken to be usable. Both are assumptions. What programs do before their first
block, V, and caches are left out, and L is what a busy device is taken to have: 0.7 us is good, 1 us is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .facts import Facts
from .targets import Target

LATENCIES = (0.7e-6, 1.0e-6)
"""Seconds. The second is the one that tiles are chosen by."""
_CLOCKS_AN_INSTRUCTION = 3.5
_USABLE_SLOTS = 0.9
_GRANULE = 8  # registers are handed out to threads by so many


@dataclasses.dataclass(frozen=True)
class InFlight:
    """What a kernel has in flight.

    Attributes:
        programs: that fit on a multiprocessor.
        bytes_per_program: that one reads at a time.
        fractions: of a copy's speed, one for each of :data:`LATENCIES`.
    """

    programs: int
    bytes_per_program: float
    fractions: tuple[float, ...]


def programs_of(registers: int, shared_bytes: int, threads: int, target: Target) -> int:
    """Returns how many programs fit on a multiprocessor."""
    granules = -(-max(registers, 1) // _GRANULE) * _GRANULE
    fitting = [target.registers // (granules * threads), target.threads // threads, target.programs]
    if shared_bytes:
        fitting.append(target.shared_memory // (shared_bytes + target.shared_reserved))
    return min(fitting)


def in_flight(job: Mapping[str, Any], facts: Facts, target: Target, instructions_per_element: float) -> InFlight:
    """Predicts for a kernel whose tile is known.

    Args:
        instructions_per_element: of the main loop, of a thread.
    """
    threads = job["threads"]
    programs = programs_of(facts.registers, facts.shared_bytes, threads, target)
    elements = job["tile_elements"] / job["iterations"]
    read = elements * job["read_bytes"]
    if not programs:
        return InFlight(0, read, tuple(0.0 for _ in LATENCIES))
    instructions = elements / threads * instructions_per_element
    computing = instructions * _CLOCKS_AN_INSTRUCTION / target.hertz
    issuing = programs * threads / target.lanes * instructions * target.clocks["issue"] / _USABLE_SLOTS / target.hertz
    needed = target.bandwidth * job["read_bytes"] / job["bytes_per_element"] / target.multiprocessors
    fractions = []
    for latency in LATENCIES:
        waiting = max(latency, computing) if job["ahead"] else latency + computing
        fractions.append(round(min(1.0, programs * read / max(waiting, issuing) / needed), 3))
    return InFlight(programs, read, tuple(fractions))
