"""Run as a process of its own: compares prepared launches with those that Triton makes itself, over random calls of layers."""

import dataclasses
import math
import random
import sys

import torch
from triton import knobs

from bench import stub
from lozo_kernels.kernels.backends.triton import TritonBackend
from lozo_kernels.kernels.backends.triton.launcher import Launcher
from lozo_kernels.kernels.calls import Draw, LayerCall, Rounding, TableCall
from lozo_kernels.kernels.ops import OPS
from lozo_kernels.kernels.table import TensorTable

MADE = []
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Direct(Launcher):
    """Launches that Triton makes itself. Nothing can be prepared, since they return no kernel."""

    def run(self, plan, programs, arguments):
        super().run(plan, programs, arguments)


def strided(rng, rows, cols, dtype):
    """A matrix of any alignment and row stride."""
    stride = cols + rng.choice((0, 0, 0, 8, 3))
    storage = torch.zeros(rows * stride + 16, dtype=dtype)
    return storage.as_strided((rows, cols), (stride, 1), rng.choice((0, 0, 0, 1, 8)))


def any_call(rng):
    """A call of a layer of a few shapes, and whether it looks rows up."""
    lookup, transposed = rng.random() < 0.3, rng.random() < 0.3
    groups, rank = rng.choice((1, 1, 2)), rng.choice((2, 4))
    tokens = groups * rng.choice((1, 5, 64, 300))
    rows, cols = rng.choice((16, 24, 1, 5120)), rng.choice((16, 640, 33))
    inner, outer = (rows, cols) if transposed or lookup else (cols, rows)
    y, x = strided(rng, tokens, outer, rng.choice(FLOATS)), strided(rng, tokens, inner, rng.choice(FLOATS))
    if lookup:
        x = torch.zeros(tokens, dtype=rng.choice((torch.int64, torch.int32)))
    draws, scales = torch.zeros(groups + 1, 2, dtype=torch.int64), torch.zeros(groups + 1)
    first = rng.choice((0, 1))  # one evaluation of several: addresses that are not aligned
    call = LayerCall(
        y,
        x,
        torch.zeros(rank, cols, dtype=torch.float16),
        torch.zeros(rows, rank),
        rng.choice((0, 1, 16, rng.getrandbits(64))),
        rng.choice((0, 1, rng.getrandbits(32))),
        rng.choice((0, 1, 16, rng.getrandbits(20))),
        draws[first : first + groups],
        scales[first : first + groups],
        transposed=transposed and not lookup,
        gain=rng.choice((None, torch.zeros(1))),
        shift=None if lookup else rng.choice((None, torch.zeros(groups, outer))),
    )
    return call, lookup


def one_thing_at_a_time(call, lookup):
    """Calls that differ from a call in one respect: address, strides, dtype, shape, what is given, number of evaluations."""
    y, x, rank, groups = call.y, call.x, len(call.v), len(call.draws)

    def other(t, dtype=None, more=0, offset=0):
        rows, cols = t.shape
        stride, storage = cols + more, torch.zeros(rows * (cols + more) + offset, dtype=dtype or t.dtype)
        return storage.as_strided((rows, cols), (stride, 1), offset)

    def change(**fields):
        return dataclasses.replace(call, **fields)

    outs = [other(y), other(y, more=8), other(y, more=3), other(y, offset=1), *(other(y, dtype) for dtype in FLOATS)]
    ins = [x.int(), x.clone()] if lookup else [other(x), other(x, more=8), other(x, more=3), other(x, offset=1)]
    ins += [] if lookup else [other(x, dtype) for dtype in FLOATS]
    half = [dataclasses.replace(call, y=y[: 2 * groups], x=x[: 2 * groups])] if len(y) >= 2 * groups else []
    shifts = [] if lookup else [change(shift=None), change(shift=torch.zeros(groups, y.shape[1]))]
    turned = [] if lookup or x.shape[1] != y.shape[1] else [change(transposed=not call.transposed)]
    b = torch.zeros(len(call.b) + 1, rank)
    return [
        *(change(y=t) for t in outs),
        *(change(x=t) for t in ins),
        *half,
        *shifts,
        *turned,
        *([change(b=b)] if lookup else []),
        change(gain=None),
        change(gain=torch.zeros(1)),
        change(gain=torch.zeros(2)[1:]),
        change(scales=torch.zeros(groups + 1)[1:]),
        change(b=torch.zeros(call.b.numel() + 1)[1:].view(call.b.shape)),
    ]


def launched(backend, call, lookup):
    """What the driver gets to launch, with tensors as their addresses; the scratch memory between two launches is new each time."""
    MADE.clear()
    (backend.lowrank_embedding_ if lookup else backend.lowrank_linear_)(call)
    given = (call.y, call.x, call.v, call.b, call.draws, call.scales, call.gain, call.shift)
    known = {t.data_ptr() for t in given if t is not None}
    found = []
    for kernel, programs, arguments in MADE:
        plain = [
            ("scratch" if t.data_ptr() not in known else t.data_ptr(), t.dtype, t.shape if t.data_ptr() not in known else ())
            if isinstance(t, torch.Tensor)
            else t
            for t in arguments
        ]
        found.append((kernel.variant, programs, plain))
    return found


def any_pass(rng):
    """A table and a call of an op over it, whose scalars lie anywhere."""
    op = rng.choice([op for op in OPS.values() if not op.summed])
    count, rank, dtype = rng.choice((1, 2)), rng.choice((1, 4, 32)), rng.choice(FLOATS)
    x = [torch.zeros(1, 16, 64, dtype=dtype) for _ in range(count)]
    v = [torch.zeros(1, rank, 64, dtype=torch.float16) for _ in x] if op.v else None
    n = [torch.zeros(1, 16, rank if op.along_rows else 64) for _ in x] if op.n != "none" else None
    if op.factors:
        x = [torch.zeros(1, 16, rank) for _ in x]
    table = TensorTable(x, list(range(count)), v=v, n=n)
    out = TensorTable([torch.zeros_like(t) for t in x], [0] * count) if op.out and rng.random() < 0.5 else table if op.out else None
    draws = rng.randint(*op.draws)

    def scalars(*shape):
        offset = rng.choice((0, 1))
        return torch.zeros(offset + math.prod(shape))[offset:].view(shape)

    calls = []
    for _ in range(4):
        rounding = rng.choice((None, Rounding(1))) if op.rounding else None
        call = TableCall(7, [Draw(3, d) for d in range(draws)], scalars(draws, count), None, rounding, out=out)
        call.decay = rng.choice((None, scalars(count)))
        if op.momentum:
            call.coefficients, call.alpha, call.beta = scalars(draws, count), scalars(count), scalars(count)
        calls.append(call)
    return op, table, calls


def passed(backend, op, table, call):
    """What the driver gets to launch, with tensors as what their kernel is compiled for."""
    MADE.clear()
    backend.run(op, table, call)
    return [
        (kernel.variant, programs, [(t.dtype, t.data_ptr() & 15) if isinstance(t, torch.Tensor) else t for t in arguments])
        for kernel, programs, arguments in MADE
    ]


def check_passes(rng):
    """Passes over tables are prepared too, once for each table."""
    prepared = TritonBackend(Launcher())
    for _ in range(60):
        op, table, calls = any_pass(rng)
        for call in calls * 2:
            fresh = TensorTable(table.x, table.tensor_ids, v=table.v, n=table.n)
            again = dataclasses.replace(call, out=fresh if call.out is table else call.out)
            assert passed(prepared, op, table, call) == passed(TritonBackend(Direct()), op, fresh, again)


def main():
    stub.install(lambda *launch: MADE.append(launch))
    seed = random.getrandbits(32)
    print("seed", seed)
    rng = random.Random(seed)
    prepared, direct = TritonBackend(Launcher()), Direct()
    by_triton = []
    run = Launcher.run

    def counted(self, *arguments):
        by_triton.append(arguments)
        return run(self, *arguments)

    Launcher.run = counted
    some = [any_call(rng) for _ in range(40)]
    check_passes(rng)
    calls = some + [(other, lookup) for call, lookup in some for other in one_thing_at_a_time(call, lookup)]
    for call, lookup in calls + calls:
        assert launched(prepared, call, lookup) == launched(TritonBackend(direct), call, lookup)
    assert prepared.launcher.launches == direct.launches
    by_triton.clear()
    for call, lookup in calls:
        launched(prepared, call, lookup)
    assert not by_triton, "a call of a known shape was not prepared"

    seen = []
    hook = lambda *args: seen.append(args)  # noqa: E731
    call, lookup = calls[0]
    knobs.runtime.launch_enter_hook.add(hook)
    launched(prepared, call, lookup)
    assert len(by_triton) == 2
    knobs.runtime.launch_enter_hook.remove(hook)
    before, knobs.runtime.launch_exit_hook = knobs.runtime.launch_exit_hook, hook
    launched(prepared, call, lookup)
    assert len(by_triton) == 4
    knobs.runtime.launch_exit_hook = before
    launched(prepared, call, lookup)
    assert len(by_triton) == 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
