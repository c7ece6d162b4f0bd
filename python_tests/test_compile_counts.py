"""A kernel is compiled once in a run, wherever its scalars lie."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_scalars_that_are_not_aligned_compile_nothing_again():
    """Scales of one tensor or direction among many are views of a larger tensor, at any multiple of 4 bytes."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "python_tests.compile_counts"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    kernels = {"lowrank_update", "lowrank_merge", "dense_update", "dense_merge", "factor_update", "probed_factor"}
    assert kernels | {"contraction", "expansion", "lookup"} <= set(found["aligned"])
    assert found["again"] == {}
