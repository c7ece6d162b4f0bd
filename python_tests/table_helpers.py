"""Random tables of awkward tensors whose surroundings are poisoned, and random products, for tests of the ops."""

import torch

from lozo_kernels import TensorTable
from lozo_kernels.kernels import noise, reference, skinny
from lozo_kernels.kernels.table import DTYPES

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

    def elsewhere(self, rng):
        """Weights of the same shapes with strides of their own, everything about them NaN."""
        other = object.__new__(Case)
        pairs = [strided(rng, x.shape, x.dtype) for x in self.table.x]
        other.storages = [storage.fill_(float("nan")) for _, storage in pairs]
        other.ids, other.row_offsets, other.col_offsets, other.global_cols = self.ids, (), (), ()
        other.table = TensorTable([x for x, _ in pairs], self.ids)
        return other


class Product:
    """A call of ``lowrank_linear_`` or ``lowrank_embedding_``, and the bound that its result keeps to."""

    def __init__(self, rng, *, rank, tokens, rows, cols, groups=1, transposed=False, lookup=False, dtypes=None):
        y_dtype, x_dtype = dtypes or (rng.choice(DTYPES), rng.choice(DTYPES))
        inputs, outputs = (rows, cols) if transposed else (cols, rows)
        outputs = cols if lookup else outputs
        self.y, self.storage = strided(rng, (1, tokens, outputs), y_dtype)
        self.y = self.y[0]
        self.x = strided(rng, (1, tokens, inputs), x_dtype)[0][0]
        if lookup:
            self.x = torch.randint(rows, (tokens,), dtype=rng.choice((torch.int32, torch.int64)))
        self.v = noise.to_grid(torch.randn(rank, cols)).half()
        self.b = torch.randn(rows, rank) * rng.choice((0, 1))
        self.place = {"seed": rng.getrandbits(64), "tensor_id": rng.getrandbits(32), "row_offset": rng.choice((0, 5, 1000))}
        self.draws = torch.tensor([[rng.getrandbits(28), rng.choice((0, 3))] for _ in range(groups)])
        self.scales = torch.randn(groups) * rng.choice((0, 0.1, 1))
        self.gain = rng.choice((None, torch.rand(1)))
        self.shift = None if lookup else rng.choice((None, torch.randn(groups, outputs)))
        self.transposed, self.lookup = transposed, lookup

    def run(self, backend):
        """What the storage of y holds afterwards; y itself stays as it is."""
        storage = self.storage.clone()
        y = torch.as_strided(storage, self.y.shape, self.y.stride(), self.y.storage_offset())
        call = {"draws": self.draws, "scales": self.scales, "gain": self.gain, "backend": backend} | self.place
        if self.lookup:
            skinny.lowrank_embedding_(y, self.x, self.v, self.b, **call)
        else:
            skinny.lowrank_linear_(y, self.x, self.v, self.b, transposed=self.transposed, shift=self.shift, **call)
        return storage

    def check(self, backend, what=""):
        """Every sum within as many fp32 roundings of its terms as it has, and one rounding into y; nothing beside y written."""
        storage = self.run(backend)
        y = torch.as_strided(storage, self.y.shape, self.y.stride(), self.y.storage_offset()).double()
        exact, size = (self._evaluate(function) for function in (lambda t: t.double(), lambda t: t.double().abs()))
        terms = len(self.v) + 6 + (0 if self.lookup else self.x.shape[1])
        bound = terms * UNIT[torch.float32] * size + 1.01 * UNIT[self.y.dtype] * exact.abs() + 2.0**-24
        assert ((y - exact).abs() <= bound).all(), f"{what}: y {tuple(self.y.shape)} {self.y.dtype}, x {self.x.dtype}, {vars(self)}"
        mask = torch.ones_like(storage, dtype=torch.bool)
        torch.as_strided(mask, self.y.shape, self.y.stride(), self.y.storage_offset()).fill_(False)
        assert storage[mask].isnan().all(), f"{what}: something beside y was written"

    def _evaluate(self, view):
        """The exact result, or with absolute values the size of its terms."""
        size = len(self.y) // len(self.draws)
        parts = []
        for g, (step, direction) in enumerate(self.draws.tolist()):
            tokens = slice(g * size, (g + 1) * size)
            u = noise.factor(
                self.place["seed"],
                *self.b.shape,
                self.place["tensor_id"],
                step,
                row_offset=self.place["row_offset"],
                direction=direction,
            )
            y, v, f = view(self.y[tokens]), view(self.v), view(self.b) + view(self.scales[g]) * view(u)
            gain, shift = (None if t is None else view(t) for t in (self.gain, None if self.shift is None else self.shift[g]))
            if self.lookup:
                parts.append(reference.lowrank_embedding(y, self.x[tokens].long(), v, f, gain=gain, dtype=torch.float64))
                continue
            parts.append(
                reference.lowrank_linear(
                    *(y, view(self.x[tokens]), v, f), transposed=self.transposed, gain=gain, shift=shift, dtype=torch.float64
                )
            )
        return torch.cat(parts)


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
