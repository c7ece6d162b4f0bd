"""The predicted roofline: which unit of a machine a pass over weights waits for.

An in-place pass must read and write every weight once, and dense momentum too: its least time is those bytes / the bandwidth of a
copy. Every execution unit needs time as well: the work that the counted path gives it, spread over all multiprocessors, at the
unit's throughput

- issue: every instruction, at four a clock;
- alu, special: their instructions;
- fma: multiplications of fp32 and integers, and additions of fp32;
- shared, global: bytes through shared memory, and between the first-level cache and registers;
- tensor: multiply-adds.

Units work at the same time, so the pass takes as long as the slowest of them, and ``fraction`` = time of memory / that time. It is
an upper bound of what a device reaches: it knows nothing of latency, bank conflicts, waits at barriers, the last wave of
programs, or a clock below the nominal one. It finds kernels that cannot be memory bound; only a measurement shows one that is.
"""

from __future__ import annotations

import dataclasses

from .facts import Facts
from .targets import Target


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Picoseconds of the whole device per weight by unit; the unit that takes longest; what share of its time memory takes."""

    picoseconds: dict[str, float]
    bound: str
    fraction: float


def predict(facts: Facts, target: Target, *, elements_per_thread: float, bytes_per_element: int) -> Prediction:
    """Predicts what a pass waits for that moves so many bytes an element."""
    clocks = {"issue": facts.instructions * target.clocks["issue"]} | _lanes(facts, target)
    for pipe, rate in (("shared", target.shared_bytes), ("global", target.global_bytes), ("tensor", target.multiply_adds)):
        if pipe in facts.pipes:
            clocks[pipe] = facts.pipes[pipe] / rate
    # A unit's clocks are those of one warp, which does elements_per_thread elements in every lane.
    scale = 1e12 / (elements_per_thread * target.lanes * target.multiprocessors * target.hertz)
    picoseconds = {unit: round(c * scale, 4) for unit, c in clocks.items()}
    picoseconds["memory"] = round(1e12 * bytes_per_element / target.bandwidth, 4)
    slowest = max(picoseconds, key=lambda unit: (picoseconds[unit], unit == "memory"))
    return Prediction(picoseconds, slowest, round(picoseconds["memory"] / picoseconds[slowest], 3))


def _lanes(facts: Facts, target: Target) -> dict[str, float]:
    """Returns the clocks of the units that compute."""
    work = {pipe: facts.pipes.get(pipe, 0.0) for pipe in ("alu", "quarter", "special", "fma", "imad", "wide")}
    rate = target.clocks
    if target.vendor == "amd":
        return {"alu": work["alu"] * rate["alu"] + work["quarter"] * rate["quarter"]}
    integers = work["imad"] * rate["heavy"] + work["wide"] * rate["wide"]
    floats = work["fma"] * rate["heavy"]
    # Floats go wherever there is room: with lite lanes, both kinds are full at the same time unless integers alone take longer.
    fma = max(integers, (integers + floats) / 2) if "lite" in rate else integers + floats
    return {"alu": work["alu"] * rate["alu"], "special": work["special"] * rate["special"], "fma": fma}


def memory_bound_instructions(target: Target, bytes_per_element: int) -> float:
    """Thread instructions per weight that fit into the time that memory takes; of vectors only, on a machine with a scalar unit."""
    unit = "issue" if target.vendor == "nvidia" else "alu"
    per_second = target.multiprocessors * target.hertz * target.lanes / target.clocks[unit]
    return bytes_per_element / target.bandwidth * per_second
