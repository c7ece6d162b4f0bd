"""Launches after a layer are prepared once for a shape. They are those that Triton would make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("bench.host")


def test_prepared_launches_are_those_of_triton():
    """In a process where kernels are not interpreted, with a driver that only records."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "python_tests.prepared_launches"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
