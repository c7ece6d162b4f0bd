"""The noise functions against the contract in plain numbers, and the products of activations that probes make."""

from __future__ import annotations

import hashlib
import types
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from lozo_kernels import Draw, choose_backend
from lozo_kernels.kernels import noise, ops, skinny
from lozo_kernels.kernels.table import DTYPES
from python_tests import noise_spec
from python_tests.fuzz.choices import ANSWER, ODD_THINGS, Choices, Memory, all_bytes, attempt, expect, reference_answer, same_bits
from python_tests.fuzz.tables import OTHER_DTYPES, strided
from python_tests.truth import product_bound


def run_noise(case: Choices) -> str:
    """One noise function at random coordinates."""
    which = case.of("factor", "op", "dense", "rounding_bits", "cores", "id")
    if which == "id":
        return _ids(case)
    seed, tensor_id = case.whole("seed", 1 << 64), case.whole("tensor id", 1 << 32)
    draw: Any = case.whole("draw", noise.MAX_DRAW)
    direction = case.whole("direction", noise.MAX_DIRECTION)
    if which == "cores":
        return _cores(case, seed, tensor_id, draw, direction)
    count, offset = _count_and_offset(case, 1 << (32 if which in ("factor", "op") else 42))
    if which == "op":
        step: Any = Draw(draw, direction)
    elif isinstance(draw, int) and 0 <= draw < noise.MAX_DRAW and case.chance(10):
        draw = torch.tensor(draw)
        for odd in case.odd(20, draw.float(), draw.view(1), draw.to("meta"), note="draw tensor"):
            draw = odd
    rank, stream = _rank_and_stream(case) if which in ("factor", "op") else (1, "U")
    place, where = {"stream": stream, "row_offset": offset}, {"offset": offset, "direction": direction}
    backend = case.of(None, *(choose_backend("cpu", name).backend for name in ("native", "eager"))) if which == "op" else None
    calls = {
        "factor": lambda: noise.factor(seed, count, rank, tensor_id, draw, **place, direction=direction),
        "op": lambda: ops.factor(seed, count, rank, tensor_id, step, **place, backend=backend),
        "dense": lambda: noise.dense(seed, count, tensor_id, draw, **where),
        "rounding_bits": lambda: noise.rounding_bits(seed, count, tensor_id, draw, **where),
    }
    outcome, found = attempt(case, Memory(), calls[which])
    if outcome == ANSWER:
        with reference_answer(case):
            _check_values(case, which, found, (seed, tensor_id, int(draw), direction), (offset, count, rank, stream))
    return outcome


def _count_and_offset(case: Choices, limit: int) -> tuple[Any, Any]:
    count = case.of(0, 1, 2, 5, 33, 130)
    offset = case.of(0, 1, 6, case.integer(0, limit - count), limit - count)
    for odd in case.odd(4, -1, limit, limit + 1, *ODD_THINGS[:-1], note="place"):
        return case.of((count, odd), (odd, offset) if not isinstance(odd, int) or odd < 200 else (count, odd))
    return count, offset


def _rank_and_stream(case: Choices) -> tuple[Any, Any]:
    rank, stream = case.of(1, 2, 4, 5, 64), case.of("U", "V", "S")
    for odd in case.odd(4, 0, 65, -3, *ODD_THINGS[:-1], note="rank"):
        rank = odd
    for odd in case.odd(4, "Z", "rounding", None, 0, [], note="stream"):
        stream = odd
    return rank, stream


def _check_values(case: Choices, which: str, found: Tensor, noise_of: tuple[int, ...], place: tuple[Any, ...]) -> None:
    seed, tensor_id, draw, direction = noise_of
    offset, count, rank, stream = place
    factor = which in ("factor", "op")
    shape, dtype = (
        ((count, rank), torch.float32) if factor else ((count,), torch.int32 if which == "rounding_bits" else torch.float32)
    )
    expect(found.shape == shape and found.dtype == dtype, f"{which} is {tuple(found.shape)} {found.dtype}", case)
    for i in {0, count - 1, case.integer(0, max(0, count - 1))} if count else ():
        e = offset + i
        if which == "dense":
            expect(
                float(found[i]) == noise_spec.dense(seed, 1, tensor_id, draw, e, direction)[0], f"Z of element {e} is wrong", case
            )
        elif which == "rounding_bits":
            bits = noise_spec.rounding_bits(seed, 1, tensor_id, draw, e, direction)[0]
            expect(int(found[i]) == bits, f"rounding bits of element {e} are wrong", case)
        else:
            wanted = torch.from_numpy(noise_spec.factor(seed, 1, rank, tensor_id, draw, stream, e, direction)[0])
            expect(torch.equal(found[i], wanted), f"{stream}[{e}] is wrong", case)


def _cores(case: Choices, seed: Any, tensor_id: Any, draw: Any, direction: Any) -> str:
    rank = case.of(1, 2, 8)
    owners: Any = [(tensor_id, case.of(0, 1, 5)) for _ in range(case.of(0, 1, 3))]
    for odd in case.odd(5, None, [3], [(1, 2, 3)], [(1, -1)], [(0, 1 << 40)], [("x", 0)], [(0, 1.5)], note="owners"):
        owners = odd
    for odd in case.odd(4, 0, 65, None, note="rank"):
        rank = odd
    outcome, found = attempt(case, Memory(), lambda: noise.cores(seed, rank, owners, draw, direction=direction))
    if outcome == ANSWER:
        with reference_answer(case):
            rest = {"stream": "S", "direction": direction}
            wanted = [noise.factor(seed, rank, rank, t, draw, row_offset=b * rank, **rest) for t, b in owners]
            expect(found.shape == (len(owners), rank, rank), "cores have another shape", case)
            expect(all(starmap(torch.equal, zip(found, wanted, strict=True))), "cores are not the rows of S", case)
    return outcome


def _ids(case: Choices) -> str:
    name: Any = f"layers.{case.integer(0, 10**6)}.weight"
    for odd in case.odd(10, "", "é\U0001f600", None, 3, b"x", [], note="name"):
        name = odd
    outcome, found = attempt(case, Memory(), lambda: (noise.tensor_id(name), noise.tensor_ids([name, name, "other"])))
    if outcome == ANSWER:
        wanted = int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")
        expect(found[0] == wanted and found[1][name] == wanted and len(found[1]) == 2, "another id", case)
    return outcome


def run_skinny(case: Choices) -> str:
    """``lowrank_linear_`` or ``lowrank_embedding_``."""
    lookup, transposed = case.chance(40), case.chance(40)
    rows, cols, rank, groups = case.of(1, 3, 16, 33), case.of(1, 5, 16, 64), case.of(1, 2, 4, 9, 64), case.of(1, 1, 2, 3)
    tokens = groups * case.of(0, 1, 4, 7)
    inputs, outputs = (cols, rows) if not transposed else (rows, cols)
    a: dict[str, Any] = {
        "y": strided(case, (1, tokens, cols if lookup else outputs), case.of(*DTYPES))[0],
        "x": torch.randint(rows, (tokens,), dtype=case.of(torch.int32, torch.int64)) if lookup else strided(
            case, (1, tokens, inputs), case.of(*DTYPES))[0],
        "v": noise.to_grid(torch.randn(rank, cols)).half(),
        "b": torch.randn(rows, rank),
        "draws": torch.tensor([[case.integer(0, noise.MAX_DRAW - 1), case.of(0, 3)] for _ in range(groups)]),
        "scales": torch.randn(groups),
        "gain": case.of(None, torch.rand(1)),
    }  # fmt: skip
    if not lookup:
        a |= {"shift": case.of(None, torch.randn(groups, outputs)), "transposed": transposed}
    a["y"].nan_to_num_(0, 0, 0)
    a["x"].nan_to_num_(0, 0, 0)
    a |= {"seed": case.whole("seed", 1 << 64, 2), "tensor_id": case.whole("tensor id", 1 << 32, 2)}
    limit = (1 << 32) - rows
    a["row_offset"] = case.of(0, 7, limit, *case.odd(4, limit + 1, -1, 1 << 40, 1.5, None, note="row offset"))
    a["backend"] = case.of(None, *(choose_backend("cpu", name).backend for name in ("native", "eager")))
    if case.chance(25):
        _spoil(case, a, lookup)
    memory = Memory([t for t in a.values() if isinstance(t, Tensor)])
    seen = {k: t for k, t in a.items() if isinstance(t, Tensor) and t.device.type == "cpu" and t.layout == torch.strided}
    seen = {k: t for k, t in seen.items() if not t.numel() or t.untyped_storage().nbytes()}
    before = {k: t.detach().clone() for k, t in seen.items()}
    old = {k: all_bytes(t).clone() for k, t in seen.items()}
    function = skinny.lowrank_embedding_ if lookup else skinny.lowrank_linear_
    outcome, _ = attempt(case, memory, lambda: function(a["y"], a["x"], a["v"], a["b"], **dict(list(a.items())[4:])))
    if outcome == ANSWER:
        with reference_answer(case):
            _check_product(case, a, a | before, lookup)
        for k, t in seen.items():
            if k == "y":
                t.detach().copy_(before[k])
            expect(torch.equal(all_bytes(t), old[k]), f"something beside y was written: by {k}", case)
    return outcome


def _check_product(case: Choices, now: dict[str, Any], a: dict[str, Any], lookup: bool) -> None:
    for k in ("x", "v", "b", "draws", "scales"):
        expect(same_bits(now[k], a[k]), f"{k} was changed", case)
    place = {k: a[k] for k in ("seed", "tensor_id", "row_offset")}
    exact, bound = product_bound(types.SimpleNamespace(**{"shift": None} | a, place=place, lookup=lookup))
    good = ((now["y"].double() - exact).abs() <= 2 * bound) | (exact.abs() + bound > 6e4)
    expect(bool(good.all()), "y is out of its bound", case)


def _spoil(case: Choices, a: dict[str, Any], lookup: bool) -> None:
    name = case.of("y", "x", "v", "b", "draws", "scales", "gain", *(() if lookup else ("shift",)))
    kind = case.of("dtype", "dims", "thing", "meta", "sparse", "strides", "expanded", "shared", "neg", "freed", "range", "count")
    t = a[name]
    case.notes.append(f"{name}: {kind}")
    if kind == "thing" or t is None:
        a[name] = case.of(*ODD_THINGS)
    elif kind == "dtype":
        a[name] = t.to(case.of(*OTHER_DTYPES))
    elif kind == "dims":
        a[name] = case.of(t.unsqueeze(0), t.flatten(), t.sum())
    elif kind == "strides":
        a[name] = t.clone().t().contiguous().t() if t.dim() == 2 else torch.stack((t, t), -1)[..., 0]
    elif kind == "expanded":
        a[name] = t[:1].expand(t.shape) if len(t) else t
    elif kind == "shared" and not lookup and name != "y":
        a["x"] = a["y"]
    elif kind == "range":
        a[case.of("draws", "x" if lookup else "draws")][:1] = case.of(-1, 1 << 30)
    elif kind == "count":
        a[name] = torch.cat((t, t))
    elif kind == "freed":
        a[name] = t.clone()
        a[name].untyped_storage().resize_(0)
    else:
        a[name] = {"meta": t.to("meta"), "sparse": t.to_sparse() if t.dim() else t, "neg": torch._neg_view(t)}.get(kind, t)
