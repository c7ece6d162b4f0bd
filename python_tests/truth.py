"""What a call of an op has to make of a case, by ``reference.py`` and with noise that is placed here, row by row.

No code of a backend is used, so that the eager one is held to this too.
"""

import functools

import torch

from lozo_kernels.bench.cases import UNIT, storage_of
from lozo_kernels.kernels import noise, reference
from lozo_kernels.kernels.calls import Draw

F64 = torch.float64


def left_factor(table, t, seed, draw, rank):
    """Makes U of a tensor: (batch, rows, rank) fp32."""
    batch, rows, _ = table.x[t].shape
    where = {"row_offset": table.row_offsets[t], "direction": draw.direction}
    return noise.factor(seed, batch * rows, rank, table.tensor_ids[t], int(draw.step), **where).view(batch, rows, rank)


def right_factor(table, t, seed, window):
    """Makes V of a tensor in a window, transposed: (batch, rank, cols) fp16."""
    batch, _, cols = table.x[t].shape
    starts = [table.col_offsets[t] + b * table.global_cols[t] for b in range(batch)]
    made = [noise.factor(seed, cols, table.rank, table.tensor_ids[t], window, stream="V", row_offset=start) for start in starts]
    return torch.stack(made).transpose(1, 2).half()


def by_row(table, t, make, seed, step, direction):
    """Makes the noise of every element of a tensor, in its shape."""
    batch, rows, cols = table.x[t].shape
    starts = [(table.row_offsets[t] + i) * table.global_cols[t] + table.col_offsets[t] for i in range(batch * rows)]
    made = [make(seed, cols, table.tensor_ids[t], int(step), offset=start, direction=direction) for start in starts]
    return torch.stack(made).view(batch, rows, cols)


def part_signs(case, t):
    """Makes the signs of a tensor's rows and columns for each part: (parts, batch, rows) and (parts, batch, cols) fp32."""
    table, (draw,), (batch, rows, cols) = case.table, case.call["draws"], case.table.x[t].shape

    def signs(part, stream, first, count):
        where = {"stream": stream, "offset": first, "direction": draw.direction + part}
        return noise.part_signs(case.call["seed"], 1, count, table.tensor_ids[t], int(draw.step), **where)[0]

    def of_rows(part, b):
        return signs(part, "row signs", table.row_offsets[t] + b * rows, rows)

    def of_columns(part, b):
        return signs(part, "column signs", table.col_offsets[t] + b * table.global_cols[t], cols)

    parts = range(len(scalar(case, "scales", t)))
    made = (torch.stack([torch.stack([make(i, b) for b in range(batch)]) for i in parts]) for make in (of_rows, of_columns))
    return tuple(made)


def noises(case, t):
    """Makes what each draw adds to a tensor: U of its rows, or Z of its shape."""
    table, seed = case.table, case.call["seed"]
    if case.op.signed:
        return [left_factor(table, t, seed, Draw(case.call["draws"][0].step), table.rank)]
    rank = table.x[t].shape[2] if case.op.factors else table.rank
    return [
        left_factor(table, t, seed, draw, rank)
        if case.op.along_rows
        else by_row(table, t, functools.partial(noise.dense, law=case.call.get("law", "normal")), seed, draw.step, draw.direction)
        for draw in case.call["draws"]
    ]


def scalar(case, name, t):
    """Returns an argument for one tensor: (draws,) of scales and coefficients, 0-dim of the others, None if it is absent."""
    value = case.call.get(name)
    if value is None:
        return None
    value = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=F64)
    rows = len(case.call["draws"])
    if case.op.signed and name == "scales":
        rows = len(value) if value.dim() > 1 else 1  # the parts
    shape = (rows, len(case.table)) if name in ("scales", "coefficients") else (len(case.table),)
    return value.to(torch.float32).expand(shape)[..., t]


def evaluate(case, t, dtype=torch.float32):
    """Returns the weight before it is rounded into its own dtype, N and V after the call; None for what the call leaves alone.

    ``dtype`` is that of the arithmetic: fp32 for the promised bits, fp64 for the truth.
    """
    table = case.table
    x, v, n = table.x[t], None if table.v is None else table.v[t], None if table.n is None else table.n[t]
    if case.op.name == "resample_":
        new = right_factor(table, t, case.call["seed"], case.call["window"])
        return x.to(dtype), reference.reproject(n, v, new, dtype=dtype) if case.call["reproject"] else None, new
    given = [
        x,
        *([] if v is None else [v]),
        *([] if case.op.n == "none" else [n]),
        *(part_signs(case, t) if case.op.signed else ()),
        noises(case, t),
        list(scalar(case, "scales", t)),
    ]
    function, decay = getattr(reference, case.op.kernel), scalar(case, "decay", t)
    if not case.op.momentum:
        return function(*given, decay, dtype=dtype), None, None
    coefficients, alpha, beta = (scalar(case, name, t) for name in ("coefficients", "alpha", "beta"))
    return *function(*given, reference.MomentumTerms(list(coefficients), alpha, beta), decay, dtype=dtype), None


def promised(case, t):
    """Returns what :func:`evaluate` gives in fp32, with the weight rounded into its own dtype as the call says."""
    x, (y, n, v), rounding = case.table.x[t], evaluate(case, t), case.call.get("rounding")
    if rounding is None or x.dtype == torch.float32:
        return reference.round_nearest(y, x.dtype), n, v
    bits = by_row(case.table, t, noise.rounding_bits, case.call["seed"], rounding.step, rounding.index)
    return reference.round_stochastic(y, bits, x.dtype), n, v


def bound(case, t, exact):
    """Returns how far a weight that is rounded to nearest may be from the truth, ``exact``.

    One rounding into its own dtype, and as many fp32 roundings of the sizes of all terms together as there are terms.
    """
    x, v = case.table.x[t].double().abs(), None if case.table.v is None else case.table.v[t].double()
    added, scales = [u.double() for u in noises(case, t)], scalar(case, "scales", t).double().abs()
    if case.op.signed:  # the scales add up; each sum of them is rounded
        added, scales = added * len(scales), scales
    decay = scalar(case, "decay", t)
    size, terms = x if decay is None else x * decay.double().abs(), 4 + 3 * len(added)
    if case.op.momentum or case.op.out:
        n = torch.zeros_like(x) if case.table.n is None else case.table.n[t].double().abs()
        coefficients, alpha = scales, 1.0
        if case.op.momentum:
            coefficients, alpha = scalar(case, "coefficients", t).double().abs(), scalar(case, "alpha", t).double().abs()
            n = n * scalar(case, "beta", t).double().abs()
        for u, c in zip(added, coefficients, strict=True):
            n = n + u.abs() * c
        size, terms = size + alpha * (n if v is None else n @ v.abs()), terms + case.table.rank
    if not case.op.out:
        for u, scale in zip(added, scales, strict=True):
            product = u if v is None else u.abs() @ v.abs() if case.op.summed else u @ v  # which is exact where it is not summed
            size = size + product.abs() * scale
    return terms * UNIT[torch.float32] * size + 1.01 * UNIT[case.table.x[t].dtype] * exact.abs() + 2.0**-24


def evaluate_product(call, view):
    """Returns what ``lowrank_linear_``, or with ``lookup`` ``lowrank_embedding_``, makes of y: the truth in fp64.

    Args:
        call: the arguments as attributes, and ``place``, a dictionary of seed, tensor_id and row_offset.
        view: what is evaluated of each tensor: ``double`` for the truth, or with absolute values for the size of its terms.
    """
    parts, size = [], len(call.y) // len(call.draws)
    for g, (step, direction) in enumerate(call.draws.tolist()):
        tokens, (rows, rank) = slice(g * size, (g + 1) * size), call.b.shape
        u = noise.factor(rows=rows, rank=rank, draw=step, direction=direction, **call.place)
        y, v, f = view(call.y[tokens]), view(call.v), view(call.b) + view(call.scales[g]) * view(u)
        gain, shift = (None if t is None else view(t) for t in (call.gain, None if call.shift is None else call.shift[g]))
        if call.lookup:
            parts.append(reference.lowrank_embedding(y, call.x[tokens].long(), v, f, gain=gain, dtype=F64))
        else:
            more = {"transposed": call.transposed, "gain": gain, "shift": shift, "dtype": F64}
            parts.append(reference.lowrank_linear(y, view(call.x[tokens]), v, f, **more))
    return torch.cat(parts)


def product_bound(call):
    """Returns the truth of a product, and how far y may be from it: a rounding for each term, and one into its own dtype."""
    exact, size = evaluate_product(call, lambda t: t.double()), evaluate_product(call, lambda t: t.double().abs())
    terms = len(call.v) + 6 + (0 if call.lookup else call.x.shape[1])
    return exact, terms * UNIT[torch.float32] * size + 1.01 * UNIT[call.y.dtype] * exact.abs() + 2.0**-24


def check_truth(before, after):
    """Checks a call that rounds to nearest: the weights within their bounds, N and V in every bit, no gap written."""
    for t, x in enumerate(before.table.x):
        y = (after.table if after.out is None else after.out).x[t]
        if not x.numel():
            continue
        exact, *_ = evaluate(before, t, F64)
        what = f"{before.op.name} tensor {t}: {tuple(x.shape)} {x.dtype}"
        assert ((y.double() - exact).abs() <= bound(before, t, exact)).all(), what
        gaps = torch.ones_like(storage_of(y), dtype=torch.bool)
        gaps.as_strided(y.shape, y.stride(), y.storage_offset()).fill_(False)
        assert storage_of(y)[gaps].isnan().all(), what
        _, n, v = promised(before, t)
        assert n is None or torch.equal(after.table.n[t], n), what
        assert v is None or torch.equal(after.table.v[t], v), what
