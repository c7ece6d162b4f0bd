"""What reads in flight allow: the model, worked out by hand, and the defect that follows from it."""

import dataclasses

import pytest

from bench.sass import budgets, rows
from bench.sass.budgets import Budget, Reason
from bench.sass.checks import defects
from bench.sass.facts import Facts
from bench.sass.latency import in_flight, programs_of
from bench.sass.rows import row_of
from bench.sass.targets import TARGETS

H200 = TARGETS["sm_90"]
# 32x64 bf16 in 16 blocks a program of four warps: 4,096 bytes a block.
JOB = {
    "kernel": "update",
    "triton": "3.9.0",
    "target": "sm_90",
    "dtype": "bfloat16",
    "rank": 4,
    "aligned": True,
    "exact": True,
    "naive": False,
    "default": True,
    "tile_elements": 32 * 64 * 16,
    "threads": 128,
    "iterations": 16,
    "ahead": False,
    "itemsize": 2,
    "stored_bytes": 2,
    "read_bytes": 2,
    "bytes_per_element": 4,
}
BUDGET = Budget("update", "*", (1, 64), "*", 28)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "target", "programs"),
    [
        (72, 0, 128, "sm_90", 7),  # 65,536 / (72 * 128)
        (65, 0, 128, "sm_90", 7),  # handed out by eight
        (255, 0, 256, "sm_90", 1),
        (32, 0, 1024, "sm_90", 2),  # 2,048 threads
        (16, 0, 32, "sm_90", 32),
        (16, 0, 32, "sm_120", 24),
        (32, 75 << 10, 128, "sm_90", 3),  # 228 KiB, of which each program takes one more
        (128, 0, 256, "gfx942", 4),
    ],
)
def test_programs_on_a_multiprocessor(registers, shared, threads, target, programs):
    assert programs_of(registers, shared, threads, TARGETS[target]) == programs


def share(ahead, registers=96, instructions=10.0, **job):
    return in_flight(JOB | {"ahead": ahead} | job, Facts(registers=registers), H200, instructions)


def test_the_share_is_what_is_in_flight_over_what_a_copy_needs():
    """A copy reads half of 4.3 TB/s: 16.29 bytes a nanosecond and multiprocessor. Five programs have 20,480 bytes in flight."""
    needed = 4.3e12 / 2 / 132 / 1e9
    block = 16 * 10.0 * 3.5 / 1.755  # nanoseconds that 16 elements a thread take
    assert share(True).programs == 5 and share(True).bytes_per_program == 4096
    assert share(True).fractions == (1.0, 1.0)
    assert share(False).fractions == tuple(round(min(1, 20480 / (latency + block) / needed), 3) for latency in (700, 1000))
    assert share(False).fractions[1] == pytest.approx(0.953, abs=1e-3)
    assert share(True, registers=168).fractions[1] == pytest.approx(3 * 4096 / 1000 / needed, abs=1e-3)


def test_instructions_bound_what_reads_ahead_cannot():
    """Nine in ten slots: 27.6 instructions an element times 0.9."""
    assert share(True, instructions=24.0).fractions[1] == 1.0
    assert share(True, instructions=49.7).fractions[1] == pytest.approx(0.5, abs=1e-3)


def test_a_kernel_that_fits_nowhere_has_nothing_in_flight():
    assert share(True, registers=255, threads=1024).fractions == (0.0, 0.0)


def test_what_else_is_read_is_in_flight_too():
    """Dense momentum reads 2 + 4 of the 12 bytes that it moves: half, as an update in place does, in three times the bytes."""
    dense, update = (share(False, registers=255, threads=256, **job) for job in ({"read_bytes": 6, "bytes_per_element": 12}, {}))
    assert dense.bytes_per_program == 12288
    assert dense.fractions[1] == pytest.approx(3 * update.fractions[1], abs=2e-3)


def test_too_little_in_flight_is_a_defect_that_a_reason_excuses(monkeypatch):
    facts = Facts(
        registers=168, loads={128: 512}, stores={128: 512}, instructions=2560, loop_instructions=160, loop_bytes=32, trips=16
    )
    row = row_of(JOB, facts, BUDGET)
    assert row["latency_fraction_1us"] < 0.95 and row["programs"] == 3 and row["reason"] is None
    assert [d for d in defects(JOB, facts, row, BUDGET) if "a latency of 1 us" in d]
    assert not defects(JOB | {"default": False}, facts, row, BUDGET)
    monkeypatch.setattr(budgets, "REASONS", (Reason("upd*", "*", (1, 8), "why"),))
    row = row_of(JOB, facts, BUDGET)
    assert row["reason"] == "why" and not defects(JOB, facts, row, BUDGET)
    enough = dataclasses.replace(facts, registers=96)
    assert rows.row_of(JOB | {"ahead": True}, enough, BUDGET)["reason"] is None


def test_reasons_are_needed():
    """Every reason is about kernels that exist, and says something."""
    assert all(r.text and r.ranks[0] <= r.ranks[1] for r in budgets.REASONS)
