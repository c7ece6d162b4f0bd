"""What is wrong with a kernel: one line for every defect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .budgets import IN_FLIGHT, ROOFLINE, Budget
from .facts import WIDE, Facts


def defects(job: Mapping[str, Any], facts: Facts, row: Mapping[str, Any], budget: Budget | None) -> list[str]:
    """Lists the defects of one kernel on one target.

    Args:
        job: what the catalogue says of it.
        row: what the table says of it.
        budget: None if there is none, which is a defect too.
    """
    if facts.broken is not None:
        return [f"cannot be compiled or followed: {facts.broken}"]
    return [
        *_memory(facts),
        *(_vectors(job, facts) if job["aligned"] else []),
        *_rounding(job, facts),
        *_speed(job, facts, row, budget),
    ]


def _memory(facts: Facts) -> list[str]:
    found = []
    if facts.spill_bytes:
        found.append(f"{facts.spill_bytes} bytes of stack or spilled registers a thread")
    if facts.local:
        found.append(f"{facts.local} accesses to local memory")
    return found


def _vectors(job: Mapping[str, Any], facts: Facts) -> list[str]:
    """Checks that 128-bit accesses to weights add up to the whole tile, and that nothing is stored more narrowly."""
    found = []
    if facts.narrow and job["tile_elements"] is not None:
        found.append(f"weights are accessed with fewer than 128 bits: {_listed(facts.narrow)}")
    if facts.other_narrow_stores:
        found.append(f"stores with fewer than 128 bits: {_listed(facts.other_narrow_stores)}")
    if job["tile_elements"] is None:
        return found + _trip(facts)
    per_thread = job["tile_elements"] / job["threads"]
    expected = per_thread * job["itemsize"]
    # A kernel that reads one block ahead has one load more on its path, which the last trip masks out.
    ahead = expected / job["iterations"] if job.get("ahead") else 0
    for name, moved, due in (("loads", facts.loads, expected + ahead), ("stores", facts.stores, per_thread * job["stored_bytes"])):
        if sum(moved.values()) != due:
            found.append(f"{name} of weights add up to {sum(moved.values())} bytes a thread where a full tile has {due:g}")
    return found


def _trip(facts: Facts) -> list[str]:
    """Checks one trip of a CUDA C++ kernel. Updates are in place: what a trip stores, it has loaded, as widely.

    Weights, V and N are loaded by the same function, so that narrow loads may be those of V or N, and are let pass.
    """
    wide, stored = facts.loads.get(WIDE, 0), sum(facts.stores.values())
    if not stored:
        return ["no loop that stores weights was found"]
    if wide < stored:
        return [f"a trip of the main loop stores {stored} bytes of weights and loads {wide} by 128 bits"]
    return []


def _rounding(job: Mapping[str, Any], facts: Facts) -> list[str]:
    found = []
    if job["exact"] and facts.fused:
        found.append(f"fused multiply-adds in fp32: {_listed(facts.fused)}")
    if job["aligned"] and job.get("fused") is not None:
        each = facts.fused_on_path * job["threads"] / job["tile_elements"]
        if each != job["fused"]:
            found.append(f"{each:g} fused multiply-adds in fp32 an element, {job['fused']} promised")
    if facts.flushing or facts.mode_flushes:
        found.append(f"subnormal numbers become zero: {_listed(facts.flushing) or 'mode of the kernel'}")
    return found


def _speed(job: Mapping[str, Any], facts: Facts, row: Mapping[str, Any], budget: Budget | None) -> list[str]:
    if budget is None:
        return ["no budget covers it (bench/sass/budgets.py)"]
    found = []
    if row["instr_per_element"] is not None and row["instr_per_element"] > budget.instructions:
        found.append(f"{row['instr_per_element']:g} instructions per element, {budget.instructions:g} budgeted")
    promised = ROOFLINE.get(job["target"], 0.0)
    if job["default"] and (row["predicted_roofline"] or 0.0) < promised:
        found.append(f"predicted roofline {row['predicted_roofline']} (bound by {row['bound']}), at least {promised:g} promised")
    found += _in_flight(job, row)
    if job["aligned"] and facts.unknown_loops:
        found.append(f"{facts.unknown_loops} loops whose trips nobody knows, so that the count is too low")
    if job["aligned"] and facts.calls:
        found.append(f"{facts.calls} calls of functions whose instructions are not counted")
    return found


def _in_flight(job: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    least, share = IN_FLIGHT.get(job["target"]), row["latency_fraction_1us"]
    if least is None or share is None or share >= least or not job["default"] or row["reason"] is not None:
        return []
    return [f"reads in flight allow {share:g} of a copy's speed at a latency of 1 us, {least:g} promised, and no reason is given"]


def _listed(opcodes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {opcode}" for opcode, count in sorted(opcodes.items()))
