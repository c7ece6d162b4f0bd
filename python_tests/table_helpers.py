"""Random tables of awkward tensors whose surroundings are poisoned, for tests of the ops."""

import torch

from lozo_kernels import TensorTable, noise
from lozo_kernels.table import DTYPES

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half the distance from 1 to the next value: the relative error of rounding to nearest."""


def strided(rng, shape, dtype):
    """A random (batch, rows, cols) tensor inside NaN-poisoned storage, with gaps between rows and between matrices."""
    batch, rows, cols = shape
    row_gap, batch_gap, lead = rng.choice((0, 0, 1, 3, 8)), rng.choice((0, 0, 5)), rng.choice((0, 0, 1, 2))
    row_stride = cols + row_gap
    batch_stride = rows * row_stride + batch_gap
    storage = torch.full((lead + batch * batch_stride + 64,), float("nan"), dtype=dtype)
    x = torch.as_strided(storage, shape, (batch_stride, row_stride, 1), lead)
    x.copy_(torch.randn(shape) * 0.1)
    return x, storage


def random_shape(rng):
    return (rng.choice((1, 1, 1, 2, 3)), rng.choice((0, 1, 2, 5, 16, 33, 70)), rng.choice((0, 1, 3, 8, 17, 64, 131)))


class Case:
    """A table, copies of what it held, and its storages."""

    def __init__(self, rng, rank, *, momentum=False, count=5, dtypes=DTYPES, shapes=None):
        shapes = shapes or [random_shape(rng) for _ in range(count)]
        pairs = [strided(rng, shape, rng.choice(dtypes)) for shape in shapes]
        self.storages = [storage for _, storage in pairs]
        xs = [x for x, _ in pairs]
        self.ids = [rng.getrandbits(32) for _ in xs]
        self.row_offsets = [rng.choice((0, 0, 7, 1000)) for _ in xs]
        self.col_offsets = [rng.choice((0, 0, 5, 64)) for _ in xs]
        self.global_cols = [x.shape[2] + c + rng.choice((0, 3)) for x, c in zip(xs, self.col_offsets, strict=True)]
        vs = ns = None
        if rank:
            vs = [noise.to_grid(torch.randn(x.shape[0], rank, x.shape[2])).half() for x in xs]
        if momentum:
            ns = [torch.randn(*x.shape[:2], rank or x.shape[2]) for x in xs]
        self.table = TensorTable(
            xs, self.ids, v=vs, n=ns, row_offsets=self.row_offsets, col_offsets=self.col_offsets, global_cols=self.global_cols
        )

    def copy(self):
        """The same case on storage of its own."""
        other = object.__new__(Case)
        other.storages = [s.clone() for s in self.storages]
        xs = [
            torch.as_strided(s, x.shape, x.stride(), x.storage_offset()) for s, x in zip(other.storages, self.table.x, strict=True)
        ]
        clone = lambda ts: None if ts is None else [t.clone() for t in ts]  # noqa: E731
        other.table = TensorTable(
            xs,
            self.ids,
            v=clone(self.table.v),
            n=clone(self.table.n),
            row_offsets=self.row_offsets,
            col_offsets=self.col_offsets,
            global_cols=self.global_cols,
        )
        return other


def raw(t):
    """Bits, with every NaN made the same."""
    t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
    return t.contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16)


def assert_same_bits(a, b):
    """All storage of two cases, gaps included, and their factors and momentum."""
    for name in ("storages", "v", "n"):
        first, second = (c.storages if name == "storages" else getattr(c.table, name) for c in (a, b))
        for t, (p, q) in enumerate(zip(first or (), second or (), strict=True)):
            assert torch.equal(raw(p), raw(q)), f"{name}[{t}] of {tuple(a.table.x[t].shape)} {a.table.x[t].dtype} differs"
