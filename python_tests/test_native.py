"""The native CPU backend against the eager one, bit for bit, on every instruction set that this machine runs."""

import os
import sys
import threading

import pytest
import torch

from lozo_kernels.kernels import noise, ops, skinny
from lozo_kernels.kernels.backends import native
from lozo_kernels.kernels.backends.eager import EagerBackend
from lozo_kernels.kernels.backends.native import NativeBackend
from lozo_kernels.kernels.calls import Draw, Rounding
from lozo_kernels.kernels.table import DTYPES, TensorTable
from python_tests.processes import forked
from python_tests.table_helpers import Product

EAGER, NATIVE = EagerBackend(), NativeBackend()
ISAS = native.supported_isas() if NATIVE.unavailable(torch.device("cpu")) is None else []
RANKS = [1, 2, 3, 4, 7, 8, 9, 16, 33, 64]
INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SPECIAL = (float("inf"), float("-inf"), float("nan"), 1e-40, -3e-45, 3e38, 65504.0, 6e-8, 1e-5, 0.0)

pytestmark = pytest.mark.skipif(not ISAS, reason=f"native: {NATIVE.unavailable(torch.device('cpu'))}")


@pytest.fixture(autouse=True)
def settings():
    """One thread, unless a test says otherwise: its tables are small, and PyTorch's own threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    native.set_isa(None)


def make_x(rng, dtype, batch, rows, cols, special=0.0):
    """A weight inside poisoned storage, with random gaps between rows and matrices."""
    row_gap, batch_gap, start = rng.choice([0, 0, 1, 5]), rng.choice([0, 0, 3]), rng.choice([0, 0, 1, 7])
    row_stride = cols + row_gap
    batch_stride = rows * row_stride + batch_gap
    storage = torch.full((start + batch * batch_stride + 9,), float("nan")).to(dtype)
    x = storage.as_strided((batch, rows, cols), (batch_stride, row_stride, 1), start)
    values = torch.randn(x.shape) * 10 ** rng.uniform(-3, 1)
    if special and values.numel():
        mask = torch.rand(x.shape) < special
        values[mask] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (int(mask.sum()),))]
    x.copy_(values)
    # At rank 1 the sign of a zero product is the BLAS's in the reference, and only a weight of -0 shows it.
    return x.masked_fill_(x == 0, 0.0)


def make_table(rng, dtype, rank=0, momentum=False, shapes=None, special=0.0):
    """Odd shapes; half of them shards of something larger. rank 0: dense tensors."""
    shapes = shapes or [
        (1, rng.randint(1, 9), rng.randint(1, 40)),
        (1, rng.randint(60, 140), rng.choice([31, 32, 33, 64, 100, 257])),
        (rng.randint(2, 3), rng.randint(1, 40), rng.randint(1, 90)),
        (1, 1, rng.randint(1, 1200)),
        (1, rng.randint(1, 80), 1),
        (0, 3, 4),
        (1, 0, 5),
        (2, 5, 0),
    ]
    x = [make_x(rng, dtype, *shape, special=special) for shape in shapes]
    sharded = [rng.random() < 0.5 for _ in shapes]
    col_offsets = [rng.choice([0, 1, 4, 37]) * s for s in sharded]
    table = TensorTable(
        x=x,
        tensor_ids=[rng.randrange(1 << 32) for _ in shapes],
        v=[torch.zeros(b, rank, c, dtype=torch.float16) for b, _, c in shapes] if rank else None,
        n=[torch.randn(b, r, rank or c) for b, r, c in shapes] if momentum else None,
        row_offsets=[rng.choice([0, 3, 1 << 20]) * s for s in sharded],
        col_offsets=col_offsets,
        global_cols=[c + o + rng.choice([0, 0, 3]) * s for (_, _, c), o, s in zip(shapes, col_offsets, sharded, strict=True)],
    )
    if rank:
        for v in table.v:
            v.copy_(noise.to_grid(torch.randn(v.shape).clamp(-4.8, 4.8)))
    return table


def clone(table):
    """The same table over copies of all storage, padding included."""

    def copy(x):
        base = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone())
        return base.as_strided(x.shape, x.stride(), x.storage_offset())

    return TensorTable(
        x=[copy(x) for x in table.x],
        tensor_ids=table.tensor_ids,
        v=None if table.v is None else [v.clone() for v in table.v],
        n=None if table.n is None else [n.clone() for n in table.n],
        row_offsets=table.row_offsets,
        col_offsets=table.col_offsets,
        global_cols=table.global_cols,
    )


def assert_same(actual, expected, what=""):
    """Equal bits, except that any NaN equals any other."""
    for name in ("x", "v", "n"):
        for t, (a, e) in enumerate(zip(getattr(actual, name) or (), getattr(expected, name) or (), strict=True)):
            a, e = (torch.empty(0, dtype=y.dtype).set_(y.untyped_storage()) for y in (a, e))
            ints = INTS[a.dtype]
            different = (a.view(ints) != e.view(ints)) & ~(a.isnan() & e.isnan())
            assert not different.any(), (
                f"{what}: {name}[{t}] of shape {tuple(actual.x[t].shape)}, stride {actual.x[t].stride()}: "
                f"{int(different.sum())} of {a.numel()} differ, first at {different.nonzero()[0].item()}: "
                f"{a[different][0].item()!r} instead of {e[different][0].item()!r}"
            )


def arguments(rng, table, draws, scale=None):
    count = len(table)
    steps = [Draw(rng.randrange(1 << 28), rng.choice([0, 0, 1, 77])) for _ in range(draws)]
    size = 10 ** rng.uniform(-4, 0) if scale is None else scale
    return {
        "seed": rng.randrange(1 << 64),
        "draws": steps,
        "scales": torch.randn(draws, count) * size,
        "decay": rng.choice([None, 1 - 0.1 * torch.rand(count)]),
        "rounding": rng.choice([None, Rounding(rng.randrange(1 << 28), rng.randrange(5))]),
    }


def momentum_arguments(table, draws):
    count = len(table)
    return {"coefficients": torch.randn(draws, count), "alpha": -torch.rand(count), "beta": torch.rand(count)}


def check(op, table, arguments, **more):
    expected = clone(table)
    getattr(ops, op)(expected, **arguments, **more, backend=EAGER)
    for isa in ISAS:
        native.set_isa(isa)
        actual = clone(table)
        getattr(ops, op)(actual, **arguments, **more, backend=NATIVE)
        assert_same(actual, expected, f"{isa} {op} {arguments} {more}")


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowrank_update(dtype, rank, rng):
    for draws in (1, 2):
        table = make_table(rng, dtype, rank)
        check("lowrank_update_", table, arguments(rng, table, draws))


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_update(dtype, draws, rng):
    for _ in range(3):
        table = make_table(rng, dtype)
        check("dense_update_", table, arguments(rng, table, draws))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowrank_momentum(dtype, rank, rng):
    for draws in (1, 2):
        table = make_table(rng, dtype, rank, momentum=True)
        check("lowrank_momentum_", table, arguments(rng, table, draws), **momentum_arguments(table, draws))


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_momentum(dtype, draws, rng):
    for _ in range(3):
        table = make_table(rng, dtype, momentum=True)
        check("dense_momentum_", table, arguments(rng, table, draws), **momentum_arguments(table, draws))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("reproject", [False, True])
def test_resample(rank, reproject, rng):
    table = make_table(rng, torch.float32, rank, momentum=reproject)
    check("resample_", table, {"seed": rng.randrange(1 << 64), "window": rng.randrange(1 << 28)}, reproject=reproject)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("rank", RANKS)
def test_factor_update(rank, draws, rng):
    shapes = [(1, rng.randint(1, 40), rank), (3, rng.randint(1, 300), rank), (1, 700, rank), (1, 0, rank)]
    table = make_table(rng, torch.float32, shapes=shapes)
    call = arguments(rng, table, draws)
    del call["rounding"]
    check("factor_update_", table, call)


def check_merge(rng, op, table, call):
    """In place, and into other memory with strides of its own."""
    check(op, table, call)
    shapes = [tuple(x.shape) for x in table.x]
    outs = [make_x(rng, table.x[0].dtype, *shape) for shape in shapes]
    expected = clone(TensorTable(x=outs, tensor_ids=table.tensor_ids))
    getattr(ops, op)(clone(table), **call, out=expected, backend=EAGER)
    for isa in ISAS:
        native.set_isa(isa)
        actual, read = clone(TensorTable(x=outs, tensor_ids=table.tensor_ids)), clone(table)
        getattr(ops, op)(read, **call, out=actual, backend=NATIVE)
        assert_same(actual, expected, f"{isa} {op} {call}")
        assert_same(read, table, f"{isa} {op}, what is read")


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowrank_merge(dtype, rank, rng):
    for draws in (0, 1):
        table = make_table(rng, dtype, rank, momentum=True)
        check_merge(rng, "lowrank_merge_", table, arguments(rng, table, draws))


@pytest.mark.parametrize("draws", [0, 1])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_merge(dtype, kept, draws, rng):
    for _ in range(3):
        table = make_table(rng, dtype, momentum=kept)
        check_merge(rng, "dense_merge_", table, arguments(rng, table, draws))


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
    ints = INTS[results[0].dtype]
    assert all(torch.equal(result.view(ints), results[0].view(ints)) for result in results[1:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_outside_the_weight_are_refused(dtype):
    v, draws = torch.zeros(4, 6, dtype=torch.float16), torch.zeros(1, 2, dtype=torch.int64)
    for bad in (-1, 5, -(1 << 31), (1 << 31) - 1):
        y = torch.ones(40, 6)
        rows = torch.zeros(40, dtype=dtype)
        rows[37] = bad
        with pytest.raises(ValueError, match="rejected the arguments"):
            skinny.lowrank_embedding_(
                y, rows, v, torch.zeros(5, 4), seed=1, tensor_id=1, draws=draws, scales=torch.ones(1), backend=NATIVE, checked=True
            )
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
    call = {"seed": 1, "tensor_id": 1, "draws": torch.zeros(1, 2, dtype=torch.int64), "scales": torch.ones(1)} | change
    y = torch.ones(2, 5)
    with pytest.raises(ValueError, match="rejected the arguments"):
        skinny.lowrank_linear_(
            y, torch.zeros(2, 6), torch.zeros(4, 6, dtype=torch.float16), torch.zeros(5, 4), **call, backend=NATIVE, checked=True
        )
    assert (y == 1).all()


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "op", ["lowrank_update_", "dense_update_", "lowrank_momentum_", "dense_momentum_", "lowrank_merge_", "dense_merge_"]
)
def test_special_values(op, dtype, stochastic, rng):
    """Infinities, NaN, denormals of the weight's dtype and of fp32, overflow, and scales that are zero, tiny or infinite."""
    for scale in (0.0, 1e-42, 1e-36, 1e-30, 1e-6, 1.0, 1e30, float("inf")):
        rank = 0 if op.startswith("dense") else rng.choice([1, 2, 4, 5])
        merge = "merge" in op
        table = make_table(rng, dtype, rank, merge or "momentum" in op, special=0.3)
        call = arguments(rng, table, 1 if merge else rng.choice([1, 2]))
        call["scales"].fill_(scale)
        call["rounding"] = Rounding(3) if stochastic else None
        extra = momentum_arguments(table, len(call["draws"])) if "momentum" in op else {}
        check(op, table, call, **extra)


@pytest.mark.parametrize("rank", [2, 8])
def test_negative_zero(rank, rng):
    table = make_table(rng, torch.float32, rank)
    for x in table.x:
        x.fill_(-0.0)
    call = arguments(rng, table, 1)
    call["scales"].zero_()
    check("lowrank_update_", table, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank(dtype, rng):
    """All ranks through a shape with a tail in both directions."""
    for rank in range(1, noise.MAX_RANK + 1):
        table = make_table(rng, dtype, rank, momentum=True, shapes=[(1, 5, 70)])
        call = arguments(rng, table, 2)
        check("lowrank_update_", table, call)
        check("lowrank_momentum_", table, call, **momentum_arguments(table, 2))
        check("lowrank_merge_", table, arguments(rng, table, 1))


def test_worst_case_product():
    """Factors at the end of their range, where the sum passes 2**24 and its conversion to fp32 rounds."""
    rank = 64
    table = TensorTable(x=[torch.zeros(1, 5, 70)], tensor_ids=[1], v=[torch.full((1, rank, 70), 1253 / 256, dtype=torch.float16)])
    table.v[0].mul_(torch.where(torch.rand(1, rank, 70) < 0.5, -1, 1))
    check("lowrank_update_", table, {"seed": 3, "draws": [Draw(1)], "scales": 1.0})


@pytest.mark.parametrize("op", ["dense_update_", "dense_momentum_", "dense_merge_"])
def test_counters_past_32_bits(op, rng):
    """Flat elements around the point where the counter carries into its second word."""
    for dtype in (torch.float32, torch.bfloat16):
        for bits in (34, 35):
            x = make_x(rng, dtype, 1, 1, 999)
            table = TensorTable(
                x=[x],
                tensor_ids=[9],
                n=[torch.randn(1, 1, 999)],
                col_offsets=[(1 << bits) - rng.randint(1, 998)],
                global_cols=[1 << 40],
            )
            draws = 1 if op == "dense_merge_" else 2
            call = arguments(rng, table, draws)
            call["rounding"] = Rounding(1)
            check(op, table, call, **(momentum_arguments(table, draws) if "momentum" in op else {}))


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
        table = make_table(rng, dtype, rank, momentum=True, shapes=shapes)
        op = "lowrank_momentum_" if rank else "dense_momentum_"
        call = arguments(rng, table, 2) | momentum_arguments(table, 2)
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(clone(table))
            getattr(ops, op)(results[-1], **call, backend=NATIVE)
            merge = ops.lowrank_merge_ if rank else ops.dense_merge_
            merge(results[-1], seed=call["seed"], draws=call["draws"][:1], scales=0.1, rounding=Rounding(4), backend=NATIVE)
            if rank:
                ops.resample_(results[-1], seed=5, window=6, reproject=True, backend=NATIVE)
        for result in results[1:]:
            assert_same(result, results[0])


def test_large_matrix_is_cut_into_tiles_rightly(rng):
    torch.set_num_threads(2)
    table = make_table(rng, torch.bfloat16, 4, shapes=[(1, 700, 5000)])
    check("lowrank_update_", table, arguments(rng, table, 2))


def test_two_python_threads_at_once(whose_threads, rng):
    torch.set_num_threads(2)
    tables = [make_table(rng, torch.bfloat16, 4, shapes=[(1, 400, 1000)] * 3) for _ in range(4)]
    calls = [arguments(rng, table, 2) for table in tables]
    expected = []
    for table, call in zip(tables, calls, strict=True):
        expected.append(clone(table))
        for _ in range(10):
            ops.lowrank_update_(expected[-1], **call, backend=NATIVE)

    def work(table, call):
        for _ in range(10):
            ops.lowrank_update_(table, **call, backend=NATIVE)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(tables, calls, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for actual, wanted in zip(tables, expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork(whose_threads, rng):
    """A child has none of the parent's threads and must not wait for them."""
    torch.set_num_threads(2)
    table = make_table(rng, torch.float32, 4, shapes=[(1, 600, 1000)])
    call = arguments(rng, table, 1)
    expected = clone(table)
    ops.lowrank_update_(expected, **call, backend=NATIVE)

    def update():
        ops.lowrank_update_(table, **call, backend=NATIVE)
        # Through bytes: the child of a process that used OpenMP must not run PyTorch's own threads.
        assert table.x[0].numpy().tobytes() == expected.x[0].numpy().tobytes()

    assert forked(update)


@pytest.mark.parametrize("isa", ISAS)
def test_flush_denormal_changes_nothing(isa, rng):
    native.set_isa(isa)
    table = make_table(rng, torch.float32, 3, shapes=[(1, 300, 700), (1, 3, 50)])
    for x in table.x:
        x.mul_(1e-38)
    call = arguments(rng, table, 1, scale=1e-38)
    expected, actual = clone(table), clone(table)
    ops.lowrank_update_(expected, **call, backend=EAGER)
    assert torch.set_flush_denormal(True)
    try:
        ops.lowrank_update_(actual, **call, backend=NATIVE)
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
