"""Breaking any one Triton kernel by one bit turns ``bench correctness`` red. The bit is broken in Triton's interpreter."""

from __future__ import annotations

import json

import pytest
import torch

from lozo_kernels import bench
from lozo_kernels.bench import correctness
from lozo_kernels.kernels.backends.triton import TritonBackend
from lozo_kernels.kernels.registry import registered

REASON = TritonBackend().unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None or torch.cuda.is_available(), reason=f"Triton's interpreter: {REASON}")

# Every kernel, and the op that launches it. What is read again is rounded there, so a higher bit is broken.
LOWEST, ROUNDED_LATER = 0, 13
KERNELS = [
    ("lowrank_update_", "lowrank_update", LOWEST),
    ("lowrank_momentum_", "factor_update", LOWEST),
    ("lowrank_momentum_", "lowrank_merge", LOWEST),
    ("lowrank_signed_update_", "lowrank_signed_update", LOWEST),
    ("dense_update_", "dense_update", LOWEST),
    ("dense_momentum_", "dense_update", LOWEST),
    ("factor_update_", "factor_update", LOWEST),
    ("factor_momentum_", "factor_update", LOWEST),
    ("lowrank_merge_", "lowrank_merge", LOWEST),
    ("lowrank_merge_", "probed_factor", ROUNDED_LATER),
    ("dense_merge_", "dense_merge", LOWEST),
    ("resample_", "resample", LOWEST),
    ("resample_", "reproject", LOWEST),
    ("lowrank_linear_", "contraction", ROUNDED_LATER),
    ("lowrank_linear_", "expansion", LOWEST),
    ("lowrank_embedding_", "lookup", ROUNDED_LATER),
    ("lowrank_embedding_", "expansion", LOWEST),
    ("factor", "factor_rows", LOWEST),
]


class Breaker:
    """Breaks one bit of the first number that each launch of a kernel stores and that is not zero."""

    def __init__(self, kernel, bit):
        self.kernel, self.bit = kernel, bit
        self.armed = False
        self.seen: set[str] = set()
        self.broken = 0

    def stored(self, value, mask):
        """Returns what is stored instead."""
        if not self.armed:
            return value
        number = value.view({2: "uint16", 4: "uint32"}[value.itemsize])
        chosen = mask & (number & (0x7FFF if value.itemsize == 2 else 0x7FFFFFFF) != 0)
        if not chosen.any():
            return value
        self.armed, self.broken = False, self.broken + 1
        number = number.copy()
        number.flat[chosen.ravel().argmax()] ^= 1 << self.bit
        return number.view(value.dtype)


def launcher_with(breaker):
    from lozo_kernels.kernels.backends.triton.launcher import Launcher

    class Breaking(Launcher):
        def run(self, plan, programs, arguments):
            name = plan.kernel.fn.__name__
            breaker.seen.add(name)
            breaker.armed = name == breaker.kernel
            super().run(plan, programs, arguments)
            breaker.armed = False

    return Breaking()


def run(op, breaker, monkeypatch, tmp_path):
    """Runs ``bench correctness`` on small cases; returns its exit status, and its rows by op."""
    from triton.runtime.interpreter import InterpreterBuilder

    def store(self, pointers, value, mask, *rest):
        broken = type(value)(breaker.stored(value.data, mask.data), value.dtype)
        return right(self, pointers, broken, mask, *rest)

    # The interpreter takes some 30 ms a program, and a dense kernel has one for each row.
    monkeypatch.setitem(correctness._SHAPES, "tiny", ((1, 5, 129), (1, 6, 16)))
    right = InterpreterBuilder.create_masked_store
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)
    tiny = [plan for plan in correctness.plans(quick=True) if plan.layout == "tiny"]
    monkeypatch.setattr(correctness, "plans", lambda **_: tiny if op == "factor" else [p for p in tiny if p.op == op])
    backend = TritonBackend(launcher_with(breaker))
    backend.name = "broken triton"
    path = tmp_path / "correctness.json"
    chosen = ["--ops", "factor_update_"] if op == "factor" else []
    with registered(backend):
        code = bench.main(["correctness", "--backends", backend.name, "--output", str(path), *chosen])
    return code, {row["op"]: row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize(("op", "kernel", "bit"), KERNELS)
def test_one_bit_turns_it_red(monkeypatch, tmp_path, op, kernel, bit):
    breaker = Breaker(kernel, bit)
    code, rows = run(op, breaker, monkeypatch, tmp_path)
    assert breaker.broken, f"{op} does not launch {kernel}, but {breaker.seen}"
    assert code == 1
    wrong = {name for name, row in rows.items() if row["wrong"] or row["errors"]}
    assert wrong == {op.rstrip("_")}


def test_every_kernel_is_in_the_list(monkeypatch, tmp_path):
    """Nothing is broken here, so nothing is red, and the ops launch what the list has."""
    seen = set()
    for op in correctness.ALL_OPS:
        with monkeypatch.context() as patched:
            breaker = Breaker("none", LOWEST)
            code, rows = run(op, breaker, patched, tmp_path)
        assert code == 0 and rows
        seen |= breaker.seen
    assert seen == {kernel for _, kernel, _ in KERNELS}
    assert {op for op, *_ in KERNELS} == {*correctness.ALL_OPS, "factor"}
