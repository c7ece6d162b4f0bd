"""The native CPU backend against the eager one, bit for bit, on every instruction set that this machine runs."""

import dataclasses
import os
import sys
import threading

import pytest
import torch

from lozo_kernels.bench.cases import OPS, Case, as_bits, random_case
from lozo_kernels.kernels import noise, ops
from lozo_kernels.kernels.backends import native
from lozo_kernels.kernels.backends.eager import EagerBackend
from lozo_kernels.kernels.backends.native import NativeBackend
from lozo_kernels.kernels.calls import Draw, LayerCall, Rounding, TableCall
from lozo_kernels.kernels.table import DTYPES, TensorTable
from python_tests.processes import forked
from python_tests.table_helpers import Product, assert_same

EAGER, NATIVE = EagerBackend(), NativeBackend()
ISAS = native.supported_isas() if NATIVE.unavailable(torch.device("cpu")) is None else []
RANKS = [1, 2, 3, 4, 7, 8, 9, 16, 33, 64]

pytestmark = pytest.mark.skipif(not ISAS, reason=f"native: {NATIVE.unavailable(torch.device('cpu'))}")


@pytest.fixture(autouse=True)
def settings():
    yield
    native.set_isa(None)


def odd_shapes(rng):
    return [
        (1, rng.randint(1, 9), rng.randint(1, 40)),
        (1, rng.randint(60, 140), rng.choice([31, 32, 33, 64, 100, 257])),
        (rng.randint(2, 3), rng.randint(1, 40), rng.randint(1, 90)),
        (1, 1, rng.randint(1, 1200)),
        (1, rng.randint(1, 80), 1),
        (0, 3, 4),
        (1, 0, 5),
        (2, 5, 0),
    ]


def make_case(rng, op, dtype=torch.float32, rank=0, shapes=None, **settings):
    return random_case(rng, OPS[op], shapes or odd_shapes(rng), rank, dtypes=(dtype,), **settings)


def check(case):
    """The bits of the eager backend on every instruction set."""
    expected = case.on()
    expected.run(EAGER)
    for isa in ISAS:
        native.set_isa(isa)
        actual = case.on()
        actual.run(NATIVE)
        assert_same(actual, expected, isa)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["lowrank_update_", "lowrank_momentum_"])
def test_lowrank(op, dtype, rank, rng):
    for draws in (1, 2):
        check(make_case(rng, op, dtype, rank, call={"draws": draws}))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signed_update(dtype, rank, rng):
    for stochastic in (False, True):
        check(make_case(rng, "lowrank_signed_update_", dtype, rank, call={"stochastic": stochastic}))


def test_signed_update_of_as_many_parts_as_there_can_be(rng):
    """And of signs that begin anywhere in a word, and go on in the next matrix of a stack."""
    case = make_case(rng, "lowrank_signed_update_", rng.choice(DTYPES), 4, shapes=[(1, 9, 2100), (3, 70, 40)])
    first = rng.choice((1, 31, 32, 33, 127, 128, rng.randint(0, 5000)))
    case.table = dataclasses.replace(
        case.table, row_offsets=[first, 5], col_offsets=[first, 3], global_cols=[1 << 20, 45], cache={}
    )
    case.call["scales"] = torch.randn(ops.MAX_PARTS, 2)
    check(case)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", noise.LAWS)
@pytest.mark.parametrize("op", ["dense_update_", "dense_momentum_"])
def test_dense(op, law, dtype, draws, rng):
    for _ in range(3):
        check(make_case(rng, op, dtype, call={"draws": draws, "law": law}))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("op", ["dense_update_", "dense_momentum_", "dense_merge_"])
def test_runs_of_signs_that_begin_anywhere(op, stochastic, rng):
    """Longer than what is made at once, from every place in a word, a counter and what is made at once."""
    for dtype in DTYPES:
        first = rng.choice((0, 1, 31, 32, 33, 127, 128, 1023, 1025, 2047, rng.randint(0, 5000)))
        call = {"draws": OPS[op].draws[1], "law": "rademacher", "stochastic": stochastic}
        case = make_case(rng, op, dtype, shapes=[(1, 1, rng.randint(1, 7000)), (1, 3, 70)], call=call)
        case.table = dataclasses.replace(case.table, col_offsets=[first, 5], global_cols=[1 << 20, 75], cache={})
        check(case)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("reproject", [False, True])
def test_resample(rank, reproject, rng):
    check(make_case(rng, "resample_", rank=rank, n=reproject))


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 9])
def test_all_draws_of_an_update_are_one_call(rank, momentum, rng, monkeypatch):
    """As many draws as a step has directions, on factors: the bits of a backend that takes them two at a time."""
    draws = [Draw(step, rng.randrange(9)) for step in rng.sample(range(1 << 20), rng.choice((3, 4, 7, 16)))]
    shapes = [(1, rng.randint(1, 40), rank), (3, rng.randint(1, 300), rank), (1, 1100, rank), (1, 0, rank)]
    x, n = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    call = TableCall(rng.getrandbits(64), draws, torch.randn(len(draws), 4), decay=torch.randn(4))
    op = OPS["factor_momentum_" if momentum else "factor_update_"]
    if momentum:
        call.coefficients, call.alpha, call.beta = torch.randn(len(draws), 4), torch.randn(4), torch.randn(4)

    def run(backend):
        factors, moments = [f.clone() for f in x], [f.clone() for f in n]
        table = TensorTable(x=factors, n=moments if momentum else None, tensor_ids=[7, 1 << 31, 5, 6], row_offsets=[0, 9, 77, 0])
        ops.dispatch(op, table, call, backend)
        return factors + moments

    expected, calls, real = run(EAGER), [], NativeBackend.run
    monkeypatch.setattr(NativeBackend, "run", lambda *args: (calls.append(1), real(*args)))
    for isa in ISAS:
        native.set_isa(isa)
        assert all(map(torch.equal, run(NATIVE), expected)), isa
    assert len(calls) == len(ISAS)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("rank", RANKS)
def test_factor_update(rank, draws, rng):
    shapes = [(1, rng.randint(1, 40), rank), (3, rng.randint(1, 300), rank), (1, 700, rank), (1, 0, rank)]
    check(make_case(rng, "factor_update_", rank=rank, shapes=shapes, call={"draws": draws}))


@pytest.mark.parametrize("apart", [False, True], ids=["in place", "apart"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowrank_merge(dtype, rank, apart, rng):
    for draws in (0, 1):
        check(make_case(rng, "lowrank_merge_", dtype, rank, apart=apart, call={"draws": draws}))


@pytest.mark.parametrize("apart", [False, True], ids=["in place", "apart"])
@pytest.mark.parametrize("draws", [0, 1])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_merge(dtype, kept, draws, apart, rng):
    for law in noise.LAWS * 2:
        check(make_case(rng, "dense_merge_", dtype, n=kept, apart=apart, call={"draws": draws, "law": law}))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", RANKS)
def test_products_with_factors(rank, groups, isa, rng):
    native.set_isa(isa)
    for kind in ({}, {"transposed": True}, {"lookup": True}):
        tokens, rows, cols = groups * rng.choice((0, 1, 3, 8, 70)), rng.choice((1, 31, 64, 300)), rng.choice((1, 33, 64, 290))
        Product(rng, rank=rank, tokens=tokens, rows=rows, cols=cols, groups=groups, **kind).check(NATIVE, isa)


@pytest.mark.parametrize("kind", [{}, {"transposed": True}, {"lookup": True}], ids=["linear", "transposed", "lookup"])
def test_threads_do_not_matter_for_products(whose_threads, kind, rng):
    native.set_isa(rng.choice(ISAS))
    case = Product(rng, rank=rng.choice((4, 9)), tokens=4 * 301, rows=900, cols=1100, groups=4, **kind)
    case.b.normal_()
    case.check(NATIVE)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        results.append(case.run(NATIVE))
    assert all(torch.equal(as_bits(result), as_bits(results[0])) for result in results[1:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_outside_the_weight_are_refused(dtype):
    v, draws = torch.zeros(4, 6, dtype=torch.float16), torch.zeros(1, 2, dtype=torch.int64)
    for bad in (-1, 5, -(1 << 31), (1 << 31) - 1):
        y = torch.ones(40, 6)
        rows = torch.zeros(40, dtype=dtype)
        rows[37] = bad
        with pytest.raises(ValueError, match="rejected the arguments"):
            NATIVE.lowrank_embedding_(LayerCall(y, rows, v, torch.zeros(5, 4), 1, 1, 0, draws, torch.ones(1)))
        assert (y == 1).all()


@pytest.mark.parametrize(
    "change",
    [
        {"tensor_id": 1 << 32},
        {"row_offset": (1 << 32) - 4},
        {"draws": torch.tensor([[1 << 28, 0]])},
        {"draws": torch.tensor([[0, -1]])},
    ],
    ids=["tensor_id", "row_offset", "step", "direction"],
)
def test_products_outside_the_noise_are_refused(change):
    call = {"seed": 1, "tensor_id": 1, "row_offset": 0, "draws": torch.zeros(1, 2, dtype=torch.int64), "scales": torch.ones(1)}
    y, v = torch.ones(2, 5), torch.zeros(4, 6, dtype=torch.float16)
    with pytest.raises(ValueError, match="rejected the arguments"):
        NATIVE.lowrank_linear_(LayerCall(y=y, x=torch.zeros(2, 6), v=v, b=torch.zeros(5, 4), **(call | change)))
    assert (y == 1).all()


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "op", ["lowrank_update_", "dense_update_", "lowrank_momentum_", "dense_momentum_", "lowrank_merge_", "dense_merge_"]
)
def test_special_values(op, dtype, stochastic, rng):
    """Infinities, NaN, denormals of the weight's dtype and of fp32, overflow, and scales that are zero, tiny or infinite."""
    for scale in (0.0, 1e-42, 1e-36, 1e-30, 1e-6, 1.0, 1e30, float("inf")):
        case = make_case(rng, op, dtype, rng.choice([1, 2, 4, 5]), call={"draws": 1, "stochastic": stochastic}, special=0.3)
        case.call["scales"].fill_(scale)
        check(case)


@pytest.mark.parametrize("rank", [2, 8])
def test_negative_zero(rank, rng):
    case = make_case(rng, "lowrank_update_", rank=rank, call={"draws": 1})
    for x in case.table.x:
        x.fill_(-0.0)
    case.call["scales"].zero_()
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank(dtype, rng):
    """All ranks through a shape with a tail in both directions."""
    for rank in range(1, noise.MAX_RANK + 1):
        for op in ("lowrank_update_", "lowrank_momentum_", "lowrank_merge_"):
            check(make_case(rng, op, dtype, rank, shapes=[(1, 5, 70)], call={"draws": OPS[op].draws[1]}))


def test_worst_case_product():
    """Factors at the end of their range, where the sum passes 2**24 and its conversion to fp32 rounds."""
    rank = 64
    table = TensorTable(x=[torch.zeros(1, 5, 70)], tensor_ids=[1], v=[torch.full((1, rank, 70), 1253 / 256, dtype=torch.float16)])
    table.v[0].mul_(torch.where(torch.rand(1, rank, 70) < 0.5, -1, 1))
    check(Case(OPS["lowrank_update_"], table, {"seed": 3, "draws": [Draw(1)], "scales": 1.0}))


@pytest.mark.parametrize("op", ["dense_update_", "dense_momentum_", "dense_merge_"])
def test_counters_past_32_bits(op, rng):
    """Flat elements around the point where the counter carries into its second word."""
    for dtype in (torch.float32, torch.bfloat16):
        for bits, law in ((34, "normal"), (35, "normal"), (35, "rademacher"), (39, "rademacher")):
            call = {"draws": OPS[op].draws[1], "stochastic": True, "law": law}
            case = make_case(rng, op, dtype, shapes=[(1, 1, 999)], call=call)
            place = {"row_offsets": [0], "col_offsets": [(1 << bits) - rng.randint(1, 998)], "global_cols": [1 << 40]}
            case.table = dataclasses.replace(case.table, **place, cache={})
            check(case)


@pytest.fixture(params=["torch", "own"])
def whose_threads(request):
    native.use_threads(request.param)
    yield request.param
    native.use_threads("torch")


def test_torchs_openmp_runtime_is_found():
    """Where torch says that it has one (a static one cannot be found, and own threads serve)."""
    if "OpenMP not found" in torch.__config__.parallel_info() or sys.platform != "linux":
        pytest.skip("this torch has no OpenMP runtime of its own to find")
    assert native.openmp_path() is not None
    with pytest.raises(ValueError, match="'torch' or 'own', not 'mine'"):
        native.use_threads("mine")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_matter(whose_threads, dtype, rng):
    native.set_isa(rng.choice(ISAS))
    shapes = [(1, 300, 3000), (2, 130, 70), (1, 1, 200_000), (1, 5000, 3)] + [(1, 20, 20)] * 20
    for rank in (0, 4):
        case = make_case(rng, "lowrank_momentum_" if rank else "dense_momentum_", dtype, rank, shapes, call={"draws": 2})
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(case.on())
            results[-1].run(NATIVE)
            table, draws = results[-1].table, case.call["draws"][:1]
            merge = ops.lowrank_merge_ if rank else ops.dense_merge_
            merge(table, seed=case.call["seed"], draws=draws, scales=0.1, rounding=Rounding(4), backend=NATIVE)
            if rank:
                ops.resample_(table, seed=5, window=6, reproject=True, backend=NATIVE)
        for result in results[1:]:
            assert_same(result, results[0])


def test_large_matrix_is_cut_into_tiles_rightly(rng):
    torch.set_num_threads(2)
    check(make_case(rng, "lowrank_update_", torch.bfloat16, 4, [(1, 700, 5000)], call={"draws": 2}))


def test_two_python_threads_at_once(whose_threads, rng):
    torch.set_num_threads(2)
    cases = [make_case(rng, "lowrank_update_", torch.bfloat16, 4, [(1, 400, 1000)] * 3, call={"draws": 2}) for _ in range(4)]
    expected = [case.on() for case in cases]

    def work(case):
        for _ in range(10):
            case.run(NATIVE)

    for case in expected:
        work(case)
    workers = [threading.Thread(target=work, args=(case,)) for case in cases]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for actual, wanted in zip(cases, expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork(whose_threads, rng):
    """A child has none of the parent's threads and must not wait for them."""
    torch.set_num_threads(2)
    case = make_case(rng, "lowrank_update_", rank=4, shapes=[(1, 600, 1000)], call={"draws": 1})
    expected = case.on()
    expected.run(NATIVE)

    def update():
        case.run(NATIVE)
        # Through bytes: the child of a process that used OpenMP must not run PyTorch's own threads.
        assert case.table.x[0].numpy().tobytes() == expected.table.x[0].numpy().tobytes()

    assert forked(update)


@pytest.mark.parametrize("isa", ISAS)
def test_flush_denormal_changes_nothing(isa, rng):
    native.set_isa(isa)
    case = make_case(rng, "lowrank_update_", rank=3, shapes=[(1, 300, 700), (1, 3, 50)], call={"draws": 1})
    for tensor in (*case.table.x, case.call["scales"]):
        tensor.mul_(1e-38)
    expected, actual = case.on(), case.on()
    expected.run(EAGER)
    assert torch.set_flush_denormal(True)
    try:
        actual.run(NATIVE)
        assert (torch.tensor([1e-39]) * 1.0).item() == 0, "the mode of the caller must survive"
    finally:
        torch.set_flush_denormal(False)
    assert_same(actual, expected)


def test_autograd_sees_the_change():
    x = torch.randn(1, 4, 4)
    table = TensorTable(x=[x], tensor_ids=[1])
    before = x._version
    ops.dense_update_(table, seed=1, draws=[Draw(0)], scales=1.0, backend=NATIVE)
    assert x._version > before


def test_empty_table():
    ops.dense_update_(TensorTable(x=[], tensor_ids=[]), seed=1, draws=[Draw(0)], scales=1.0, backend=NATIVE)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"tensor_ids": [1 << 32]}, "tensor_id"),
        ({"tensor_ids": [1], "row_offsets": [-1]}, "negative"),
        ({"tensor_ids": [1], "row_offsets": [1 << 41]}, "beyond"),
    ],
)
def test_positions_outside_the_noise_are_refused(table, message):
    table = TensorTable(x=[torch.zeros(1, 2, 3)], **table)
    with pytest.raises(ValueError, match=message):
        ops.dense_update_(table, seed=1, draws=[Draw(0)], scales=1.0, backend=NATIVE)
