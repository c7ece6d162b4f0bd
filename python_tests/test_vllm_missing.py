"""``lozo_kernels.vllm`` where vLLM is not installed, or not asked for."""

import importlib.util
import subprocess
import sys

import pytest

from lozo_kernels.errors import EngineError, MissingPackageError


def test_importing_never_imports_vllm():
    code = "import sys, lozo_kernels, lozo_kernels.hf, lozo_kernels.vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_call_that_needs_it_says_what_to_install(monkeypatch):
    from lozo_kernels.vllm import engine_options

    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    with pytest.raises(MissingPackageError, match=r"pip install vllm.*docs/serving\.md"):
        engine_options()


def test_objectives_are_checked_before_an_engine_is_asked():
    from lozo_kernels.vllm import LOZO, nll, rewards

    with pytest.raises(TypeError, match="nll"):
        nll([])
    with pytest.raises(TypeError, match="score"):
        rewards(["a"], None, "no function")
    with pytest.raises(TypeError, match="resume=True"):
        LOZO(None, resume=True)
    with pytest.raises(TypeError, match="fuse_steps"):
        LOZO(None, fuse_steps=True)
    assert issubclass(EngineError, RuntimeError)


def test_engines_are_tested_elsewhere():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not in this environment: make test-vllm has one, and runs python_tests/serving")
