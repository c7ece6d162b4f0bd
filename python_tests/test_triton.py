"""The Triton kernels against the native CPU ones, bit for bit: in Triton's interpreter, or on a GPU where there is one."""

import itertools
import random

import pytest
import torch
from table_helpers import UNIT, raw

from lozo_kernels import ops
from lozo_kernels.backends import launches
from lozo_kernels.backends.triton import TritonBackend
from lozo_kernels.backends.triton.tilesizes import TileSize
from lozo_kernels.noise import dense, factor, to_grid
from lozo_kernels.registry import Draw, Rounding, choose_backend
from lozo_kernels.table import TensorTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = TritonBackend()
REASON = TRITON.unavailable(DEVICE)
CPU = choose_backend("cpu").backend

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
}
ALIGNED_SHAPES = [(1, 33, 72), (1, 64, 128), (2, 20, 136), (1, 1, 8), (1, 70, 200)]
ODD_SHAPES = [(1, 33, 71), (2, 5, 3), (1, 40, 129), (1, 1, 70), (3, 9, 1)]
# Dense kernels take a program a row where rows are apart.
DENSE_SHAPES = {True: [(1, 3, 600), (1, 1, 1208), (2, 2, 136)], False: [(1, 3, 601), (1, 1, 1203), (2, 2, 129), (1, 4, 1)]}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANKS = (1, 2, 3, 4, 5, 8, 16, 64)
EXACT_MOMENTUM_RANKS = (1, 2, 3, 4, 5, 7, 8)
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
    from lozo_kernels.backends.triton.launcher import Launcher

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
        row_stride = cols + step * rng.choice((0, 0, 1, 3))
        batch_stride = rows * row_stride + step * rng.choice((0, 2))
        lead = step * rng.choice((0, 1, 2))
        self.aligned = aligned
        self.layout = (shape, (batch_stride, row_stride, 1), lead)
        storage = torch.full((lead + batch * batch_stride + 32,), float("nan"), dtype=dtype)
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
    from lozo_kernels.backends.triton import backend as module
    from lozo_kernels.backends.triton.plans import Target

    monkeypatch.setattr(module, "_target", lambda device: Target(dp4a=False, eights=True, emulate=True))
    example = Example(rng, case, rng.choice(EXACT_MOMENTUM_RANKS), "momentum" in op)
    example.run(op, backend, random_call(rng, "momentum" in op))
    example.check("storage")


def test_small_tensors_share_a_launch(rng):
    backend = TritonBackend(recorder(), sizes=SIZES)
    example = Example(rng, (True, (1, 33, 72), torch.bfloat16), 2, False)
    example.run("lowrank_update_", backend, random_call(rng))
    example.check("storage")
    assert backend.launcher.last.constants["WEIGHT"] is None


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
