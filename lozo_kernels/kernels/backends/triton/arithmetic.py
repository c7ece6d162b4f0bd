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
