"""The ops of a probe on every backend: factors and merges in the bits of the eager one, products within their bounds."""

import pytest
import torch

from lozo_kernels import Draw, Rounding, TensorTable
from lozo_kernels.kernels import ops, skinny
from lozo_kernels.kernels.backends.eager import EagerBackend, dense_noise, row_factor
from lozo_kernels.kernels.reference import dense_merge, factor_update, lowrank_merge
from lozo_kernels.kernels.table import DTYPES
from python_tests.table_helpers import UNIT, Case, Product, assert_same_bits, random_shape, strided

EAGER = EagerBackend()
F64 = torch.float64
RANKS = [1, 2, 3, 4, 8, 9, 64]


def random_call(rng, count, draws):
    return {
        "seed": rng.getrandbits(64),
        "draws": [Draw(rng.getrandbits(28), rng.choice((0, 0, 3))) for _ in range(draws)],
        "scales": torch.randn(draws, count) * 1e-2,
        "decay": rng.choice((None, 1 - torch.rand(count) * 0.1)),
    }


def factors(rng, rank):
    return Case(rng, 0, dtypes=(torch.float32,), shapes=[(*random_shape(rng)[:2], rank) for _ in range(4)])


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("rank", RANKS)
def test_factor_update(rng, any_backend, rank, draws):
    case = factors(rng, rank)
    before, expected, call = case.copy(), case.copy(), random_call(rng, 4, draws)
    ops.factor_update_(case.table, **call, backend=any_backend)
    ops.factor_update_(expected.table, **call, backend=EAGER)
    assert_same_bits(case, expected)
    for t, f in enumerate(case.table.x):
        table = TensorTable([f], case.ids[t : t + 1], v=[torch.zeros(len(f), rank, rank).half()], row_offsets=[case.row_offsets[t]])
        us = [row_factor(table, 0, call["seed"], d) for d in call["draws"]]
        decay = None if call["decay"] is None else call["decay"][t]
        exact = factor_update(before.table.x[t], us, list(call["scales"][:, t]), decay, dtype=F64)
        assert torch.allclose(f.double(), exact, rtol=0, atol=8 * UNIT[torch.float32])


def merged(case, out, call, backend):
    op = ops.dense_merge_ if case.table.v is None else ops.lowrank_merge_
    op(case.table, **call, out=None if out is None else out.table, backend=backend)


def check_merge(rng, backend, case, draws, rounding):
    """In place, and into other memory: the same bits as the eager backend, and what is only read stays."""
    call = random_call(rng, len(case.table), draws) | {"rounding": rounding}
    expected, elsewhere, before = case.copy(), case.elsewhere(rng), case.copy()
    merged(expected, None, call, EAGER)
    merged(case, elsewhere, call, backend)
    assert_same_bits(case, before)
    for x, wanted in zip(elsewhere.table.x, expected.table.x, strict=True):
        assert torch.equal(x, wanted), f"{tuple(x.shape)} {x.dtype}, {draws} draws, {rounding}"
    for storage, x in zip(elsewhere.storages, elsewhere.table.x, strict=True):
        assert storage.isnan().sum() == storage.numel() - x.numel()
    merged(case, None, call, backend)
    assert_same_bits(case, expected)
    return before, elsewhere, call


@pytest.mark.parametrize("rounding", [None, Rounding(7, 2)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("draws", [0, 1])
@pytest.mark.parametrize("rank", RANKS)
def test_lowrank_merge(rng, any_backend, rank, draws, rounding):
    before, after, call = check_merge(rng, any_backend, Case(rng, rank, momentum=True, count=4), draws, rounding)
    if rounding is None:
        check_against_truth(before, after, call, lowrank_merge)


@pytest.mark.parametrize("rounding", [None, Rounding(7, 2)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("kept", [False, True], ids=["absent", "kept"])
@pytest.mark.parametrize("draws", [0, 1])
def test_dense_merge(rng, any_backend, draws, kept, rounding):
    before, after, call = check_merge(rng, any_backend, Case(rng, 0, momentum=kept, count=4), draws, rounding)
    if rounding is None:
        check_against_truth(before, after, call, dense_merge)


def check_against_truth(before, after, call, reference):
    table = before.table
    for t, (x, y) in enumerate(zip(table.x, after.table.x, strict=True)):
        if not x.numel():
            continue
        make = dense_noise if table.v is None else row_factor
        noises = [make(table, t, call["seed"], d) for d in call["draws"]]
        v = () if table.v is None else (table.v[t],)
        n = None if table.n is None else table.n[t]
        decay = None if call["decay"] is None else call["decay"][t]
        scales = list(call["scales"][:, t])
        exact = reference(x, *v, n, noises, scales, decay, dtype=F64)
        absolute = (z.abs() for z in (x, *v))
        size = reference(*absolute, None if n is None else n.abs(), [z.abs() for z in noises], [s.abs() for s in scales], dtype=F64)
        terms = 4 + (0 if table.v is None else table.rank)
        bound = terms * UNIT[torch.float32] * size + 1.01 * UNIT[x.dtype] * exact.abs() + 2.0**-24
        assert ((y.double() - exact).abs() <= bound).all()


def test_merge_of_one_shape(rng, any_backend):
    """Contiguous weights, which a backend may see as one long row, into contiguous ones and into others."""
    for rank in (0, 4):
        for dtype in DTYPES:
            x = torch.randn(3, 20, 24).to(dtype)
            v = [torch.randint(-900, 900, (3, rank, 24)).div(256).half()] if rank else None
            table = TensorTable([x], [9], v=v, n=[torch.randn(3, 20, rank or 24)])
            op = ops.lowrank_merge_ if rank else ops.dense_merge_
            call = {"seed": 3, "draws": [Draw(5)], "scales": 0.3, "rounding": rng.choice((None, Rounding(2)))}
            expected = TensorTable([torch.empty_like(x)], [9])
            op(table, **call, out=expected, backend=EAGER)
            for y in (torch.empty_like(x), strided(rng, x.shape, dtype)[0]):
                op(table, **call, out=TensorTable([y], [9]), backend=any_backend)
                assert torch.equal(y, expected.x[0])


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", RANKS)
def test_lowrank_linear(rng, any_backend, rank, groups, transposed):
    for tokens in (0, groups, groups * rng.randint(2, 9)):
        rows, cols = (rng.choice((1, 5, 33, 64, 100)) for _ in range(2))
        case = Product(rng, rank=rank, tokens=tokens, rows=rows, cols=cols, groups=groups, transposed=transposed)
        case.check(any_backend)


@pytest.mark.parametrize("y_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_lowrank_linear_of_every_dtype(rng, any_backend, y_dtype, x_dtype):
    for transposed in (False, True):
        Product(rng, rank=4, tokens=13, rows=70, cols=45, transposed=transposed, dtypes=(y_dtype, x_dtype)).check(any_backend)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", RANKS)
def test_lowrank_embedding(rng, any_backend, rank, groups):
    for tokens in (0, groups, groups * rng.randint(2, 40)):
        rows, cols = (rng.choice((1, 5, 33, 64, 100)) for _ in range(2))
        Product(rng, rank=rank, tokens=tokens, rows=rows, cols=cols, groups=groups, lookup=True).check(any_backend)


def test_evaluations_together_are_evaluations_alone(rng, any_backend):
    """A group's rows are as if it were called by itself, but for the order of sums."""
    together = Product(rng, rank=4, tokens=12, rows=20, cols=24, groups=3, dtypes=(torch.float32,) * 2)
    y = together.run(any_backend).as_strided(together.y.shape, together.y.stride(), together.y.storage_offset())
    for g in range(3):
        alone, rows = torch.clone(together.y[4 * g : 4 * g + 4]), slice(4 * g, 4 * g + 4)
        shift = None if together.shift is None else together.shift[g : g + 1]
        skinny.lowrank_linear_(
            *(alone, together.x[rows], together.v, together.b),
            **together.place,
            draws=together.draws[g : g + 1],
            scales=together.scales[g : g + 1],
            gain=together.gain,
            shift=shift,
            backend=any_backend,
        )
        assert torch.allclose(alone, y[rows], rtol=1e-5, atol=1e-5)


def test_autograd_sees_the_change(any_backend):
    x, y, f = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), torch.zeros(3, 5)
    versions = [t._version for t in (x, y, f)]
    ops.factor_update_(TensorTable([x], [1]), seed=1, draws=[Draw(0)], scales=1.0, backend=any_backend)
    ops.dense_merge_(TensorTable([x], [1]), seed=1, out=TensorTable([y], [1]), backend=any_backend)
    v, b, draws = torch.zeros(2, 4).half(), torch.zeros(5, 2), torch.zeros(1, 2, dtype=torch.int64)
    skinny.lowrank_linear_(f, torch.zeros(3, 4), v, b, seed=1, tensor_id=1, draws=draws, scales=torch.ones(1), backend=any_backend)
    assert all(t._version > before for t, before in zip((x, y, f), versions, strict=True))


def product(**changes):
    """A correct call of the linear product, but for what is changed."""
    call = {
        "y": torch.zeros(4, 5),
        "x": torch.zeros(4, 6),
        "v": torch.zeros(2, 6).half(),
        "b": torch.zeros(5, 2),
        "seed": 1,
        "tensor_id": 1,
        "draws": torch.zeros(2, 2, dtype=torch.int64),
        "scales": torch.zeros(2),
    }
    call |= changes
    skinny.lowrank_linear_(**call)


def lookup(rows, **more):
    v, draws = torch.zeros(2, 6).half(), torch.zeros(1, 2, dtype=torch.int64)
    skinny.lowrank_embedding_(
        torch.zeros(4, 6), rows, v, torch.zeros(5, 2), seed=1, tensor_id=1, draws=draws, scales=torch.zeros(1), **more
    )


def update_factor(f):
    ops.factor_update_(TensorTable([f], [0]), seed=0, draws=[Draw(0)], scales=1.0)


def merge(**call):
    ops.dense_merge_(TensorTable([torch.zeros(1, 2, 3)], [0]), seed=0, **call)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: product(y=torch.zeros(4, 5, dtype=F64)), TypeError, "y is torch.float64"),
        (lambda: product(y=torch.zeros(5, 4).T), ValueError, r"y is \(4, 5\) with strides"),
        (lambda: product(y=torch.zeros(4, 6)), ValueError, r"needed is \(4, 5\)"),
        (lambda: product(x=torch.zeros(4, 5)), ValueError, r"x is \(4, 5\)"),
        (lambda: product(x=torch.zeros(3, 6)), ValueError, r"x is \(3, 6\)"),
        (lambda: product(v=torch.zeros(2, 6)), ValueError, "v is"),
        (lambda: product(b=torch.zeros(5, 3)), ValueError, "b is"),
        (lambda: product(scales=torch.zeros(1)), ValueError, "scales is"),
        (lambda: product(draws=torch.zeros(2, 2)), ValueError, "draws is"),
        (lambda: product(draws=torch.zeros(3, 2, dtype=torch.int64), scales=torch.zeros(3)), ValueError, "4 tokens do not divide"),
        (lambda: product(shift=torch.zeros(1, 5)), ValueError, "shift is"),
        (lambda: product(gain=torch.zeros(2)), ValueError, "gain is"),
        (lambda: product(transposed=True), ValueError, r"needed is \(4, 6\)"),
        (lambda: lookup(torch.zeros(3, dtype=torch.int64)), ValueError, "rows is"),
        (lambda: lookup(torch.zeros(4)), ValueError, "rows is"),
        (lambda: update_factor(torch.zeros(1, 2, 3).half()), TypeError, "factors are fp32"),
        (lambda: update_factor(torch.zeros(1, 2, 65)), ValueError, "rank"),
        (lambda: merge(draws=[Draw(0)] * 2), ValueError, "one draw at most"),
        (lambda: merge(out=TensorTable([torch.zeros(1, 3, 2)], [0])), ValueError, "out of tensor 0"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
