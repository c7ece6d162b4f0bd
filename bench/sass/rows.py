"""Facts about a kernel as a row of the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .budgets import IN_FLIGHT, Budget, reason_for
from .facts import Facts
from .latency import InFlight, in_flight
from .model import predict
from .targets import TARGETS


def elements_per_thread(job: Mapping[str, Any], facts: Facts) -> float:
    """Returns how many elements of a thread were counted: a full tile, or one trip of the main loop where its size is unknown."""
    if job["tile_elements"] is not None:
        return float(job["tile_elements"] / job["threads"])
    return facts.loop_bytes / (job["stored_bytes"] or 1)


def row_of(job: Mapping[str, Any], facts: Facts, budget: Budget | None) -> dict[str, Any]:
    """One row.

    Counts are of a thread: ``instr_per_element`` of a full tile, prologue included (of CUDA C++ kernels, whose tiles are sized when
    they run, of the main loop); ``loop_instr_per_element`` of the main loop alone. ``vector_bits`` is the narrowest access to
    weights; ``latency_fraction_...`` what reads in flight allow (latency.py), ``programs`` how many of them a multiprocessor holds.
    None: the kernel touches no weights, or has no loop.
    """
    per_thread = elements_per_thread(job, facts)
    target = TARGETS[job["target"]]
    # CUDA C++ loads V and N as it loads weights; only what it stores is known to be weights.
    accesses = [*facts.loads, *facts.stores] if job["tile_elements"] is not None else [*facts.stores]
    narrowest = min(accesses, default=None)
    weights = bool(job["itemsize"]) and bool(per_thread) and facts.broken is None
    prediction = (
        predict(facts, target, elements_per_thread=per_thread, bytes_per_element=job["bytes_per_element"]) if weights else None
    )
    loop_elements = facts.loop_bytes / (job["stored_bytes"] or 1)
    flying: InFlight | None = None
    if weights and job["tile_elements"] is not None:
        each = facts.loop_instructions / loop_elements if loop_elements else facts.instructions / per_thread
        flying = in_flight(job, facts, target, each)
    return {
        "kernel": job["kernel"],
        "triton": job["triton"],
        "target": job["target"],
        "dtype": job["dtype"],
        "rank": job["rank"],
        "registers": facts.registers,
        "spill_bytes": facts.spill_bytes,
        "vector_bits": narrowest,
        "instr_per_element": round(facts.instructions / per_thread, 2) if per_thread else None,
        "predicted_roofline": prediction.fraction if prediction else None,
        "latency_fraction_700ns": flying.fractions[0] if flying else None,
        "latency_fraction_1us": flying.fractions[1] if flying else None,
        "programs": flying.programs if flying else None,
        "reason": reason_for(job) if flying and flying.fractions[-1] < min(IN_FLIGHT.values()) else None,
        "loop_instr_per_element": round(facts.loop_instructions / loop_elements, 2) if loop_elements else None,
        "bound": prediction.bound if prediction else None,
        "budget": budget.instructions if budget is not None else None,
        "naive": job["naive"],
        "default": job["default"],
        "exact": job["exact"],
        "shared_bytes": facts.shared_bytes,
        "fused": sum(facts.fused.values()),
        "fused_per_element": round(facts.fused_on_path / per_thread, 3) if per_thread else None,
        "elements_per_thread": per_thread,
        "bytes_per_element": job["bytes_per_element"],
        "picoseconds": prediction.picoseconds if prediction else {},
    }
