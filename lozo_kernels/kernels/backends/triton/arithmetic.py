"""Products that are rounded by themselves, whatever comes after them."""

import triton
import triton.language as tl

from .versions import fuses_pairs

_SEPARATE = tl.constexpr(fuses_pairs(triton.__version__))


@triton.jit
def times(a, b, DP4A: tl.constexpr):
    """Returns a * b, fp32, for a sum. DP4A: the target is one of NVIDIA's.

    From compute capability 10.0 on, LLVM multiplies and adds two numbers with one instruction, and the assembler of earlier
    versions of Triton makes one fused multiply-add of such a product and a sum, although it is told not to. Of a product in
    assembly it does not.
    """
    if _SEPARATE and DP4A:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return a * b


@triton.jit
def fma(a, b, c, EMULATE: tl.constexpr):
    """Returns a * b + c rounded once, as ``reference.fma`` does. Interpreters of some versions of Triton round ``tl.fma`` twice."""
    if EMULATE:
        product = a.to(tl.float64) * b.to(tl.float64)
        c = c.to(tl.float64)
        total = product + c
        part = total - product
        error = (product - (total - part)) + (c - part)
        bits = total.to(tl.int64, bitcast=True)
        towards = tl.where((error > 0) == (total > 0), 1, -1)
        to_odd = tl.where((tl.abs(error) > 0) & ((bits & 1) == 0), bits + towards, bits)
        return to_odd.to(tl.float64, bitcast=True).to(tl.float32)
    return tl.fma(a, b, c)
