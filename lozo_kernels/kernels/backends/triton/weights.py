"""Functions that read weights as fp32 and write them back, rounded to nearest even or stochastically.

All access to weights is in this file. EMULATE is for the interpreter, whose bf16 conversions truncate: there the bits are made by
hand. Where WEIGHT is None, the dtype is given by a code at run time, and an address and an offset stand in place of a pointer.
"""

import triton
import triton.language as tl


@triton.jit
def read_weights(pointer, mask):
    """Loads weights in their own dtype, for :func:`as_fp32`. Values outside of the mask are undefined."""
    return tl.load(pointer, mask=mask)


@triton.jit
def read_bf16_pairs(pointer, offset, mask, COUNT: tl.constexpr):
    """Loads COUNT bf16 weights from the aligned ``pointer + offset`` as fp32, two to a word, which takes one instruction for each.

    ``mask`` is over the (COUNT / 2,) pairs, or None.
    """
    words = pointer.to(tl.pointer_type(tl.uint32)) + offset // 2 + tl.arange(0, COUNT // 2)
    pairs = tl.load(words, mask=mask)
    return tl.join(pairs << 16, pairs & 0xFFFF0000).reshape(COUNT).to(tl.float32, bitcast=True)


@triton.jit
def as_fp32(x, EMULATE: tl.constexpr):
    """Converts loaded weights to fp32."""
    if EMULATE and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def store_weights(pointer, y, mask, EMULATE: tl.constexpr):
    """Rounds fp32 to nearest even into the dtype of the pointer, and stores it."""
    if EMULATE and pointer.dtype.element_ty == tl.bfloat16:
        u = y.to(tl.uint32, bitcast=True)
        rounded = u + 0x7FFF + ((u >> 16) & 1)
        quiet = u | 0x00400000
        u = tl.where((u & 0x7FFFFFFF) > 0x7F800000, quiet, rounded)
        tl.store(pointer, (u >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, y.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def read_any(address, offset, mask, code, EMULATE: tl.constexpr):
    """Loads weights, whose dtype has the code ``code`` (``table.DTYPES``), from ``offset`` elements after an address, as fp32."""
    if code == 0:
        y = tl.load(address.to(tl.pointer_type(tl.float32)) + offset, mask=mask, other=0.0)
    elif code == 1:
        y = as_fp32(tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offset, mask=mask), EMULATE)
    else:
        y = as_fp32(tl.load(address.to(tl.pointer_type(tl.float16)) + offset, mask=mask), EMULATE)
    return y


@triton.jit
def store_any(address, offset, y, bits, mask, code, STOCHASTIC: tl.constexpr, EMULATE: tl.constexpr):
    """Rounds fp32 and stores it where :func:`read_any` would load it; ``bits`` as for :func:`store_stochastic`."""
    if code == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offset, y, mask=mask)
    elif code == 1:
        if STOCHASTIC:
            store_stochastic(address.to(tl.pointer_type(tl.bfloat16)) + offset, y, bits, mask)
        else:
            store_weights(address.to(tl.pointer_type(tl.bfloat16)) + offset, y, mask, EMULATE)
    else:
        if STOCHASTIC:
            store_stochastic(address.to(tl.pointer_type(tl.float16)) + offset, y, bits, mask)
        else:
            store_weights(address.to(tl.pointer_type(tl.float16)) + offset, y, mask, EMULATE)


@triton.jit
def store_stochastic(pointer, y, bits, mask):
    """Rounds as reference.round_stochastic into the pointer's dtype, bf16 or fp16, and stores. ``bits``: uint32 below 2^16."""
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


@triton.jit
def read_activations(pointer, mask):
    """Loads like :func:`read_weights`, with zero outside of the mask."""
    return tl.load(pointer, mask=mask, other=0.0)
