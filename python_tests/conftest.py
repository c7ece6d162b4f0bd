import gc
import os
import random
import signal

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run on the CPU, in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import lozo_kernels
from lozo_kernels.kernels.registry import backend_names, choose_backend

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them are about.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the models here are too small to share, and on a busy machine threads that wait cost most


def serves_cpu(name):
    try:
        choose_backend("cpu", name)
    except RuntimeError:
        return False
    return True


def opt_in(name):
    return choose_backend("cpu", name).backend.opt_in_reason(torch.device("cpu")) is not None


def pytest_report_header(config):
    choice = choose_backend("cpu")
    return f"lozo_kernels {lozo_kernels.__version__}: cpu served by {choice.backend.name}; not used: {choice.rejected or 'none'}"


@pytest.fixture(autouse=True, scope="module")
def nothing_to_collect_but_this_file():
    """A run collects garbage several times, and would go through all modules and tests that there are: half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """A later test goes through all backends that are registered, and finds torch as it was."""
    before = backend_names()
    yield
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)  # tests send Ctrl-C at any line, and torch's no_grad is left half way by one in its last line
    assert backend_names() == before


@pytest.fixture
def rng(request):
    """Fresh randomness; the seed is in the report of a failing test."""
    seed = random.SystemRandom().getrandbits(32)
    request.node.user_properties.append(("seed", seed))
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


_SERVING = [name for name in backend_names() if serves_cpu(name)]


@pytest.fixture(params=[name for name in _SERVING if not opt_in(name)])
def backend(request):
    """Every backend that can serve the CPU, but those that only check kernels there."""
    return choose_backend("cpu", request.param).backend


@pytest.fixture(params=_SERVING)
def any_backend(request):
    """Every backend that can serve the CPU, Triton's interpreter included: some 30 ms for each program of a launch."""
    return choose_backend("cpu", request.param).backend
