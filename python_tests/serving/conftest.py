import importlib.util
import os

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]  # python_tests/test_vllm_missing.py says so

# One thread: the models are too small to share, and on a busy machine threads that wait for each other cost most.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Makes tiny models, each once; returns the folder of one by its name."""
    from .engines import make_model

    folder = tmp_path_factory.mktemp("models")
    return lambda name: make_model(name, folder)
