"""Which instruction set the native backend uses, and why it may not serve."""

import os
import subprocess
import sys

import pytest
import torch

from lozo_kernels.kernels.backends import native
from lozo_kernels.kernels.backends.native import NativeBackend
from lozo_kernels.kernels.registry import choose_backend

NATIVE = NativeBackend()
ISAS = native.supported_isas() if NATIVE.unavailable(torch.device("cpu")) is None else []

pytestmark = pytest.mark.skipif(not ISAS, reason=f"native: {NATIVE.unavailable(torch.device('cpu'))}")


@pytest.fixture(autouse=True)
def settings():
    yield
    native.set_isa(None)


def test_isa_choice():
    native.set_isa("portable")
    assert native.isa() == "portable"
    native.set_isa(None)
    with pytest.raises(ValueError, match=r"'mmx'.*choose from.*portable"):
        native.set_isa("mmx")
    assert native.isa() == ISAS[0]


@pytest.mark.parametrize(("name", "expected"), [("portable", "portable None"), ("mmx", "ValueError instruction set 'mmx'")])
def test_isa_from_the_environment(name, expected):
    code = """
import torch
from lozo_kernels.kernels.backends import native
try:
    print(native.isa(), native.NativeBackend().unavailable(torch.device("cpu")))
except ValueError as error:
    print("ValueError", error)
"""
    environment = os.environ | {"LOZO_KERNELS_ISA": name}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(expected)


def test_reasons(monkeypatch, tmp_path):
    """Without the library the slow path serves, which is said once and in one line."""
    assert NATIVE.unavailable(torch.device("cuda")) == "it serves cpu only"
    assert NATIVE.unavailable(torch.device("cpu")) is None
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "liblozo_cpu.so")
    for cached in (native._load, native._warn):
        cached.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"^the compiled CPU kernels are not used.*install a wheel.*C\+\+ compiler") as found:
            assert "not built" in NATIVE.unavailable(torch.device("cpu"))
            assert choose_backend("cpu").backend.name != "native"
        assert len(found) == 1
    finally:
        native._load.cache_clear()
