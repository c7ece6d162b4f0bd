"""Shapes of every kind, a comparison of cases that says what differs, and products of activations, for tests of the ops."""

import torch

from lozo_kernels.bench.cases import compare, storage_of, strided
from lozo_kernels.kernels import noise, skinny
from lozo_kernels.kernels.table import DTYPES
from python_tests.truth import evaluate_product, product_bound


def random_shape(rng):
    return (rng.choice((1, 1, 1, 2, 3)), rng.choice((0, 1, 2, 5, 16, 33, 70)), rng.choice((0, 1, 3, 8, 17, 64, 131)))


def random_shapes(rng, count=5):
    return [random_shape(rng) for _ in range(count)]


def shapes_for(rng, backend, count=5):
    """As :func:`random_shapes`, of which Triton's interpreter gets two: it takes 30 ms a program."""
    return random_shapes(rng, 2 if backend.name == "triton" else count)


def assert_same(got, want, what=""):
    """Checks that two cases have the same bits in all storage, gaps included, and in V and N."""
    wrong = [tensor.text for tensor in compare(got, want) if tensor.wrong]
    assert not wrong, f"{what} {want.op.name} {want.call}: {wrong}"


class Product:
    """A call of ``lowrank_linear_`` or ``lowrank_embedding_``, and the bound that its result keeps to.

    Args:
        device: where the backend works; everything else is done on the CPU.
        split: what the backend may be off by besides, of the size of the terms, because it splits fp32 into parts.
    """

    def __init__(
        self,
        rng,
        *,
        rank,
        tokens,
        rows,
        cols,
        groups=1,
        transposed=False,
        lookup=False,
        dtypes=None,
        device="cpu",
        split=0.0,
    ):
        y_dtype, x_dtype = dtypes or (rng.choice(DTYPES), rng.choice(DTYPES))
        inputs, outputs = (rows, cols) if transposed else (cols, rows)
        outputs = cols if lookup else outputs
        self.y = strided(rng, (1, tokens, outputs), y_dtype)[0]
        self.x = strided(rng, (1, tokens, inputs), x_dtype)[0]
        if lookup:
            self.x = torch.randint(rows, (tokens,), dtype=rng.choice((torch.int32, torch.int64)))
        self.v = noise.to_grid(torch.randn(rank, cols)).half()
        self.b = torch.randn(rows, rank) * rng.choice((0, 10 ** rng.uniform(-2, 1)))
        offset = rng.choice((0, 5, 1000, (1 << 32) - rows))
        self.place = {"seed": rng.getrandbits(64), "tensor_id": rng.getrandbits(32), "row_offset": offset}
        self.draws = torch.tensor([[rng.getrandbits(28), rng.choice((0, 3, rng.getrandbits(24)))] for _ in range(groups)])
        self.scales = torch.randn(groups) * rng.choice((0, 0.1, 1))
        self.gain = rng.choice((None, torch.rand(1)))
        self.shift = None if lookup else rng.choice((None, torch.randn(groups, outputs)))
        self.transposed, self.lookup, self.device, self.split = transposed, lookup, device, split

    def run(self, backend):
        """Makes the call on copies; returns y afterwards, in storage of its own with the same layout."""

        def moved(t):
            return t if t is None else storage_of(t).to(self.device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())

        y, x, v, b = (moved(t) for t in (self.y, self.x, self.v, self.b))
        call = {"draws": moved(self.draws), "scales": moved(self.scales), "gain": moved(self.gain), "backend": backend} | self.place
        if self.lookup:
            skinny.lowrank_embedding_(y, x, v, b, **call)
        else:
            skinny.lowrank_linear_(y, x, v, b, transposed=self.transposed, shift=moved(self.shift), **call)
        return storage_of(y).cpu().as_strided(y.shape, y.stride(), y.storage_offset())

    def check(self, backend, what=""):
        """Checks that y is within its bound of the truth, and that nothing beside y was written."""
        y = self.run(backend)
        exact, bound = product_bound(self)
        bound = bound + self.split * evaluate_product(self, lambda t: t.double().abs())
        overflows = (y.dtype == torch.float16) & (exact.abs() + bound > 6e4)
        assert (((y.double() - exact).abs() <= bound) | overflows).all(), f"{what}: {vars(self)}"
        mask = torch.ones_like(storage_of(y), dtype=torch.bool)
        mask.as_strided(y.shape, y.stride(), y.storage_offset()).fill_(False)
        assert storage_of(y)[mask].isnan().all(), f"{what}: something beside y was written"
