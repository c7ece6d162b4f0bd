"""Every op on every backend: within derived bounds of the fp64 reference, and nothing else is written."""

import pytest
import torch

from lozo_kernels import Draw, Rounding, TensorTable
from lozo_kernels.kernels import ops, reference
from lozo_kernels.kernels.backends.eager import column_factor, dense_noise, row_factor
from python_tests.table_helpers import UNIT, Case, assert_same_bits

F64 = torch.float64


def random_call(rng, count, draws):
    return {
        "seed": rng.getrandbits(64),
        "draws": [Draw(rng.getrandbits(28), rng.choice((0, 0, 3))) for _ in range(draws)],
        "scales": torch.randn(draws, count) * 1e-2,
        "decay": rng.choice((None, 1 - torch.rand(count) * 0.1)),
    }


def momentum_call(rng, count, draws):
    return {
        "coefficients": torch.randn(draws, count),
        "alpha": torch.randn(count) * 1e-2,
        "beta": torch.rand(count),
    }


def check_close(case, before, expected, magnitude, roundings):
    """|x - expected| within ``roundings`` fp32 roundings of the largest term, and one rounding into the weight's dtype."""
    for t, x in enumerate(case.table.x):
        if not x.numel():
            continue
        exact = expected(before.table, t)
        bound = roundings * UNIT[torch.float32] * magnitude(before.table, t) + 1.01 * UNIT[x.dtype] * exact.abs() + 2.0**-24
        assert not x.isnan().any()
        assert ((x.double() - exact).abs() <= bound).all(), f"tensor {t}: {tuple(x.shape)} {x.dtype}"


def at(values, t):
    return None if values is None else values[t]


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 13, 64])
def test_lowrank_update(rng, any_backend, rank, draws):
    case = Case(rng, rank)
    before, call = case.copy(), random_call(rng, 5, draws)
    ops.lowrank_update_(case.table, **call, backend=any_backend)

    def terms(table, t):
        us = [row_factor(table, t, call["seed"], d) for d in call["draws"]]
        return us, list(call["scales"][:, t])

    def expected(table, t):
        return reference.lowrank_update(table.x[t], table.v[t], *terms(table, t), at(call["decay"], t), dtype=F64)

    def magnitude(table, t):
        us, scales = terms(table, t)
        sizes = [reference.low_rank_product(u, table.v[t], F64).abs() * s.abs() for u, s in zip(us, scales, strict=True)]
        return table.x[t].double().abs() + sum(sizes)

    check_close(case, before, expected, magnitude, 2 + 3 * draws)
    gaps_untouched(case, before)


@pytest.mark.parametrize("draws", [1, 2])
def test_dense_update(rng, any_backend, draws):
    case = Case(rng, 0)
    before, call = case.copy(), random_call(rng, 5, draws)
    ops.dense_update_(case.table, **call, backend=any_backend)

    def expected(table, t):
        zs = [dense_noise(table, t, call["seed"], d) for d in call["draws"]]
        return reference.dense_update(table.x[t], zs, list(call["scales"][:, t]), at(call["decay"], t), dtype=F64)

    check_close(
        case, before, expected, lambda table, t: table.x[t].double().abs() + 10 * call["scales"][:, t].abs().sum(), 2 + 3 * draws
    )
    gaps_untouched(case, before)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("rank", [1, 4, 8, 11, 64])
def test_lowrank_momentum(rng, any_backend, rank, draws):
    case = Case(rng, rank, momentum=True)
    before, call = case.copy(), random_call(rng, 5, draws) | momentum_call(rng, 5, draws)
    ops.lowrank_momentum_(case.table, **call, backend=any_backend)

    def expected_n(table, t, dtype=F64):
        us = [row_factor(table, t, call["seed"], d) for d in call["draws"]]
        return reference.momentum(table.n[t], us, list(call["coefficients"][:, t]), call["beta"][t], dtype=dtype), us

    def expected(table, t):
        n, us = expected_n(table, t)
        y = reference.lowrank_update(table.x[t], table.v[t], us, list(call["scales"][:, t]), at(call["decay"], t), dtype=F64)
        return reference.apply_momentum(y, reference.momentum_product(n, table.v[t], dtype=F64), call["alpha"][t])

    def magnitude(table, t):
        n, _ = expected_n(table, t)
        size = (n.abs() + 10) @ table.v[t].double().abs() * call["alpha"][t].abs()
        scale = call["scales"][:, t].abs().sum()
        return table.x[t].double().abs() + (rank + 4) * size + scale * 25 * rank

    check_close(case, before, expected, magnitude, 3 * draws + 4)
    for t, n in enumerate(case.table.n):
        if case.table.x[t].numel():
            assert torch.equal(n, expected_n(before.table, t, torch.float32)[0])
    gaps_untouched(case, before)


@pytest.mark.parametrize("draws", [1, 2])
def test_dense_momentum(rng, any_backend, draws):
    case = Case(rng, 0, momentum=True)
    before, call = case.copy(), random_call(rng, 5, draws) | momentum_call(rng, 5, draws)
    ops.dense_momentum_(case.table, **call, backend=any_backend)

    def parts(table, t, dtype=F64):
        zs = [dense_noise(table, t, call["seed"], d) for d in call["draws"]]
        return zs, reference.momentum(table.n[t], zs, list(call["coefficients"][:, t]), call["beta"][t], dtype=dtype)

    def expected(table, t):
        zs, n = parts(table, t)
        y = reference.dense_update(table.x[t], zs, list(call["scales"][:, t]), at(call["decay"], t), dtype=F64)
        return reference.apply_momentum(y, n, call["alpha"][t])

    def magnitude(table, t):
        _, n = parts(table, t)
        return table.x[t].double().abs() + 10 * call["scales"][:, t].abs().sum() + (n.abs() + 30) * call["alpha"][t].abs()

    check_close(case, before, expected, magnitude, 3 * draws + 4)
    for t, n in enumerate(case.table.n):
        if n.numel():
            assert torch.equal(n, parts(before.table, t, torch.float32)[1])
    gaps_untouched(case, before)


@pytest.mark.parametrize("rank", [1, 3, 8, 24])
def test_resample(rng, any_backend, rank):
    case = Case(rng, rank, momentum=True)
    before, seed, window = case.copy(), rng.getrandbits(64), rng.getrandbits(28)
    ops.resample_(case.table, seed=seed, window=window, reproject=True, backend=any_backend)
    for t, x in enumerate(case.table.x):
        if not x.numel():
            continue
        v = column_factor(before.table, t, seed, window)
        assert torch.equal(case.table.v[t], v)
        old = before.table.v[t].double()
        # The m x n form of the published code: N V_old^T is formed and projected on the new V.
        expected = before.table.n[t].double() @ old @ v.double().transpose(1, 2) / x.shape[2]
        size = before.table.n[t].double().abs() @ (old @ v.double().transpose(1, 2) / x.shape[2]).abs()
        assert ((case.table.n[t].double() - expected).abs() <= (rank + 2) * UNIT[torch.float32] * size + 1e-30).all()
    assert all(torch.equal(a, b) for a, b in zip(noise_free(case), noise_free(before), strict=True))


def noise_free(case):
    return [s.nan_to_num() for s in case.storages]


def gaps_untouched(case, before):
    """Poison between rows, before and after is as it was."""
    for storage, x, old in zip(case.storages, case.table.x, before.storages, strict=True):
        mask = torch.ones_like(storage, dtype=torch.bool)
        torch.as_strided(mask, x.shape, x.stride(), x.storage_offset()).fill_(False)
        assert storage[mask].isnan().all()
        assert old[mask].isnan().all()


@pytest.mark.parametrize("op", ["lowrank_update_", "dense_update_", "lowrank_momentum_", "dense_momentum_"])
def test_stochastic_rounding_is_unbiased(rng, backend, op):
    """The mean over many steps of one rounded update converges on the unrounded value; nearest rounding stays off it."""
    low_rank, momentum, repeats = "lowrank" in op, "momentum" in op, 600
    case = Case(rng, 4 if low_rank else 0, momentum=momentum, shapes=[(1, 6, 20)] * 2, dtypes=(torch.bfloat16, torch.float16))
    seed = rng.getrandbits(64)
    call = {"seed": seed, "draws": [Draw(3)], "scales": 1e-4}
    if momentum:
        call |= {"coefficients": 0.1, "alpha": 1e-4, "beta": 0.9}
    exact = case.copy()
    wide = TensorTable(
        [x.float().contiguous() for x in exact.table.x],
        case.ids,
        v=exact.table.v,
        n=exact.table.n,
        row_offsets=case.row_offsets,
        col_offsets=case.col_offsets,
        global_cols=case.global_cols,
    )
    getattr(ops, op)(wide, **call, backend=backend)
    mean = [torch.zeros(x.shape, dtype=F64) for x in case.table.x]
    for step in range(repeats):
        trial = case.copy()
        getattr(ops, op)(trial.table, **call, rounding=Rounding(step), backend=backend)
        for total, x in zip(mean, trial.table.x, strict=True):
            total += x.double() / repeats
    for total, target, x in zip(mean, wide.x, case.table.x, strict=True):
        spacing = 2 * UNIT[x.dtype] * target.double().abs() + 2.0**-24
        # A rounded value is off by at most one spacing, so its mean by 6 / (2 sqrt(repeats)) of it at 6 sigma.
        assert ((total - target).abs() <= 3 * spacing / repeats**0.5).all()


def test_two_passes_undo_each_other_in_fp32(rng, backend):
    case = Case(rng, 4, dtypes=(torch.float32,))
    before, call = case.copy(), {"seed": 1, "draws": [Draw(2)]}
    for scale in (1e-3, -2e-3, 1e-3):
        ops.lowrank_update_(case.table, **call, scales=scale, backend=backend)
    for x, old in zip(case.table.x, before.table.x, strict=True):
        assert torch.allclose(x, old, rtol=3 * 2.0**-23, atol=3 * 2.0**-23 * 0.1)


def test_same_bits_twice(rng, any_backend):
    first = Case(rng, 4, momentum=True)
    second = first.copy()
    call = random_call(rng, 5, 2) | momentum_call(rng, 5, 2)
    for case in (first, second):
        ops.lowrank_momentum_(case.table, **call, rounding=Rounding(1), backend=any_backend)
    assert_same_bits(first, second)


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
