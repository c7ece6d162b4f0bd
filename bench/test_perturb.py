"""One pass over the weights for pytest-benchmark: the cases of ``lozo-kernels bench perturb``, small unless asked otherwise.

LOZO_BENCH_SHAPES (default 2048x2048; RxC or the name of a model), LOZO_BENCH_DTYPES and LOZO_BENCH_RANKS are lists with commas.
"""

from __future__ import annotations

import os

import pytest
import torch

from lozo_kernels import choose_backend
from lozo_kernels.bench import gate, peers, perturb, weights
from lozo_kernels.bench.arguments import DTYPE_NAMES

CPU = torch.device("cpu")
SHAPES = os.environ.get("LOZO_BENCH_SHAPES", "2048x2048").split(",")
DTYPES = os.environ.get("LOZO_BENCH_DTYPES", "bfloat16,float32").split(",")
RANKS = [int(r) for r in os.environ.get("LOZO_BENCH_RANKS", "1,4").split(",")]
LOWRANK = ("lowrank_update", "lowrank_update_2", "lowrank_momentum", "lowrank_signed_update")


@pytest.fixture(scope="module", params=[(shape, dtype) for shape in SHAPES for dtype in DTYPES], ids="-".join)
def case(request):
    label, dtype = request.param
    torch.manual_seed(0)
    return weights.make_weights(label, DTYPE_NAMES[dtype], CPU)


@pytest.fixture(scope="module")
def backend():
    return choose_backend(CPU).backend


def report(benchmark, case, tensors, rounds=10):
    benchmark.group = f"{case.label} {str(case.matrices[0].dtype).removeprefix('torch.')}"
    moved = weights.nbytes(tensors)

    def run(call):
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
        if benchmark.enabled:
            benchmark.extra_info["gbps"] = round(2e-9 * moved / benchmark.stats.stats.median, 2)

    return run


def test_floor(benchmark, case):
    report(benchmark, case, case.matrices)(peers.inplace_pass(torch.ones(weights.nbytes(case.matrices) // 4)))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("op", LOWRANK)
def test_lowrank(benchmark, case, backend, op, rank):
    call = weights.lowrank_calls(case.lowrank_table(rank, backend), backend)[op]
    gate.check(op, case.label, call)
    report(benchmark, case, case.matrices)(call.run)


def test_dense_update(benchmark, case, backend):
    call = weights.dense_calls(case.dense_table(), backend)["dense_update"]
    gate.check("dense_update", case.label, call)
    report(benchmark, case, case.all)(call.run)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("peer", sorted({peer for op in LOWRANK for peer, _ in perturb.BESIDE[op].values()} - {"compiled lozo"}))
def test_lowrank_peer(benchmark, case, peer, rank):
    one_pass = peers.LOWRANK[peer](case.matrices, rank)
    report(benchmark, case, case.matrices, rounds=3 if peer.startswith("published") else 10)(one_pass)


def test_published_mezo(benchmark, case):
    report(benchmark, case, case.all, rounds=3)(peers.published_mezo_pass(case.all))
