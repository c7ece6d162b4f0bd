"""The Triton kernels against the native CPU ones, bit for bit: in Triton's interpreter, or on a GPU where there is one."""

import itertools

import pytest
import torch

from lozo_kernels.bench.cases import OPS, Case, as_bits, random_call, random_case
from lozo_kernels.kernels import ops
from lozo_kernels.kernels.backends import launches
from lozo_kernels.kernels.backends.triton import TritonBackend
from lozo_kernels.kernels.backends.triton.tilesizes import TileSize
from lozo_kernels.kernels.calls import Draw, LayerCall
from lozo_kernels.kernels.noise import LAWS, dense, factor, to_grid
from lozo_kernels.kernels.registry import choose_backend
from lozo_kernels.kernels.table import TensorTable
from python_tests.table_helpers import Product, assert_same
from python_tests.test_points import check as check_points
from python_tests.test_points import make_call

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = TritonBackend()
REASON = TRITON.unavailable(DEVICE)
CPU = choose_backend("cpu").backend
EAGER = choose_backend("cpu", "eager").backend

pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}"),
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
]

# The interpreter takes some 30 ms a program, whatever its size: small tiles only as far as their edges are to be seen.
SIZES = {
    "lowrank_update": TileSize(64, 64, 2, 4, ahead=True),
    "dense_update": TileSize(1, 256, 2, 4),
    "dense_momentum": TileSize(1, 256, 2, 4),
    "lowrank_signed_update": TileSize(64, 64, 2, 4),
    "lowrank_merge": TileSize(64, 64, 2, 4),
    "dense_merge": TileSize(1, 256, 2, 4),
    "contraction": TileSize(32, 32, 4, 4),
    "expansion": TileSize(32, 64, 2, 4),
}
ALIGNED_SHAPES = [(1, 33, 72), (1, 64, 128), (2, 20, 136), (1, 1, 8), (1, 70, 200)]
ODD_SHAPES = [(1, 33, 71), (2, 5, 3), (1, 40, 129), (1, 1, 70), (3, 9, 1)]
# Dense kernels take a program a row where rows are apart.
DENSE_SHAPES = {True: [(1, 3, 600), (1, 1, 1208), (2, 2, 136)], False: [(1, 3, 601), (1, 1, 1203), (2, 2, 129), (1, 4, 1)]}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANKS = (1, 2, 3, 4, 5, 8, 16, 64)
MERGE_RANKS = (1, 2, 3, 4, 4, 8, 9, 16, 17, 24)
# Every kernel meets each of these: (aligned, shape, dtype), with stride, offsets, draws, decay and rounding drawn anew.
CASES = list(itertools.chain(itertools.product([True], ALIGNED_SHAPES, DTYPES), itertools.product([False], ODD_SHAPES, DTYPES)))
# and half as many again of random kind, so that a kernel has at least forty.
CASES += [(i % 2 == 0, None, None) for i in range(12)]


@pytest.fixture
def backend(monkeypatch):
    """Counting its launches; tensors of any size get the fast kernels."""
    monkeypatch.setattr(launches, "_LEAST_BYTES", 0)
    return TritonBackend(recorder(), sizes=SIZES)


def recorder():
    """A launcher that remembers the last plan."""
    from lozo_kernels.kernels.backends.triton.launcher import Launcher

    class Recorder(Launcher):
        def run(self, plan, programs, arguments):
            self.last = plan
            super().run(plan, programs, arguments)

    return Recorder()


def example(rng, op, kind, rank=0, **settings):
    """A case of one tensor: aligned or not, of a shape and a dtype."""
    aligned, shape, dtype = kind
    if not OPS[op].v:
        shape = rng.choice(DENSE_SHAPES[aligned])
    shape = shape or rng.choice(ALIGNED_SHAPES if aligned else ODD_SHAPES)
    return random_case(rng, OPS[op], [shape], rank, dtypes=(dtype or rng.choice(DTYPES),), step=8 if aligned else 1, **settings)


def check(case, backend, truth=CPU):
    """The bits of the CPU, poison around the weights included."""
    want, got = case.on(), case.on(DEVICE)
    want.run(truth)
    got.run(backend)
    assert_same(got.on(), want)


def check_kernel(backend, aligned):
    assert (backend.launcher.last.constants["WEIGHT"] is not None) == aligned


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(
    "op", ["lowrank_update_", "lowrank_momentum_", "lowrank_signed_update_", "dense_update_", "dense_momentum_"]
)
def test_same_bits_as_the_cpu(rng, backend, op, kind):
    check(example(rng, op, kind, rng.choice(RANKS)), backend)
    assert backend.launcher.launches == (2 if OPS[op].summed else 1)
    check_kernel(backend, kind[0])


@pytest.mark.parametrize("kind", CASES[::2])
@pytest.mark.parametrize("op", ["lowrank_merge_", "dense_merge_"])
def test_merge_same_bits_as_eager(rng, backend, op, kind):
    """In place, or into memory that is laid out in another way."""
    rank, draws = rng.choice(MERGE_RANKS), rng.choice((0, 1, 1))
    check(example(rng, op, kind, rank, n=rng.random() < 0.6, apart=rng.random() < 0.7, call={"draws": draws}), backend, EAGER)
    assert backend.launcher.launches == (2 if OPS[op].v and rank > 16 and draws else 1)
    check_kernel(backend, kind[0])


@pytest.mark.parametrize(("aligned", "draws"), [(True, 1), (False, 1), (True, 0)])
def test_merge_of_the_highest_rank(rng, backend, aligned, draws):
    """And two tensors at once, whose factors lie one after the other."""
    call = {"draws": draws, "stochastic": False, "decay": False}
    shapes, settings = [(1, 33, 72), (2, 20, 136)], {"dtypes": (torch.bfloat16,), "step": 8 if aligned else 1}
    check(random_case(rng, OPS["lowrank_merge_"], shapes, 64, call=call, **settings), backend, EAGER)


def test_merge_keeps_zeros_and_what_is_not_finite(rng, backend):
    """A sum that begins with a product, not with 0; signs of zeros; infinities and NaN of X and of N."""
    special = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("nan"), 1e-40])
    for rank in (1, 4, 20):
        x, n = special[torch.randint(len(special), (1, 33, 72))], special[torch.randint(3, (1, 33, rank))]
        n[0, 0, 0], n[0, 1] = float("inf"), -0.0
        v = to_grid(torch.randn(1, rank, 72)).half()
        v[0, :, :8] = 0
        outs = [torch.ones_like(x), torch.ones_like(x).to(DEVICE)]
        for out, which in zip(outs, (EAGER, backend), strict=True):
            on = [t.to(out.device) for t in (x, v, n)]
            table = TensorTable([on[0]], [0], v=[on[1]], n=[on[2]])
            ops.lowrank_merge_(table, seed=0, out=TensorTable([out], [0]), backend=which)
        assert torch.equal(as_bits(outs[0]), as_bits(outs[1].cpu()))


@pytest.mark.parametrize("i", range(12))
@pytest.mark.parametrize("op", ["factor_update_", "factor_momentum_"])
def test_factors_same_bits_as_eager(rng, backend, op, i):
    """Factors of several ranks in one launch, with gaps between their rows."""
    storages, tables = [], []
    layouts = [((1, 70, 5), (0, 5, 1), 0), ((2, 9, rng.choice((1, 3, 8, 64))), (640, 64, 1), 3), ((1, 33, 4), (0, 6, 1), 1)]
    poison = [torch.full((2000,), float("nan")) for _ in layouts]
    for p, layout in zip(poison, layouts, strict=True):
        p.as_strided(*layout).copy_(torch.randn(layout[0]))
    momentum = [torch.randn(layout[0]) for layout in layouts]
    for device in ("cpu", DEVICE):
        storages.append([p.clone().to(device) for p in poison])
        xs = [p.as_strided(*layout) for p, layout in zip(storages[-1], layouts, strict=True)]
        ns = [n.clone().to(device) for n in momentum]
        storages[-1] += ns
        tables.append(TensorTable(xs, [1, 2, 3], row_offsets=[0, 7, 1 << 20], n=ns if OPS[op].momentum else None))
    call = random_call(rng, OPS[op], 3)
    for table, which in zip(tables, (EAGER, backend), strict=True):
        getattr(ops, op)(table, **call, backend=which)
    for a, b in zip(*storages, strict=True):
        assert torch.equal(as_bits(a), as_bits(b.cpu()))
    assert backend.launcher.launches == 1


def product(rng, groups, rank, tokens, **kind):
    """A call that changes activations: fp32 goes in two parts of 11 bits through matrix units, with sums in any order."""
    rows, cols = rng.choice(((33, 71), (64, 128), (16, 200), (130, 9)))
    sizes = {"rank": rank, "tokens": groups * tokens, "rows": rows, "cols": cols, "groups": groups}
    return Product(rng, **sizes, **kind, device=DEVICE, split=2.0**-20)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 13, 32, 70])
@pytest.mark.parametrize("transposed", [False, True])
def test_lowrank_linear_is_bounded(rng, backend, monkeypatch, groups, tokens, transposed):
    """Long rows in parts, or several blocks a program: both divisions of the work."""
    monkeypatch.setattr("lozo_kernels.kernels.backends.triton.activations._PROGRAMS", rng.choice((1, 512)))
    product(rng, groups, rng.choice((1, 3, 4, 8, 17, 64)), tokens, transposed=transposed).check(backend)
    assert backend.launcher.launches == 2


@pytest.mark.parametrize("i", range(8))
def test_lowrank_embedding_is_bounded(rng, backend, i):
    product(rng, (1, 2, 4)[i % 3], rng.choice((1, 3, 4, 17)), rng.choice((1, 13, 70)), lookup=True).check(backend)


@pytest.mark.parametrize(("ranks", "rank"), [(2, 2), (40, 3), (5, None)])
@pytest.mark.parametrize("transposed", [False, True])
def test_lowrank_points_is_bounded(rng, backend, monkeypatch, ranks, rank, transposed):
    """Both divisions of the work: launches of parts, and several blocks of tokens a program."""
    for programs, parts in ((1, 1), (512, 3)):
        monkeypatch.setattr("lozo_kernels.kernels.backends.triton.activations._PROGRAMS", programs)
        before, cols = backend.launcher.launches, 30 if parts == 1 else 70
        tokens, rows = rng.choice((1, 70)), cols if transposed else 130
        call = make_call(rng, tokens=tokens, rows=rows, cols=cols, ranks=ranks, rank=rank, transposed=transposed)
        check_points(call, backend, DEVICE)
        own = transposed and rank is not None
        assert backend.launcher.launches - before == 2 + own + (own or parts > 1)


def test_rows_that_an_embedding_does_not_have_are_not_read(rng, backend):
    v, b = to_grid(torch.randn(3, 16)).half().to(DEVICE), torch.full((40, 3), float("nan"), device=DEVICE)
    ids = torch.tensor([-1, 30, 10**9, -(10**12)], device=DEVICE)
    b[10:20] = 1
    y = torch.ones(4, 16, device=DEVICE)
    where = {"draws": torch.tensor([[1, 0]], device=DEVICE), "scales": torch.zeros(1, device=DEVICE)}
    backend.lowrank_embedding_(LayerCall(y, ids, v, b[10:20], seed=1, tensor_id=2, row_offset=0, **where))
    assert (y == 1).all()


@pytest.mark.parametrize("kind", CASES)
def test_resample_same_bits_as_the_cpu(rng, backend, kind):
    check(example(rng, "resample_", kind, rng.choice(RANKS), call={"reproject": rng.random() < 0.8}), backend)


@pytest.mark.parametrize("i", range(40))
def test_factor_same_bits_as_the_noise(rng, backend, i):
    seed, rows, rank, tensor_id = rng.getrandbits(64), rng.randint(1, 150), rng.randint(1, 64), rng.getrandbits(32)
    draw, offset, stream = Draw(rng.getrandbits(28), rng.getrandbits(24)), rng.randint(0, (1 << 32) - 200), "UVS"[i % 3]
    got = ops.factor(seed, rows, rank, tensor_id, draw, stream=stream, row_offset=offset, device=DEVICE, backend=backend)
    expected = factor(seed, rows, rank, tensor_id, draw.step, stream=stream, row_offset=offset, direction=draw.direction)
    assert torch.equal(got.cpu(), expected)


def test_a_table_of_everything(rng, backend):
    """Aligned tensors of all dtypes and odd ones in one table: one launch per dtype, one for the rest."""
    kinds = [(aligned, None, dtype) for aligned in (True, False) for dtype in DTYPES]
    tables = [example(rng, "lowrank_update_", kind, 4).table for kind in kinds]
    fields = ("x", "tensor_ids", "v", "row_offsets", "col_offsets", "global_cols")
    table = TensorTable(**{name: [value for t in tables for value in getattr(t, name)] for name in fields})
    check(Case(OPS["lowrank_update_"], table, random_call(rng, OPS["lowrank_update_"], len(table))), backend)
    assert backend.launcher.launches == 4


@pytest.mark.skipif(DEVICE.type != "cpu", reason="it is the device that decides")
@pytest.mark.parametrize("kind", [kind for kind in CASES if kind[0]][::2])
def test_the_variant_for_amd(rng, backend, monkeypatch, kind):
    """Blocks are stored in another shape there."""
    from lozo_kernels.kernels.backends.triton import work
    from lozo_kernels.kernels.backends.triton.plans import Target

    monkeypatch.setattr(work, "target_of", lambda device: Target(dp4a=False, eights=True, emulate=True))
    check(example(rng, "lowrank_update_", kind, rng.choice(RANKS)), backend)


def test_small_tensors_share_a_launch(rng):
    """One that is alone has nothing to share and takes the fast kernel."""
    backend = TritonBackend(recorder(), sizes=SIZES)
    for dtypes in ((torch.bfloat16,), (torch.bfloat16, torch.float16)):
        xs = [torch.zeros(1, 33, 72, dtype=dtype, device=DEVICE) for dtype in dtypes]
        table = TensorTable(xs, [0] * len(xs), v=[torch.zeros(1, 2, 72, dtype=torch.float16, device=DEVICE) for _ in xs])
        backend.launcher.launches = 0
        ops.lowrank_update_(table, **random_call(rng, OPS["lowrank_update_"], len(xs)), backend=backend)
        assert backend.launcher.launches == 1
        assert (backend.launcher.last.constants["WEIGHT"] is None) == (len(xs) > 1)


def test_special_values(rng, backend):
    """Infinities, NaN, subnormals and zeros of both signs, through nearest and stochastic rounding."""
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-40, -3e-45, 65504.0, -6e-8, 1e-5, 0.0, 3e-39])
    for dtype, stochastic in itertools.product(DTYPES, (False, True)):
        case = example(rng, "lowrank_update_", (True, (1, 64, 128), dtype), 2, call={"stochastic": stochastic})
        case.table.x[0].copy_(special[torch.randint(len(special), (1, 64, 128))])
        case.call["scales"].fill_(1e-9)
        check(case, backend)


def test_positions_beyond_32_bits(rng, backend):
    """The upper bits of flat positions and of counters reach the noise."""
    for law in LAWS:
        for low in (rng.getrandbits(30), 15, 16):
            storage = torch.zeros(1, 1, 64, device=DEVICE)
            tensor_id, start = rng.getrandbits(32), (1 << 41) + 8 * low
            table = TensorTable([storage], [tensor_id], col_offsets=[start], global_cols=[start + 64])
            ops.dense_update_(table, seed=3, draws=[Draw(9, 2)], scales=1.0, law=law, backend=backend)
            assert torch.equal(storage.cpu()[0, 0], dense(3, 64, tensor_id, 9, offset=start, direction=2, law=law))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("op", ["dense_update_", "dense_momentum_", "dense_merge_"])
def test_both_laws_of_dense_noise(rng, backend, op, aligned, law):
    """Several blocks and tiles of every dtype, from positions anywhere in a counter."""
    for dtype in DTYPES:
        call = {"draws": OPS[op].draws[1], "law": law}
        check(example(rng, op, (aligned, None, dtype), apart=rng.random() < 0.5, call=call), backend, EAGER)
        check_kernel(backend, aligned)


def test_empty_tensors(backend):
    table = TensorTable([torch.zeros(1, 0, 8, device=DEVICE), torch.zeros(1, 3, 0, device=DEVICE)], [1, 2])
    ops.dense_update_(table, seed=0, draws=[Draw(0)], scales=1.0, backend=backend)
    assert backend.launcher.launches == 0
