"""Reading weights as fp32 and writing them back, rounded to nearest or stochastically.

EMULATE is for the interpreter, whose bf16 conversions truncate: there the bits are made by hand.
"""

import triton
import triton.language as tl


@triton.jit
def as_fp32(x, EMULATE: tl.constexpr):
    """fp32 of weights that were read."""
    if EMULATE and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def store_weights(pointer, y, mask, EMULATE: tl.constexpr):
    """Rounds fp32 to nearest even into the dtype of the pointer."""
    if EMULATE and pointer.dtype.element_ty == tl.bfloat16:
        u = y.to(tl.uint32, bitcast=True)
        rounded = u + 0x7FFF + ((u >> 16) & 1)
        quiet = u | 0x00400000
        u = tl.where((u & 0x7FFFFFFF) > 0x7F800000, quiet, rounded)
        tl.store(pointer, (u >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, y.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_stochastic(pointer, y, bits, mask):
    """reference.round_stochastic into the dtype of the pointer, bf16 or fp16; ``bits`` is uint32 below 2^16."""
    u = y.to(tl.uint32, bitcast=True)
    magnitude = u & 0x7FFFFFFF
    finite = magnitude < 0x7F800000
    if pointer.dtype.element_ty == tl.bfloat16:
        special = tl.where(magnitude > 0x7F800000, u | 0x00400000, u)
        u = tl.where(finite, u + bits, special)
        tl.store(pointer, (u >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        normal = tl.where(finite, (u + (bits >> 3)) & 0xFFFFE000, u)
        # Below 2^-14 fp16 has a fixed grid of 2^-24: count its steps, with 16 more bits to round by.
        small = magnitude < 0x38800000
        size = tl.where(small, magnitude, 0).to(tl.float32, bitcast=True)
        steps = ((size * 1099511627776.0).to(tl.uint32) + bits) >> 16
        grid = (steps.to(tl.float32) * 5.9604644775390625e-08).to(tl.uint32, bitcast=True) | (u & 0x80000000)
        rounded = tl.where(small, grid, normal).to(tl.float32, bitcast=True)
        tl.store(pointer, rounded.to(tl.float16), mask=mask)
