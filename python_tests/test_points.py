"""What tokens at several points add to the outputs of a layer, on every backend: within bounds of the truth in fp64."""

import dataclasses

import pytest
import torch

from lozo_kernels.bench.cases import UNIT, as_bits, storage_of, strided
from lozo_kernels.kernels import reference, skinny
from lozo_kernels.kernels.backends import native
from lozo_kernels.kernels.calls import PointsCall
from lozo_kernels.kernels.noise import MAX_RANK
from lozo_kernels.kernels.registry import choose_backend
from lozo_kernels.kernels.table import DTYPES

F64 = torch.float64
SPLIT = {"triton": 2.0**-20}
"""What a backend may be off by besides, of the size of the terms: matrix units take fp32 in two parts."""


def make_call(rng, *, tokens, rows, cols, ranks, rank=None, count=3, transposed=False, dtypes=None):
    """A call of random numbers. Tokens of a direction lie together and apart, and some are at rest; gaps in memory are NaN."""
    y_dtype, x_dtype = dtypes or (rng.choice(DTYPES), rng.choice(DTYPES))
    inputs, outputs = (rows, cols) if transposed else (cols, rows)
    y, x = strided(rng, (1, tokens, outputs), y_dtype)[0], strided(rng, (1, tokens, inputs), x_dtype)[0]
    directions = torch.randint(count, (tokens,)).repeat_interleave(rng.choice((1, 3)))[:tokens].contiguous()
    scales = torch.where(torch.rand(tokens) < 0.3, 0.0, torch.randn(tokens))
    u = None if rank is None else torch.randn(count, rank, rows)
    gain = rng.choice((None, torch.rand(1)))
    return PointsCall(y, x, torch.randn(ranks, cols), torch.randn(ranks, rows), u, directions, scales, transposed, gain)


def evaluate(call, view):
    """The truth of a call in fp64, or with absolute values the size of its terms."""
    given = [view(t) for t in (call.y, call.x, call.v, call.b)]
    u, gain = (None if t is None else view(t) for t in (call.u, call.gain))
    return reference.lowrank_points(*given, u, call.directions, view(call.scales), transposed=call.transposed, gain=gain, dtype=F64)


def run(call, backend, device="cpu"):
    """Makes the call on copies, on a device and with the same layout in storage, and returns y."""

    def moved(t):
        return t if t is None else storage_of(t).to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())

    y, gain = moved(call.y), moved(call.gain)
    factors = [moved(t) for t in (call.x, call.v, call.b, call.u, call.directions, call.scales)]
    skinny.lowrank_points_(y, *factors, transposed=call.transposed, gain=gain, backend=backend)
    return storage_of(y).cpu().as_strided(y.shape, y.stride(), y.storage_offset())


def check(call, backend, device="cpu"):
    """Checks that y is within its bound of the truth, and that nothing beside y was written."""
    y, exact, size = run(call, backend, device), evaluate(call, torch.Tensor.double), evaluate(call, lambda t: t.double().abs())
    terms = call.x.shape[1] + len(call.v) + (0 if call.u is None else call.x.shape[1] + call.u.shape[1]) + 6
    bound = (terms * UNIT[torch.float32] + SPLIT.get(backend.name, 0.0)) * size
    bound = bound + 1.01 * UNIT[y.dtype] * exact.abs() + 2.0**-24
    assert ((y.double() - exact).abs() <= bound).all(), call
    gaps = torch.ones_like(storage_of(y), dtype=torch.bool)
    gaps.as_strided(y.shape, y.stride(), y.storage_offset()).fill_(False)
    assert torch.equal(as_bits(storage_of(y))[gaps], as_bits(storage_of(call.y))[gaps]), "something beside y was written"


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 1), (2, 2), (3, None), (5, 3), (34, 2), (66, 64)])
def test_points(rng, any_backend, ranks, rank, transposed):
    """One window, several earlier ones, and no directions; shapes around the blocks of all instruction sets."""
    for tokens, rows, cols in ((1, 1, 1), (rng.randint(2, 9), rng.randint(2, 70), rng.randint(2, 70)), (37, 131, 67)):
        check(make_call(rng, tokens=tokens, rows=rows, cols=cols, ranks=ranks, rank=rank, transposed=transposed), any_backend)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("y_dtype", DTYPES, ids=str)
def test_every_dtype(rng, any_backend, y_dtype, x_dtype):
    for transposed in (False, True):
        sizes = {"tokens": 13, "rows": 70, "cols": 45, "ranks": 6, "rank": 2}
        check(make_call(rng, **sizes, transposed=transposed, dtypes=(y_dtype, x_dtype)), any_backend)


@pytest.mark.parametrize("isa", native.supported_isas() if choose_backend("cpu").backend.name == "native" else [])
def test_every_instruction_set(rng, isa):
    """Every dtype with blocks that are whole and that are not, more columns than one item of work has, and more tokens."""
    backend = choose_backend("cpu", "native").backend
    native.set_isa(isa)
    try:
        for y_dtype in DTYPES:
            for x_dtype in DTYPES:
                for transposed in (False, True):
                    sizes = {
                        "tokens": rng.choice((rng.randint(1, 9), 60)),
                        "rows": rng.randint(1, 300),
                        "cols": rng.randint(1, 300),
                    }
                    ranks, rank = rng.choice(((1, 1), (2, 2), (7, 3), (8, 8), (40, 4), (8, None)))
                    more = {"ranks": ranks, "rank": rank, "count": rng.choice((1, 3, 15)), "dtypes": (y_dtype, x_dtype)}
                    check(make_call(rng, **sizes, **more, transposed=transposed), backend)
    finally:
        native.set_isa(None)


@pytest.mark.parametrize("transposed", [False, True])
def test_threads_do_not_matter(rng, transposed):
    backend = choose_backend("cpu").backend
    call = make_call(rng, tokens=301, rows=900, cols=1100, ranks=9, rank=4, count=15, transposed=transposed)
    check(call, backend)
    results = []
    for count in (1, 2, 3, 40):
        torch.set_num_threads(count)
        results.append(as_bits(run(call, backend)))
    assert all(torch.equal(result, results[0]) for result in results[1:]) or backend.name == "eager"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_a_wider_tensor(rng, any_backend, dtype):
    """As queries, keys and values are of one layer: NaN beside the columns stays, and does not come in."""
    whole = torch.full((11, 90), float("nan"), dtype=dtype)
    inputs = torch.full((11, 60), float("nan"), dtype=dtype)
    call = make_call(rng, tokens=11, rows=33, cols=40, ranks=5, rank=2)
    y, x = whole[:, 7:40], inputs[:, 3:43]
    y.copy_(torch.randn(11, 33))
    x.copy_(torch.randn(11, 40))
    check(dataclasses.replace(call, y=y, x=x), any_backend)


def test_a_token_at_rest_gets_no_u(rng, any_backend):
    """Whatever is in U of the direction that it names, which no token of the others shares."""
    if any_backend.name != "native":
        pytest.skip("products with zero in place of P multiply what is not finite too")
    call = make_call(rng, tokens=9, rows=33, cols=20, ranks=4, rank=2)
    call.directions.copy_(torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2]))
    call.scales.copy_(torch.tensor([0.0] * 5 + [1.0] * 4))
    finite = run(call, any_backend)
    call.u[0] = float("nan")
    assert torch.equal(as_bits(run(call, any_backend)), as_bits(finite))


@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_to_do(any_backend, transposed):
    """No tokens, no outputs, and no inputs, where only the gain is left."""
    for tokens, rows, cols in ((0, 4, 5), (3, 0, 5), (3, 4, 0)):
        inputs, outputs = (rows, cols) if transposed else (cols, rows)
        y = torch.ones(tokens, outputs)
        factors = (torch.ones(2, cols), torch.ones(2, rows), torch.ones(1, 1, rows))
        where = (torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens))
        gain = torch.full((1,), 0.5)
        skinny.lowrank_points_(
            y, torch.ones(tokens, inputs), *factors, *where, transposed=transposed, gain=gain, backend=any_backend
        )
        assert (y == 0.5).all()


def test_compiled_call_gives_the_same_bits(rng):
    call = make_call(rng, tokens=6, rows=7, cols=10, ranks=3, rank=2, dtypes=(torch.float32, torch.float32))
    expected = run(call, None)
    y = call.y.contiguous()
    factors = (call.x, call.v, call.b, call.u, call.directions, call.scales)
    given = {"transposed": call.transposed, "gain": call.gain}
    torch.compile(lambda: skinny.lowrank_points_(y, *factors, **given), backend="aot_eager", fullgraph=True)()
    assert torch.equal(y, expected)


def call_with(**changes):
    call = {
        "y": torch.zeros(4, 5),
        "x": torch.zeros(4, 6),
        "v": torch.zeros(3, 6),
        "b": torch.zeros(3, 5),
        "u": torch.zeros(2, 2, 5),
        "directions": torch.zeros(4, dtype=torch.int64),
        "scales": torch.zeros(4),
    }
    skinny.lowrank_points_(**call | changes)


WHOLE = torch.zeros(4, 11)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y": torch.zeros(4, 5, dtype=F64)}, TypeError, "y is torch.float64"),
        ({"y": torch.zeros(5, 4).T}, ValueError, r"y is \(4, 5\) with strides"),
        ({"y": torch.zeros(4, 6)}, ValueError, r"needed is \(4, 5\)"),
        ({"x": torch.zeros(3, 6)}, ValueError, r"x is \(3, 6\)"),
        ({"x": torch.zeros(6, 4).T}, ValueError, r"x is \(4, 6\)"),
        ({"x": torch.zeros(4, 6, dtype=torch.int32)}, ValueError, "x is"),
        ({"y": WHOLE[:, :5], "x": WHOLE[:, 4:10]}, ValueError, "share storage"),
        ({"v": torch.zeros(3, 6).half()}, ValueError, "v is"),
        ({"v": torch.zeros(0, 6), "b": torch.zeros(0, 5)}, ValueError, "one rank at least"),
        ({"b": torch.zeros(5, 3)}, ValueError, "b is"),
        ({"b": torch.zeros(5, 3).T}, ValueError, "contiguous: False"),
        ({"u": torch.zeros(2, 5, 2)}, ValueError, "u is"),
        ({"u": torch.zeros(2, 4, 5)}, ValueError, r"\(count, 1 to 3, 5\)"),
        ({"u": torch.zeros(2, 65, 5), "v": torch.zeros(65, 6), "b": torch.zeros(65, 5)}, ValueError, f"1 to {MAX_RANK}"),
        ({"directions": torch.zeros(4, dtype=torch.int32)}, ValueError, "directions is"),
        ({"directions": torch.tensor([0, 1, 2, 0])}, ValueError, "directions are 0 to 1, not 0 to 2"),
        ({"directions": torch.tensor([0, 1, -1, 0])}, ValueError, "directions are 0 to 1, not -1 to 1"),
        ({"scales": torch.zeros(3)}, ValueError, "scales is"),
        ({"gain": torch.zeros(2)}, ValueError, "gain is"),
        ({"transposed": True}, ValueError, r"needed is \(4, 6\)"),
        ({"backend": choose_backend("cpu", "eager").backend, "u": torch.zeros(0, 2, 5)}, ValueError, "directions are 0 to -1"),
    ],
)
def test_wrong_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        call_with(**changes)


def test_directions_that_do_not_exist_are_refused_by_the_kernel():
    """An unchecked call reads nothing outside of U."""
    backend = choose_backend("cpu").backend
    if backend.name != "native":
        pytest.skip("the native library is not built")
    for bad in (-1, 2, 1 << 40):
        y, directions = torch.ones(4, 5), torch.tensor([0, 1, bad, 0])
        factors = (torch.ones(3, 6), torch.ones(3, 5), torch.ones(2, 2, 5))
        with pytest.raises(ValueError, match="rejected the arguments"):
            skinny.dispatch_points(PointsCall(y, torch.ones(4, 6), *factors, directions, torch.ones(4)), backend)
        assert (y == 1).all()
