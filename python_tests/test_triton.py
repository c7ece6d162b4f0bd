"""The Triton kernels against the native CPU ones, bit for bit: in Triton's interpreter, or on a GPU where there is one."""

import itertools
import random

import pytest
import torch

from lozo_kernels.kernels import ops, reference, skinny
from lozo_kernels.kernels.backends import launches
from lozo_kernels.kernels.backends.triton import TritonBackend, activations
from lozo_kernels.kernels.backends.triton.tilesizes import TileSize
from lozo_kernels.kernels.calls import Draw, Rounding
from lozo_kernels.kernels.noise import dense, factor, to_grid
from lozo_kernels.kernels.registry import choose_backend
from lozo_kernels.kernels.table import TensorTable
from python_tests.table_helpers import UNIT, raw

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
    "lowrank_momentum": TileSize(64, 64, 2, 4),
    "dense_update": TileSize(1, 256, 2, 4),
    "dense_momentum": TileSize(1, 256, 2, 4),
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
EXACT_MOMENTUM_RANKS = (1, 2, 3, 4, 5, 7, 8)
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


class Example:
    """One tensor in poisoned storage, twice: on the CPU for the native kernels and on the device for Triton's."""

    def __init__(self, rng: random.Random, case, rank, momentum):
        aligned, shape, dtype = case
        if not rank:
            shape = rng.choice(DENSE_SHAPES[aligned])
        shape = shape or rng.choice(ALIGNED_SHAPES if aligned else ODD_SHAPES)
        dtype = dtype or rng.choice(DTYPES)
        step = 8 if aligned else 1
        batch, rows, cols = shape
        self.aligned, self.step = aligned, step
        storage, self.layout = self.memory(rng, shape, dtype)
        storage.as_strided(*self.layout).copy_(torch.randn(shape) * 10 ** rng.uniform(-3, 0))
        self.storage = [storage, storage.clone().to(DEVICE)]
        v = to_grid(torch.randn(batch, rank, cols)).half() if rank else None
        n = torch.randn(batch, rows, rank or cols) if momentum else None
        self.v = [v, None if v is None else v.clone().to(DEVICE)]
        self.n = [n, None if n is None else n.clone().to(DEVICE)]
        col_offset = step * rng.choice((0, 0, 5, 64))
        place = {
            "tensor_ids": [rng.getrandbits(32)],
            "row_offsets": [rng.choice((0, 7, 1 << 20))],
            "col_offsets": [col_offset],
            "global_cols": [cols + col_offset + step * rng.choice((0, 3))],
        }
        self.tables = [
            TensorTable([s.as_strided(*self.layout)], v=None if v is None else [v], n=None if n is None else [n], **place)
            for s, v, n in zip(self.storage, self.v, self.n, strict=True)
        ]

    def memory(self, rng, shape, dtype):
        """Poison, and a place in it with gaps between rows and between matrices."""
        batch, rows, cols = shape
        row_stride = cols + self.step * rng.choice((0, 0, 1, 3))
        batch_stride = rows * row_stride + self.step * rng.choice((0, 2))
        lead = self.step * rng.choice((0, 1, 2))
        storage = torch.full((lead + batch * batch_stride + 32,), float("nan"), dtype=dtype)
        return storage, (shape, (batch_stride, row_stride, 1), lead)

    def merge(self, rng, op, backend, call, apart):
        """The op in place, or into poisoned memory that is laid out in another way."""
        outs = (None, None)
        if apart:
            memory, layout = self.memory(rng, self.layout[0], self.storage[0].dtype)
            self.out = [memory, memory.clone().to(DEVICE)]
            outs = [TensorTable([m.as_strided(*layout)], [0]) for m in self.out]
        for table, out, which in zip(self.tables, outs, (EAGER, backend), strict=True):
            getattr(ops, op)(table, **call, out=out, backend=which)

    def run(self, op, backend, call):
        """The op on the CPU, and with the backend on the device."""
        for table, which in zip(self.tables, (CPU, backend), strict=True):
            getattr(ops, op)(table, **call, backend=which)

    def check(self, *names):
        """The bits of ``names`` agree; storage includes the poison around the weights."""
        for name in names:
            expected, got = getattr(self, name)
            assert torch.equal(raw(expected), raw(got.cpu())), f"{name} of {self.layout} {self.storage[0].dtype} differs"


def random_call(rng, momentum=False):
    draws = [Draw(rng.getrandbits(28), rng.getrandbits(24)) for _ in range(rng.choice((1, 2)))]
    call = {
        "seed": rng.getrandbits(64),
        "draws": draws,
        "scales": [[rng.gauss(0, 1e-2)] for _ in draws],
        "decay": rng.choice((None, 0.99)),
        "rounding": rng.choice((None, Rounding(rng.getrandbits(28), rng.getrandbits(24)))),
    }
    if momentum:
        call |= {"coefficients": [[rng.gauss(0, 1)] for _ in draws], "alpha": rng.gauss(0, 1e-2), "beta": rng.random()}
    return call


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", ["lowrank_update_", "lowrank_momentum_", "dense_update_", "dense_momentum_"])
def test_same_bits_as_the_cpu(rng, backend, op, case):
    momentum = "momentum" in op
    rank = 0 if "dense" in op else rng.choice(EXACT_MOMENTUM_RANKS if momentum else RANKS)
    example = Example(rng, case, rank, momentum)
    example.run(op, backend, random_call(rng, momentum))
    example.check("storage", *(["n"] if momentum else []))
    assert backend.launcher.launches == (2 if momentum and rank else 1)
    assert (backend.launcher.last.constants["WEIGHT"] is not None) == example.aligned


@pytest.mark.parametrize("case", CASES[::2])
@pytest.mark.parametrize("op", ["lowrank_merge_", "dense_merge_"])
def test_merge_same_bits_as_eager(rng, backend, op, case):
    rank = rng.choice(MERGE_RANKS) if "lowrank" in op else 0
    example = Example(rng, case, rank, momentum=bool(rank) or rng.random() < 0.6)
    call = random_call(rng)
    draws = rng.choice((0, 1, 1))
    call |= {"draws": call["draws"][:draws], "scales": [[s] for [s] in call["scales"][:draws]] or 0.0}
    apart = rng.random() < 0.7
    example.merge(rng, op, backend, call, apart)
    example.check("storage", *(["out"] if apart else []))
    assert backend.launcher.launches == (2 if rank > 16 and draws else 1)
    assert (backend.launcher.last.constants["WEIGHT"] is not None) == example.aligned


@pytest.mark.parametrize(("aligned", "draws"), [(True, 1), (False, 1), (True, 0)])
def test_merge_of_the_highest_rank(rng, backend, aligned, draws):
    """And two tensors at once, whose factors lie one after the other."""
    examples = [Example(rng, (aligned, shape, torch.bfloat16), 64, True) for shape in ((1, 33, 72), (2, 20, 136))]
    for which, side in ((EAGER, 0), (backend, 1)):
        tables = [e.tables[side] for e in examples]
        table = TensorTable([t.x[0] for t in tables], [1, 2], v=[t.v[0] for t in tables], n=[t.n[0] for t in tables])
        ops.lowrank_merge_(table, seed=3, draws=[Draw(4)][:draws], scales=0.01, backend=which)
    for example in examples:
        example.check("storage")


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
        assert torch.equal(raw(outs[0]), raw(outs[1].cpu()))


@pytest.mark.parametrize("i", range(12))
def test_factor_update_same_bits_as_eager(rng, backend, i):
    """Factors of several ranks in one launch, with gaps between their rows."""
    storages, tables = [], []
    layouts = [((1, 70, 5), (0, 5, 1), 0), ((2, 9, rng.choice((1, 3, 8, 64))), (640, 64, 1), 3), ((1, 33, 4), (0, 6, 1), 1)]
    poison = [torch.full((2000,), float("nan")) for _ in layouts]
    for p, layout in zip(poison, layouts, strict=True):
        p.as_strided(*layout).copy_(torch.randn(layout[0]))
    for device in ("cpu", DEVICE):
        storages.append([p.clone().to(device) for p in poison])
        xs = [p.as_strided(*layout) for p, layout in zip(storages[-1], layouts, strict=True)]
        tables.append(TensorTable(xs, [1, 2, 3], row_offsets=[0, 7, 1 << 20]))
    call = random_call(rng)
    del call["rounding"]
    for table, which in zip(tables, (EAGER, backend), strict=True):
        ops.factor_update_(table, **call, backend=which)
    for a, b in zip(*storages, strict=True):
        assert torch.equal(raw(a), raw(b.cpu()))
    assert backend.launcher.launches == 1


class Activations:
    """A call of lowrank_linear_ or, with ``looked_up``, lowrank_embedding_: outputs in poison, inputs among NaN."""

    def __init__(self, rng, groups, rank, tokens, transposed, looked_up):
        rows, cols = rng.choice(((33, 71), (64, 128), (16, 200), (130, 9)))
        self.groups, self.transposed = groups, transposed
        inputs, outputs = (rows, cols) if transposed else (cols, rows)
        if looked_up:
            outputs = cols
        self.v, self.b = to_grid(torch.randn(rank, cols)).half(), torch.randn(rows, rank) * 10 ** rng.uniform(-2, 1)
        self.storage, self.y = self.among_nan(rng, groups * tokens, outputs)
        self.x = torch.randint(rows, (groups * tokens,), dtype=rng.choice((torch.int32, torch.int64)))
        if not looked_up:
            _, self.x = self.among_nan(rng, groups * tokens, inputs)
        self.where = {
            "seed": rng.getrandbits(64),
            "tensor_id": rng.getrandbits(32),
            "row_offset": rng.choice((0, 5, (1 << 32) - 200)),
        }
        self.draws = torch.tensor([[rng.getrandbits(28), rng.getrandbits(24)] for _ in range(groups)])
        self.scales = torch.randn(groups)
        self.gain = rng.choice((None, torch.tensor([0.9])))
        self.shift = None if looked_up else rng.choice((None, torch.randn(groups, outputs)))

    @staticmethod
    def among_nan(rng, tokens, width):
        stride, lead = width + rng.choice((0, 1, 8)), rng.choice((0, 0, 3, 8))
        storage = torch.full((lead + tokens * stride + 16,), float("nan"), dtype=rng.choice(DTYPES))
        part = storage.as_strided((tokens, width), (stride, 1), lead)
        part.copy_(torch.randn(tokens, width))
        return storage, part

    def truth(self):
        """The result in fp64, and the size of what was added up, from copies of what there is before the call."""
        parts = []
        for g, (y, x) in enumerate(zip(self.y.chunk(self.groups), self.x.chunk(self.groups), strict=True)):
            step, direction = self.draws[g].tolist()
            at = {"row_offset": self.where["row_offset"], "direction": direction}
            u = factor(self.where["seed"], *self.b.shape, self.where["tensor_id"], step, **at)
            f = self.b.double() + u.double() * self.scales[g].double()
            size = self.b.double().abs() + (u.double() * self.scales[g].double()).abs()
            more = {"gain": self.gain, "dtype": torch.float64}
            absolute = (y.abs(), x.abs() if x.is_floating_point() else x, self.v.abs(), size)
            if not x.is_floating_point():
                parts.append([reference.lowrank_embedding(*args, **more) for args in ((y, x, self.v, f), absolute)])
                continue
            more |= {"transposed": self.transposed}
            shift = None if self.shift is None else self.shift[g]
            expected = reference.lowrank_linear(y, x, self.v, f, shift=shift, **more)
            parts.append([expected, reference.lowrank_linear(*absolute, shift=None if shift is None else shift.abs(), **more)])
        return (torch.cat(side) for side in zip(*parts, strict=True))

    def run(self, backend):
        """The whole storage of the outputs afterwards, and the outputs in it."""
        on = {k: None if t is None else t.to(DEVICE) for k, t in (("gain", self.gain), ("shift", self.shift))}
        storage = self.storage.clone().to(DEVICE)
        y = storage.as_strided(self.y.shape, self.y.stride(), self.y.storage_offset())
        x = self.x if self.x.dim() == 1 else self.x._base
        x = x.to(DEVICE) if self.x.dim() == 1 else x.to(DEVICE).as_strided(self.x.shape, self.x.stride(), self.x.storage_offset())
        common = self.where | {
            "draws": self.draws.to(DEVICE),
            "scales": self.scales.to(DEVICE),
            "gain": on["gain"],
            "backend": backend,
        }
        factors = (self.v.to(DEVICE), self.b.to(DEVICE))
        if x.dim() == 1:
            skinny.lowrank_embedding_(y, x, *factors, **common)
        else:
            skinny.lowrank_linear_(y, x, *factors, **common, transposed=self.transposed, shift=on["shift"])
        return storage.cpu(), y.cpu()

    def check(self, backend):
        expected, size = self.truth()
        storage, y = self.run(backend)
        rank, inputs = len(self.v), self.x.shape[-1]
        # Two parts of 11 bits, and fp32 sums in any order; then a rounding into the dtype of y.
        bound = ((inputs + rank + 8) * 2.0**-24 + 2.0**-20) * size + UNIT[y.dtype] * expected.abs() + 2.0**-24
        assert ((y.double() - expected).abs() <= bound).all()
        storage.as_strided(self.y.shape, self.y.stride(), self.y.storage_offset()).copy_(self.y)
        assert torch.equal(raw(storage), raw(self.storage))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 13, 32, 70])
@pytest.mark.parametrize("transposed", [False, True])
def test_lowrank_linear_is_bounded(rng, backend, monkeypatch, groups, tokens, transposed):
    """Long rows in parts, or several blocks a program: both divisions of the work."""
    monkeypatch.setattr(activations, "_PROGRAMS", rng.choice((1, 512)))
    Activations(rng, groups, rng.choice((1, 3, 4, 8, 17, 64)), tokens, transposed, looked_up=False).check(backend)
    assert backend.launcher.launches == 2


@pytest.mark.parametrize("i", range(8))
def test_lowrank_embedding_is_bounded(rng, backend, i):
    Activations(rng, (1, 2, 4)[i % 3], rng.choice((1, 3, 4, 17)), rng.choice((1, 13, 70)), False, looked_up=True).check(backend)


def test_rows_that_an_embedding_does_not_have_are_not_read(rng, backend):
    v, b = to_grid(torch.randn(3, 16)).half().to(DEVICE), torch.full((40, 3), float("nan"), device=DEVICE)
    ids = torch.tensor([-1, 30, 10**9, -(10**12)], device=DEVICE)
    b[10:20] = 1
    y = torch.ones(4, 16, device=DEVICE)
    where = {"draws": torch.tensor([[1, 0]], device=DEVICE), "scales": torch.zeros(1, device=DEVICE)}
    skinny.lowrank_embedding_(y, ids, v, b[10:20], seed=1, tensor_id=2, **where, backend=backend, checked=True)
    assert (y == 1).all()


@pytest.mark.parametrize("case", CASES)
def test_resample_same_bits_as_the_cpu(rng, backend, case):
    rank = rng.choice(RANKS)
    example = Example(rng, case, rank, momentum=True)
    call = {"seed": rng.getrandbits(64), "window": rng.getrandbits(28), "reproject": rng.random() < 0.8}
    example.run("resample_", backend, call)
    example.check("v", "n", "storage")


@pytest.mark.parametrize("i", range(40))
def test_factor_same_bits_as_the_noise(rng, backend, i):
    seed, rows, rank, tensor_id = rng.getrandbits(64), rng.randint(1, 150), rng.randint(1, 64), rng.getrandbits(32)
    draw, offset, stream = Draw(rng.getrandbits(28), rng.getrandbits(24)), rng.randint(0, (1 << 32) - 200), "UVS"[i % 3]
    got = ops.factor(seed, rows, rank, tensor_id, draw, stream=stream, row_offset=offset, device=DEVICE, backend=backend)
    expected = factor(seed, rows, rank, tensor_id, draw.step, stream=stream, row_offset=offset, direction=draw.direction)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("rank", [9, 16, 24, 64])
def test_wide_momentum_is_bounded(rng, backend, rank, aligned):
    """Above rank 8 the product runs on tensor cores: bounded by the unit of a split into two fp16, 2^-22, and of its sums."""
    example = Example(rng, (aligned, None, torch.float32), rank, momentum=True)
    magnitudes = 10.0 ** torch.randint(-20, 20, example.n[0].shape[:2])[..., None]  # rows of very different size
    for n in example.n:
        n.mul_(magnitudes.to(n.device))
    before = example.tables[0].x[0].clone()
    call = random_call(rng, momentum=True) | {"rounding": None, "decay": None, "scales": 0.0}
    example.run("lowrank_momentum_", backend, call)
    example.check("n")
    product = example.n[0].double() @ example.v[0].double()
    size = example.n[0].double().abs() @ example.v[0].double().abs() * abs(call["alpha"])
    error = (example.tables[1].x[0].cpu().double() - before.double() - product * call["alpha"]).abs()
    assert (error <= (rank + 4) * 2.0**-22 * size + 2 * UNIT[torch.float32] * before.double().abs()).all()


def test_a_table_of_everything(rng, backend):
    """Aligned tensors of all dtypes and odd ones in one table: one launch per dtype, one for the rest."""
    examples = [Example(rng, (aligned, None, dtype), 4, False) for aligned in (True, False) for dtype in DTYPES]
    call = random_call(rng)
    for side, which in ((0, CPU), (1, backend)):
        tables = [e.tables[side] for e in examples]
        table = TensorTable(
            [t.x[0] for t in tables],
            [t.tensor_ids[0] for t in tables],
            v=[t.v[0] for t in tables],
            row_offsets=[t.row_offsets[0] for t in tables],
            col_offsets=[t.col_offsets[0] for t in tables],
            global_cols=[t.global_cols[0] for t in tables],
        )
        scales = torch.linspace(-1, 1, len(examples)).repeat(len(call["draws"]), 1)
        ops.lowrank_update_(table, **(call | {"scales": scales.to(table.device)}), backend=which)
    for example in examples:
        example.check("storage")
    assert backend.launcher.launches == 4


@pytest.mark.skipif(DEVICE.type != "cpu", reason="it is the device that decides")
@pytest.mark.parametrize("case", [case for case in CASES if case[0]][::2])
@pytest.mark.parametrize("op", ["lowrank_update_", "lowrank_momentum_"])
def test_the_variant_for_amd(rng, backend, monkeypatch, op, case):
    """Blocks are stored in another shape there."""
    from lozo_kernels.kernels.backends.triton import backend as module
    from lozo_kernels.kernels.backends.triton.plans import Target

    monkeypatch.setattr(module, "_target", lambda device: Target(dp4a=False, eights=True, emulate=True))
    example = Example(rng, case, rng.choice(EXACT_MOMENTUM_RANKS), "momentum" in op)
    example.run(op, backend, random_call(rng, "momentum" in op))
    example.check("storage")


def test_small_tensors_share_a_launch(rng):
    """One that is alone has nothing to share and takes the fast kernel."""
    backend = TritonBackend(recorder(), sizes=SIZES)
    for dtypes in ((torch.bfloat16,), (torch.bfloat16, torch.float16)):
        xs = [torch.zeros(1, 33, 72, dtype=dtype, device=DEVICE) for dtype in dtypes]
        table = TensorTable(xs, [0] * len(xs), v=[torch.zeros(1, 2, 72, dtype=torch.float16, device=DEVICE) for _ in xs])
        backend.launcher.launches = 0
        ops.lowrank_update_(table, **random_call(rng), backend=backend)
        assert backend.launcher.launches == 1
        assert (backend.launcher.last.constants["WEIGHT"] is None) == (len(xs) > 1)


def test_special_values(rng, backend):
    """Infinities, NaN, subnormals and zeros of both signs, through nearest and stochastic rounding."""
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-40, -3e-45, 65504.0, -6e-8, 1e-5, 0.0, 3e-39])
    for dtype, stochastic in itertools.product(DTYPES, (False, True)):
        example = Example(rng, (True, (1, 64, 128), dtype), 2, False)
        values = special[torch.randint(len(special), (1, 64, 128))].to(dtype)
        for table in example.tables:
            table.x[0].copy_(values)
        call = random_call(rng) | {"rounding": Rounding(5) if stochastic else None, "scales": 1e-9}
        example.run("lowrank_update_", backend, call)
        example.check("storage")


def test_positions_beyond_32_bits(rng, backend):
    """The upper bits of flat positions and of counters reach the noise."""
    storage = torch.zeros(1, 1, 64, device=DEVICE)
    tensor_id, start = rng.getrandbits(32), (1 << 41) + 8 * rng.getrandbits(30)
    table = TensorTable([storage], [tensor_id], col_offsets=[start], global_cols=[start + 64])
    ops.dense_update_(table, seed=3, draws=[Draw(9, 2)], scales=1.0, backend=backend)
    assert torch.equal(storage.cpu()[0, 0], dense(3, 64, tensor_id, 9, offset=start, direction=2))


def test_empty_tensors(backend):
    table = TensorTable([torch.zeros(1, 0, 8, device=DEVICE), torch.zeros(1, 3, 0, device=DEVICE)], [1, 2])
    ops.dense_update_(table, seed=0, draws=[Draw(0)], scales=1.0, backend=backend)
    assert backend.launcher.launches == 0
