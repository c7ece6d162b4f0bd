"""Launches of the products of activations with factors (skinny.py): how tokens and columns are divided, and the scratch memory."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...calls import LayerCall
from .launcher import Launcher
from .plans import ALL_REGISTERS, FACTOR_ROWS, Plan, Target, as_int32, padded, registers_of, target_of
from .skinny import contraction, expansion, lookup
from .tilesizes import TileSize
from .work import SizeOf

_PROGRAMS = 512
"""Programs that fill a large device a few times over. Work with fewer tiles is divided further."""
_PARTS = 16
"""The most parts that a long row is divided into, because the expansion adds the parts one after the other."""


def contraction_plan(rank: int, factor: bool, size: TileSize, target: Target) -> Plan:
    """The plan of the product of activations with V or, with ``factor``, with B + scale * U."""
    constants = {
        "FACTOR": factor,
        "RANK": rank,
        "PADDED": padded(rank),
        "TOKENS": size.rows,
        "COLS": size.cols,
        "DP4A": target.dp4a,
        "TF32": target.tf32,
        "EMULATE": target.emulate,
    }
    return Plan(contraction, constants, size.num_warps, registers_of(size, target, ALL_REGISTERS))


def lookup_plan(rank: int, tokens: int, target: Target) -> Plan:
    """The plan that looks up rows of B + scale * U, ``tokens`` per program."""
    return Plan(lookup, {"RANK": rank, "PADDED": padded(rank), "TOKENS": tokens, "DP4A": target.dp4a})


def expansion_plan(
    dtype: torch.dtype, rank: int, factor: bool, parts: bool, gain: bool, shift: bool, size: TileSize, target: Target
) -> Plan:
    """The plan that multiplies sums of a contraction or look-up (in ``parts``, or one) by V, or by B + scale * U, and adds to Y."""
    constants = {
        "FACTOR": factor,
        "PARTS": parts,
        "GAIN": gain,
        "SHIFT": shift,
        "RANK": rank,
        "PADDED": padded(rank),
        "TOKENS": size.rows,
        "COLS": size.cols,
        "DP4A": target.dp4a,
        "EIGHTS": target.eights and dtype.itemsize == 2,
        "TF32": target.tf32,
        "EMULATE": target.emulate,
    }
    return Plan(expansion, constants, size.num_warps, registers_of(size, target))


def launch_linear(call: LayerCall, launcher: Launcher, size_of: SizeOf) -> None:
    """Launches lowrank_linear: a contraction, and the expansion of its sums."""
    y, rank, inner = call.y, len(call.v), call.x.shape[1]
    size = _fitted(size_of("contraction", y.device, True, rank, False), call)
    across = -(-inner // size.cols)
    tiles = _tiles(call, size)
    blocks = max(_share(across, size.blocks, tiles), -(-across // _PARTS))
    parts = max(1, -(-across // blocks))
    sums = torch.empty(parts, len(y), padded(rank), dtype=torch.float32, device=y.device)
    plan = contraction_plan(rank, call.transposed, size, target_of(y.device))
    arguments = (call.x, call.v, call.b, call.draws, call.scales, sums, *_place(call), *_tokens(call))
    launcher.launch(plan, tiles * parts, y.device, *arguments, parts, blocks, inner, call.x.stride(0))
    _expand(call, sums, launcher, size_of)


def launch_embedding(call: LayerCall, launcher: Launcher, size_of: SizeOf) -> None:
    """Launches lowrank_embedding: a look-up, and the expansion of its rows."""
    y, rank, (tokens, groups) = call.y, len(call.v), _tokens(call)
    sums = torch.empty(1, len(y), padded(rank), dtype=torch.float32, device=y.device)
    plan = lookup_plan(rank, FACTOR_ROWS, target_of(y.device))
    arguments = (call.x, call.b, call.draws, call.scales, sums, *_place(call), tokens, len(call.b))
    launcher.launch(plan, groups * -(-tokens // FACTOR_ROWS), y.device, *arguments)
    _expand(dataclasses.replace(call, transposed=True), sums, launcher, size_of)


def _expand(call: LayerCall, sums: Tensor, launcher: Launcher, size_of: SizeOf) -> None:
    y, rank = call.y, len(call.v)
    size = _fitted(size_of("expansion", y.device, True, rank, False), call)
    tokens, groups = _tokens(call)
    down, across = -(-tokens // size.rows), -(-y.shape[1] // size.cols)
    blocks = _share(down, size.blocks, groups * across)
    factor, parts, unused = not call.transposed, len(sums), call.scales
    gain, shift = (unused if t is None else t for t in (call.gain, call.shift))
    kind = (parts > 1, call.gain is not None, call.shift is not None)
    plan = expansion_plan(y.dtype, rank, factor, *kind, size, target_of(y.device))
    arguments = (y, sums, call.v, call.b, call.draws, call.scales, gain, shift, *_place(call), tokens, groups)
    programs = groups * across * -(-down // blocks)
    launcher.launch(plan, programs, y.device, *arguments, parts, blocks, y.shape[1], y.stride(0))


def _fitted(size: TileSize, call: LayerCall) -> TileSize:
    """The tile size with as few rows as the tokens of one evaluation need, but at least 16, the least that tensor cores take."""
    tokens, _ = _tokens(call)
    return dataclasses.replace(size, rows=min(size.rows, max(16, 1 << (tokens - 1).bit_length())))


def _tiles(call: LayerCall, size: TileSize) -> int:
    tokens, groups = _tokens(call)
    return groups * -(-tokens // size.rows)


def _share(blocks: int, most: int, others: int) -> int:
    """How many of ``blocks`` blocks one program takes: a power of two up to ``most``. There are ``others`` such rows of blocks."""
    share = 1
    while share < most and others * -(-blocks // (2 * share)) >= _PROGRAMS:
        share *= 2
    return share


def _tokens(call: LayerCall) -> tuple[int, int]:
    """The tokens of one evaluation, and the number of evaluations."""
    groups = len(call.draws)
    return len(call.y) // groups, groups


def _place(call: LayerCall) -> tuple[int, ...]:
    """Seed (two words), tensor id and row offset."""
    return tuple(map(as_int32, (call.seed & 0xFFFFFFFF, call.seed >> 32, call.tensor_id, call.row_offset)))
