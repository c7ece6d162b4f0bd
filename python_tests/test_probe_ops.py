"""The ops of a probe on every backend: factors and merges in the bits of the eager one, products within their bounds."""

import dataclasses

import pytest
import torch

from lozo_kernels import Draw, Rounding, TensorTable
from lozo_kernels.bench.cases import OPS, random_case, strided
from lozo_kernels.kernels import ops, skinny
from lozo_kernels.kernels.backends.eager import EagerBackend
from lozo_kernels.kernels.table import DTYPES
from python_tests.table_helpers import Product, assert_same, shapes_for
from python_tests.truth import check_truth

EAGER = EagerBackend()
F64 = torch.float64
RANKS = [1, 2, 3, 4, 8, 9, 64]


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("op", ["factor_update_", "factor_momentum_"])
def test_factors(rng, any_backend, op, rank, draws):
    case = random_case(rng, OPS[op], shapes_for(rng, any_backend, 4), rank, call={"draws": draws})
    before, expected = case.on(), case.on()
    case.run(any_backend)
    expected.run(EAGER)
    assert_same(case, expected)
    check_truth(before, case)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("draws", [0, 1])
@pytest.mark.parametrize(
    ("op", "rank", "kept"),
    [*(("lowrank_merge_", rank, True) for rank in RANKS), ("dense_merge_", 0, False), ("dense_merge_", 0, True)],
)
def test_merge(rng, any_backend, op, rank, kept, draws, stochastic):
    """In place, and into other memory: the same bits as the eager backend, and what is only read stays."""
    call = {"draws": draws, "stochastic": stochastic}
    apart = random_case(rng, OPS[op], shapes_for(rng, any_backend, 4), rank, call=call, apart=True, n=kept)
    for case in (apart, dataclasses.replace(apart.on(), out=None)):
        before, expected = case.on(), case.on()
        case.run(any_backend)
        expected.run(EAGER)
        assert_same(case, expected)
        if case.out is not None:
            assert_same(dataclasses.replace(case, out=None), dataclasses.replace(before, out=None), "what is only read")
        if not stochastic:
            check_truth(before, case)


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
            for y in (torch.empty_like(x), strided(rng, x.shape, dtype)):
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
    y = together.run(any_backend)
    for g in range(3):
        alone, rows = torch.clone(together.y[4 * g : 4 * g + 4]), slice(4 * g, 4 * g + 4)
        shift = None if together.shift is None else together.shift[g : g + 1]
        skinny.lowrank_linear_(
            alone,
            together.x[rows],
            together.v,
            together.b,
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
