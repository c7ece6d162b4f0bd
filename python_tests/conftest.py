import os
import random

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run on the CPU, in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import lozo_kernels
from lozo_kernels.registry import backend_names, choose_backend

torch.set_num_threads(1)  # the models here are too small to share, and on a busy machine threads that wait cost most


def pytest_report_header(config):
    choice = choose_backend("cpu")
    return f"lozo_kernels {lozo_kernels.__version__}: cpu served by {choice.backend.name}; not used: {choice.rejected or 'none'}"


@pytest.fixture
def rng(request):
    """Fresh randomness; the seed is in the report of a failing test."""
    seed = random.SystemRandom().getrandbits(32)
    request.node.user_properties.append(("seed", seed))
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture(params=backend_names())
def backend(request):
    """Every registered backend that can serve the CPU."""
    try:
        return choose_backend("cpu", request.param).backend
    except RuntimeError as unavailable:
        pytest.skip(str(unavailable))
