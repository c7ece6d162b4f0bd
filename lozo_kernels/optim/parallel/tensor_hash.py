"""Fingerprints of 64 bits that tell whether two ranks hold the same tensors. Any one changed word changes them."""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ...model.handle import Handle
from ...model.parameters import Parameter
from ...model.sharding import block_of, is_sharded, reshard

_CHUNK = 1 << 20  # words that are multiplied at once
_MULTIPLIER = 0x5851F42D4C957F2D
_SAMPLED_TENSORS, _SAMPLED_ELEMENTS = 8, 512


def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """Fingerprints of the tensors' elements in logical order, any dtype and device. Reads each once, and waits once a device."""
    made = [_fingerprint(x) for x in tensors]
    found = [0] * len(made)
    for device in dict.fromkeys(x.device for x in made):
        index = [i for i, x in enumerate(made) if x.device == device]
        for i, value in zip(index, torch.stack([made[i] for i in index]).tolist(), strict=True):
            found[i] = value
    return found


def combine(values: Iterable[int | float]) -> int:
    """Makes one signed 64-bit number from several integers of 64 bits or doubles, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        digest.update(struct.pack("<d" if isinstance(value, float) else "<q", value))
    return int.from_bytes(digest.digest(), "little", signed=True)


def trained_state(handle: Handle) -> dict[str, Tensor]:
    """Everything that steps change and that all ranks have whole, by its name in messages.

    Weights are those in memory. Factors of a probe that wait to be merged have entries of their own. Weights that hooks keep
    elsewhere are left out.
    """
    state: dict[str, Tensor] = {p.name: p.tensor for p in handle.trained if p.storage.resident}
    cut = [p.name for p in _sharded(handle)] if handle.state_in_pieces else []
    state |= {f"the momentum of {name}": value for name, value in handle.momentum.items() if name not in cut}
    return state | {f"the factor of {name}": b for name, b in handle.factors.items()}


def trained_shards(handle: Handle) -> dict[str, Tensor]:
    """The rest of what steps change: this rank's shards of weights, and the momentum that belongs to them."""
    sharded = _sharded(handle)
    if not sharded:
        return {}
    reshard(handle.model)
    state = {f"the shard of {p.name}": block_of(p.name, p.tensor)[0] for p in sharded}
    if handle.state_in_pieces and handle.momentum:
        state |= {f"the momentum of {p.name}": handle.momentum[p.name] for p in sharded}
    return state


def place_of_shards(handle: Handle) -> int:
    """A number that is equal for ranks with the same shards; 0 if nothing is sharded."""
    sharded = _sharded(handle)
    if not sharded:
        return 0
    reshard(handle.model)
    blocks = [block_of(p.name, p.tensor) for p in sharded]
    return combine([number for local, offsets in blocks for number in (*offsets, *local.shape)]) or 1


def starting_weights(handle: Handle) -> dict[str, Tensor]:
    """Every parameter of the model, trained or not, that this rank has whole."""
    return {
        name: p
        for name, p in handle.model.named_parameters()
        if not is_sharded(p) and p.device.type != "meta" and type(p.data) is Tensor
    }


def sample(state: Mapping[str, Tensor]) -> int:
    """A fingerprint of a few hundred elements from all over a few tensors. A step that changes weights also changes these."""
    tensors = [x for x in state.values() if x.numel()]
    chosen = tensors[:: -(-len(tensors) // _SAMPLED_TENSORS) or 1]
    return combine(fingerprints([x.detach().reshape(-1)[:: -(-x.numel() // _SAMPLED_ELEMENTS)] for x in chosen]))


def _sharded(handle: Handle) -> list[Parameter]:
    return [p for p in handle.trained if p.storage.sharded]


def _fingerprint(x: Tensor) -> Tensor:
    """0-dim int64: the sum of all words, each times an odd number of its position and mixed, so that changes hardly cancel."""
    x = x.detach().reshape(-1)
    data = x.contiguous().view(torch.uint8)
    whole = data.numel() // 8 * 8
    head = data[:whole]
    if head.storage_offset() % 8 or head.data_ptr() % 8:
        head = head.clone()
    tail = torch.zeros(8, dtype=torch.uint8, device=x.device)
    tail[: data.numel() - whole] = data[whole:]
    factors = _factors(x.device)
    total = torch.full((), x.numel(), dtype=torch.int64, device=x.device)
    for words in (*head.view(torch.int64).split(_CHUNK), tail.view(torch.int64)):
        mixed = words * factors[: len(words)]
        total = total * _MULTIPLIER + mixed.bitwise_xor_(mixed >> 29).sum()
    return total


@functools.lru_cache(maxsize=16)
def _factors(device: torch.device) -> Tensor:
    """(chunk,) odd int64 multipliers."""
    return (torch.arange(_CHUNK, dtype=torch.int64, device=device) * _MULTIPLIER) | 1
