"""Every op on every backend: within derived bounds of the fp64 reference, and nothing else is written."""

import dataclasses

import pytest
import torch

from lozo_kernels import Draw, Rounding, TensorTable
from lozo_kernels.bench.cases import OPS, UNIT, Case, copy_table, random_case
from lozo_kernels.kernels import ops
from python_tests.table_helpers import assert_same, random_shapes, shapes_for
from python_tests.truth import F64, check_truth, right_factor

RANKS = {
    "lowrank_update_": (1, 2, 3, 4, 8, 13, 64),
    "lowrank_momentum_": (1, 4, 8, 11, 64),
    "lowrank_signed_update_": (1, 4, 13, 64),
    "dense_update_": (0,),
    "dense_momentum_": (0,),
}


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize(("op", "rank"), [(op, rank) for op, ranks in RANKS.items() for rank in ranks])
def test_within_bounds(rng, any_backend, op, rank, draws):
    call = {"draws": min(draws, OPS[op].draws[1]), "stochastic": False}
    case = random_case(rng, OPS[op], shapes_for(rng, any_backend), rank, call=call)
    before = case.on()
    case.run(any_backend)
    check_truth(before, case)


@pytest.mark.parametrize("rank", [1, 3, 8, 24])
def test_resample(rng, any_backend, rank):
    case = random_case(rng, OPS["resample_"], random_shapes(rng), rank)
    before = case.on()
    case.run(any_backend)
    for t, x in enumerate(case.table.x):
        if not x.numel():
            continue
        v = right_factor(before.table, t, case.call["seed"], case.call["window"])
        assert torch.equal(case.table.v[t], v)
        old = before.table.v[t].double()
        # The m x n form of the published code: N V_old^T is formed and projected on the new V.
        expected = before.table.n[t].double() @ old @ v.double().transpose(1, 2) / x.shape[2]
        size = before.table.n[t].double().abs() @ (old @ v.double().transpose(1, 2) / x.shape[2]).abs()
        assert ((case.table.n[t].double() - expected).abs() <= (rank + 2) * UNIT[torch.float32] * size + 1e-30).all()
    only_read = Case(OPS["dense_update_"], TensorTable(case.table.x, before.table.tensor_ids), {})
    assert_same(only_read, Case(only_read.op, TensorTable(before.table.x, before.table.tensor_ids), {}))


@pytest.mark.parametrize("op", ["lowrank_update_", "dense_update_", "lowrank_momentum_", "dense_momentum_"])
def test_stochastic_rounding_is_unbiased(rng, backend, op):
    """The mean over many steps of one rounded update converges on the unrounded value; nearest rounding stays off it."""
    repeats, dtypes = 600, (torch.bfloat16, torch.float16)
    case = random_case(rng, OPS[op], [(1, 6, 20)] * 2, 4 if OPS[op].v else 0, dtypes=dtypes, size=0.1)
    case.call = {"seed": rng.getrandbits(64), "draws": [Draw(3)], "scales": 1e-4}
    if OPS[op].momentum:
        case.call |= {"coefficients": 0.1, "alpha": 1e-4, "beta": 0.9}
    exact = copy_table(case.table)
    wide = Case(case.op, dataclasses.replace(exact, x=[x.float().contiguous() for x in exact.x]), case.call)
    wide.run(backend)
    mean = [torch.zeros(x.shape, dtype=F64) for x in case.table.x]
    for step in range(repeats):
        trial = case.on()
        trial.call["rounding"] = Rounding(step)
        trial.run(backend)
        for total, x in zip(mean, trial.table.x, strict=True):
            total += x.double() / repeats
    for total, target, x in zip(mean, wide.table.x, case.table.x, strict=True):
        spacing = 2 * UNIT[x.dtype] * target.double().abs() + 2.0**-24
        # A rounded value is off by at most one spacing, so its mean by 6 / (2 sqrt(repeats)) of it at 6 sigma.
        assert ((total - target).abs() <= 3 * spacing / repeats**0.5).all()


def test_two_passes_undo_each_other_in_fp32(rng, backend):
    case = random_case(rng, OPS["lowrank_update_"], random_shapes(rng), 4, dtypes=(torch.float32,), size=0.1)
    before, case.call = case.on(), {"seed": 1, "draws": [Draw(2)]}
    for scale in (1e-3, -2e-3, 1e-3):
        case.call["scales"] = scale
        case.run(backend)
    for x, old in zip(case.table.x, before.table.x, strict=True):
        assert torch.allclose(x, old, rtol=3 * 2.0**-23, atol=3 * 2.0**-23 * 0.1)


def test_same_bits_twice(rng, any_backend):
    first = random_case(rng, OPS["lowrank_momentum_"], random_shapes(rng), 4, call={"draws": 2, "stochastic": True})
    second = first.on()
    for case in (first, second):
        case.run(any_backend)
    assert_same(first, second)


def table(x=None, **kwargs):
    return TensorTable([torch.zeros(1, 2, 3) if x is None else x], [0], **kwargs)


V = [torch.zeros(1, 2, 3, dtype=torch.float16)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: table(torch.zeros(2, 3)), ValueError, r"give it as \(batch, rows, cols\)"),
        (lambda: table(torch.zeros(1, 2, 3, dtype=torch.float64)), TypeError, "float64; supported are"),
        (lambda: table(torch.zeros(1, 2, 3, dtype=torch.complex64)), TypeError, "complex64"),
        (lambda: table(torch.zeros(1, 2, 3, device="meta")), TypeError, "meta"),
        (lambda: table(torch.zeros(1, 3, 2).transpose(1, 2)), ValueError, "columns must be contiguous"),
        (lambda: table(torch.zeros(1, 1, 3).expand(1, 2, 3)), ValueError, "rows overlap"),
        (lambda: table(torch.zeros(1, 2, 3).expand(4, 2, 3)), ValueError, "matrices overlap"),
        (lambda: table(v=[torch.zeros(1, 3, 2, dtype=torch.float16)]), ValueError, "v of tensor 0"),
        (lambda: table(v=[torch.zeros(1, 2, 3)]), ValueError, "v of tensor 0"),
        (lambda: table(v=[torch.zeros(1, 65, 3, dtype=torch.float16)]), ValueError, "rank is 1 to 64"),
        (lambda: table(n=[torch.zeros(1, 2, 2)]), ValueError, "n of tensor 0"),
        (lambda: TensorTable([torch.zeros(1, 2, 3)], [1, 2]), ValueError, "tensor_ids has 2 entries for 1 tensors"),
    ],
)
def test_bad_tables(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.lowrank_update_(table(), seed=0, draws=[Draw(0)], scales=1.0), "needs a table with V"),
        (lambda: ops.dense_update_(table(v=V), seed=0, draws=[Draw(0)], scales=1.0), "is for dense tensors"),
        (lambda: ops.dense_update_(table(), seed=0, draws=[], scales=1.0), "takes 1 to 2 draws, not 0"),
        (lambda: ops.dense_update_(table(), seed=0, draws=[Draw(0)] * 3, scales=1.0), "not 3"),
        (lambda: ops.dense_update_(table(), seed=-1, draws=[Draw(0)], scales=1.0), "seed is 0 to"),
        (lambda: ops.dense_update_(table(), seed=0, draws=[Draw(1 << 28)], scales=1.0), "draw step is 0 to"),
        (lambda: ops.dense_update_(table(), seed=0, draws=[Draw(0, 1 << 24)], scales=1.0), "direction is 0 to"),
        (lambda: ops.dense_update_(table(), seed=0, draws=[Draw(0)], scales=[1.0, 2.0]), "does not broadcast"),
        (lambda: ops.dense_update_(table(), seed=0, draws=[Draw(0)], scales=1.0, rounding=Rounding(-1)), "rounding step"),
        (
            lambda: ops.lowrank_momentum_(table(v=V), seed=0, draws=[Draw(0)], scales=1.0, coefficients=1.0, alpha=1.0, beta=1.0),
            "needs a table with momentum",
        ),
        (lambda: ops.resample_(table(v=V), seed=0, window=1 << 28), "window is 0 to"),
        (lambda: ops.resample_(table(v=V), seed=0, window=0, reproject=True), "needs a table with momentum"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_empty_table(any_backend):
    ops.dense_update_(TensorTable([], []), seed=0, draws=[Draw(0)], scales=1.0, backend=any_backend)
