"""One rounding: the fused multiply-add of the reference and of Triton's interpreter is the instruction of the CPU, in bits."""

import ctypes
import ctypes.util
import math
from fractions import Fraction

import pytest
import torch

from lozo_kernels.bench.cases import as_bits
from lozo_kernels.kernels import ops, reference
from lozo_kernels.kernels.backends import native
from lozo_kernels.kernels.backends.triton import TritonBackend
from lozo_kernels.kernels.registry import choose_backend
from lozo_kernels.kernels.table import TensorTable

NATIVE = choose_backend("cpu").backend
ISAS = native.supported_isas() if isinstance(NATIVE, native.NativeBackend) else []
INTERPRETED = TritonBackend().unavailable(torch.device("cpu")) is None

if INTERPRETED:
    import triton
    import triton.language as tl

    from lozo_kernels.kernels.backends.triton.arithmetic import fma

    @triton.jit
    def fused(a, b, c, y, count, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        mask = at < count
        tl.store(y + at, fma(tl.load(a + at, mask=mask), tl.load(b + at, mask=mask), tl.load(c + at, mask=mask), True), mask=mask)


LARGEST = torch.finfo(torch.float32).max
TINY = 2.0**-149
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    math.inf,
    -math.inf,
    math.nan,
    LARGEST,
    -LARGEST,
    2.0**-126,
    TINY,
    -TINY,
    0.5 * LARGEST,
    1.5,
    2.0**-75,
]


def same_bits(x, y):
    """Equal in every bit; any NaN equals any other."""
    return torch.equal(as_bits(torch.where(x.isnan(), 0.0, x)), as_bits(torch.where(y.isnan(), 0.0, y))) and torch.equal(
        x.isnan(), y.isnan()
    )


def instruction(a, b, c):
    """What the C library's fmaf returns, which is the CPU's instruction where it has one."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6").fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, (ctypes.c_float,) * 3
    return torch.tensor([fmaf(*row) for row in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], dtype=torch.float32)


def random_floats(count, low=-20, high=20):
    """Floats with random signs and mantissas, and exponents from low to high."""
    mantissas = torch.randint(1 << 23, 1 << 24, (count,)).float() * 2.0**-23
    exponents = torch.randint(low, high + 1, (count,)).double()
    signs = torch.randint(2, (count,)) * 2 - 1
    return (mantissas.double() * 2.0**exponents * signs).float()


def any_bits(count):
    """Any bit patterns, with all kinds of NaN, infinities and subnormals."""
    return torch.randint(-(1 << 31), 1 << 31, (count,)).to(torch.int32).view(torch.float32)


def near_ties(count, b_bits=23):
    """Sums at or next to the middle of two fp32: products of half a unit in the last place of c, or next to it."""
    c = random_floats(count, -3, 3)
    unit = 2.0 ** (torch.frexp(c).exponent.double() - 25)
    off = torch.randint(-1, 2, (count,)).double() * 2.0**-b_bits
    shift = 2.0 ** torch.randint(-10, 11, (count,)).double()
    a, b = unit * shift * (1 + off), (torch.randint(2, (count,)) * 2 - 1) / shift * (1 - off)
    return a.float(), b.float(), c


def cancelling(count):
    """c is the rounded product with the other sign: what is left is the rounding error of the product."""
    a, b = random_floats(count), random_floats(count)
    return a, b, -(a * b)


def small(count):
    """Results among the subnormals, at their edge, and below the least of them."""
    a, b = random_floats(count, -80, -60), random_floats(count, -78, -55)
    c = torch.randint(-(1 << 24), 1 << 24, (count,)).double() * 2.0**-149 * torch.randint(2, (count,))
    return a, b, c.float()


def large(count):
    """Results on both sides of the largest fp32."""
    return random_floats(count, 60, 66), random_floats(count, 58, 64), random_floats(count, 120, 127)


def special(_):
    values = torch.tensor(SPECIAL)
    return tuple(x.flatten() for x in torch.meshgrid(values, values, values, indexing="ij"))


KINDS = {
    "ordinary": lambda n: tuple(random_floats(n) for _ in range(3)),
    "any bits": lambda n: tuple(any_bits(n) for _ in range(3)),
    "near ties": near_ties,
    "cancelling": cancelling,
    "small": small,
    "large": large,
    "special": special,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_instruction(rng, kind):
    a, b, c = KINDS[kind](20_000)
    assert same_bits(reference.fma(a, b, c), instruction(a, b, c))


@pytest.mark.parametrize("kind", ["ordinary", "near ties", "cancelling", "small"])
def test_the_reference_rounds_the_exact_sum_once(rng, kind):
    """By fractions, without a float on the way: no other fp32 is nearer, and at a tie the last bit is even."""
    a, b, c = KINDS[kind](500)
    y = reference.fma(a, b, c)
    below, above = torch.nextafter(y, torch.tensor(-math.inf)), torch.nextafter(y, torch.tensor(math.inf))
    for i in range(len(y)):
        exact = Fraction(a[i].item()) * Fraction(b[i].item()) + Fraction(c[i].item())
        error = abs(exact - Fraction(y[i].item()))
        others = [abs(exact - Fraction(x[i].item())) for x in (below, above)]
        assert error <= min(others)
        assert error < min(others) or int(as_bits(y[i : i + 1])) % 2 == 0


def test_two_roundings_are_something_else(rng):
    """The inputs tell one rounding from two, and from a sum in fp64 that is rounded again."""
    a, b, c = near_ties(20_000)
    once = reference.fma(a, b, c)
    assert not torch.equal(once, (a.double() * b.double() + c.double()).float())
    a, b, c = KINDS["ordinary"](20_000)
    assert not torch.equal(reference.fma(a, b, c), a * b + c)


def test_bounds_are_computed_in_fp64(rng):
    a, b, c = (torch.randn(50, dtype=torch.float64) for _ in range(3))
    assert torch.equal(reference.fma(a, b, c), a * b + c)


def merged(a, b, c, backend):
    """fma(a, b, c) by a merge of rank 2 into zeros: c * 1 rounded, then a * b added, for b that fp16 holds."""
    cols = len(b)
    n = torch.stack([c, a], -1).unsqueeze(0)
    v = torch.stack([torch.ones(cols), b]).half().unsqueeze(0)
    table = TensorTable([torch.full((1, len(a), cols), -0.0)], [0], v=[v], n=[n])
    ops.lowrank_merge_(table, seed=0, backend=backend)
    return table.x[0][0]


@pytest.mark.parametrize("kind", ["ordinary", "any bits", "near ties", "small", "special"])
@pytest.mark.parametrize("backend", ["eager", *ISAS])
def test_backends_round_once(rng, backend, kind):
    """Every instruction set, in all of its paths for rows and columns."""
    rows, cols = 61, 75
    a, b, c = (x[torch.randperm(len(x))] for x in (near_ties(3000, 10) if kind == "near ties" else KINDS[kind](3000)))
    a, b, c = a[:rows], b[:cols].half().float(), c[:rows]
    if backend != "eager":
        native.set_isa(backend)
    try:
        found = merged(a, b, c, choose_backend("cpu", "eager").backend if backend == "eager" else NATIVE)
    finally:
        if backend != "eager":
            native.set_isa(None)
    grid = [x.flatten() for x in (a[:, None].expand(rows, cols), b.expand(rows, cols), c[:, None].expand(rows, cols))]
    assert same_bits(found.flatten(), instruction(*grid))


@pytest.mark.skipif(not INTERPRETED, reason="Triton is not interpreted here")
@pytest.mark.parametrize("kind", KINDS)
def test_the_interpreter_is_the_instruction(rng, kind):
    a, b, c = (x.contiguous() for x in KINDS[kind](4000))
    y = torch.empty_like(a)
    fused[(1,)](a, b, c, y, len(a), SIZE=4096)
    assert same_bits(y, instruction(a, b, c))
