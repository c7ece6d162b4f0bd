"""The NEON kernels, cross-compiled by setup.py and run by qemu: the bits of the noise vectors and of the eager backend."""

import dataclasses
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hf_helpers import REPO

from lozo_kernels import Draw, TensorTable
from lozo_kernels.bench.cases import OPS, random_case
from lozo_kernels.kernels import noise, ops
from lozo_kernels.kernels.backends.eager import EagerBackend
from lozo_kernels.kernels.table import DTYPES
from python_tests.emulated import EmulatedBackend
from python_tests.noise_file import VECTORS
from python_tests.table_helpers import Product, assert_same

COMPILER, EMULATOR, SYSTEM = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
MISSING = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]
EAGER = EagerBackend()

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no {' and no '.join(MISSING)} (apt-get install g++-aarch64-linux-gnu qemu-user)"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neon")
    environment = os.environ | {"CXX": COMPILER, "LOZO_KERNELS_REQUIRE_NATIVE": "1", "LOZO_KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "kernels for neon, portable with aarch64" in done.stdout
    server = folder / "server"
    subprocess.run([COMPILER, "-O1", REPO / "python_tests" / "emulated_host" / "server.cpp", "-ldl", "-o", server], check=True)
    library = folder / "lozo_kernels" / "lib" / "liblozo_cpu.so"
    backend = EmulatedBackend([EMULATOR, "-L", SYSTEM, str(server), str(library)])
    yield backend
    backend.close()


@pytest.fixture(params=["neon", "portable"])
def backend(served, request):
    served.set_isa(request.param)
    return served


def check(case, backend):
    expected, actual = case.on(), case.on()
    expected.run(EAGER)
    actual.run(backend)
    assert_same(actual, expected)


def odd_shapes(rng):
    return [
        (1, rng.randint(1, 9), rng.randint(1, 40)),
        (1, rng.randint(60, 80), rng.choice([31, 32, 33, 100])),
        (rng.randint(2, 3), rng.randint(1, 20), rng.randint(1, 70)),
        (1, 1, rng.randint(1, 1200)),
        (1, rng.randint(1, 80), 1),
        (2, 5, 0),
    ]


def test_what_the_library_has(served):
    assert served.supports("neon") and served.supports("portable")
    assert not served.supports("avx2")


@pytest.mark.parametrize(
    "vector",
    [v for v in VECTORS if v["function"] in ("factor", "dense")],
    ids=lambda v: f"{v['function']}-{v['arguments'].get('stream', '')}",
)
def test_noise_vectors(backend, vector):
    """Signs of parts and rounding bits are seen in updates alone (``test_every_op``)."""
    arguments, expected = dict(vector["arguments"]), np.array(vector["values"], np.uint32)
    where = Draw(arguments.pop("draw"), arguments.pop("direction", 0))
    seed, tid = arguments.pop("seed"), arguments.pop("tensor_id")
    if vector["function"] == "factor":
        got = ops.factor(seed, arguments.pop("rows"), arguments.pop("rank"), tid, where, **arguments, backend=backend)
    else:
        count, offset = arguments["numel"], arguments.get("offset", 0)
        table = TensorTable([torch.zeros(1, 1, count)], [tid], col_offsets=[offset], global_cols=[offset + count])
        law = arguments.get("law", "normal")
        ops.dense_update_(table, seed=seed, draws=[where], scales=1.0, law=law, backend=backend)
        got = table.x[0]
    np.testing.assert_array_equal(got.numpy().reshape(-1).view(np.uint32), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_op(backend, op, dtype, rng):
    """All ranks up to 16 and some above, and what else there is at random: draws, laws, rounding, in place and apart."""
    if OPS[op].factors and dtype != torch.float32:
        pytest.skip("factors are fp32")
    low_rank = OPS[op].v or OPS[op].factors
    for rank in [*range(1, 17), 33, 64] if low_rank else [0] * 12:
        settings = {"dtypes": (dtype,), "apart": rng.random() < 0.5, "n": rng.random() < 0.5}
        call = {"reproject": settings["n"]} if op == "resample_" else None
        check(random_case(rng, OPS[op], odd_shapes(rng), rank, call=call, **settings), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [name for name in OPS if OPS[name].rounding])
def test_special_values(backend, op, dtype, rng):
    """Infinities, NaN, denormals, overflow, zeros of both signs; scales that are zero, tiny or infinite."""
    for scale in (0.0, 1e-42, 1e-36, 1e-6, 1.0, 1e30, float("inf")):
        call = {"draws": 1, "stochastic": rng.random() < 0.5}
        case = random_case(rng, OPS[op], odd_shapes(rng), rng.choice([1, 2, 4, 5]), dtypes=(dtype,), call=call, special=0.3)
        case.call["scales"].fill_(scale)
        check(case, backend)


@pytest.mark.parametrize("op", ["dense_update_", "dense_momentum_", "dense_merge_"])
def test_counters_past_32_bits(backend, op, rng):
    for bits, law in ((34, "normal"), (35, "normal"), (39, "rademacher")):
        call = {"draws": OPS[op].draws[1], "stochastic": True, "law": law}
        case = random_case(rng, OPS[op], [(1, 1, 999)], dtypes=(torch.bfloat16,), call=call)
        place = {"row_offsets": [0], "col_offsets": [(1 << bits) - rng.randint(1, 998)], "global_cols": [1 << 40]}
        case.table = dataclasses.replace(case.table, **place, cache={})
        check(case, backend)


@pytest.mark.parametrize("kind", [{}, {"transposed": True}, {"lookup": True}], ids=["linear", "transposed", "lookup"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7, 8, 16, 64])
def test_products_with_factors(backend, rank, kind, rng):
    """Which are bounded and not promised in bits."""
    for groups in (1, 2):
        tokens, rows, cols = groups * rng.choice((1, 3, 8, 70)), rng.choice((1, 31, 64, 300)), rng.choice((1, 33, 64, 290))
        Product(rng, rank=rank, tokens=tokens, rows=rows, cols=cols, groups=groups, **kind).check(backend)


def test_threads_of_its_own(backend, rng):
    torch.set_num_threads(2)
    check(random_case(rng, OPS["lowrank_update_"], [(1, 300, 700)], 4, dtypes=(torch.bfloat16,), call={"draws": 2}), backend)
    check(random_case(rng, OPS["dense_update_"], [(1, 1, 50_000)], dtypes=(torch.float16,), call={"draws": 1}), backend)


def test_worst_case_product(backend, rng):
    """Factors at the end of their range, where the sum of integers passes 2**24 and its conversion to fp32 rounds."""
    v = torch.full((1, noise.MAX_RANK, 70), 1253 / 256, dtype=torch.float16)
    v.mul_(torch.where(torch.rand(1, noise.MAX_RANK, 70) < 0.5, -1, 1))
    case = random_case(rng, OPS["lowrank_update_"], [(1, 5, 70)], noise.MAX_RANK, call={"draws": 1})
    case.table = dataclasses.replace(case.table, v=[v], cache={})
    check(case, backend)
