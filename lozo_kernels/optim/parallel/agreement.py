"""Checks that all ranks of a run agree on its settings and weights before the first step."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from .channel import Channel

_REPORT_BYTES = 4096
_NAMED = 3  # the most differences that a message names


def check_agreement(channel: Channel, facts: dict[str, Any]) -> None:
    """Compares facts, nested dictionaries that JSON can hold, between ranks.
    Raises ValueError if they differ. Every rank raises the same message, which says in which facts and how."""
    text = json.dumps(facts).encode()
    longest = int(
        channel.exchange(torch.tensor([len(text)], dtype=torch.int64, device="cpu"), 1, lambda rows: rows.max().reshape(1))
    )
    words = _pack(text, -(-longest // 8) * 8)
    report = _unpack(channel.exchange(words, _REPORT_BYTES // 8, _compare)).decode(errors="ignore")
    if report:
        raise ValueError(report)


def _compare(rows: Tensor) -> Tensor:
    texts = [_unpack(row) for row in rows]
    if len(set(texts)) == 1:
        return _pack(b"", _REPORT_BYTES)
    found = [_flat(json.loads(text)) for text in texts]
    differences = []
    for rank, facts in enumerate(found[1:], 1):
        for key in (*found[0], *(key for key in facts if key not in found[0])):
            mine, other = found[0].get(key), facts.get(key)
            if mine != other:
                differences.append(f"{key} ({_show(mine)} on rank 0, {_show(other)} on rank {rank})")
    named = ", ".join(differences[:_NAMED]) + (f" and {len(differences) - _NAMED} more" if len(differences) > _NAMED else "")
    message = f"the ranks of this run do not agree; differing: {named}. Give all of them the same seed, settings and weights"
    return _pack(message.encode()[:_REPORT_BYTES], _REPORT_BYTES)


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _show(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _pack(text: bytes, size: int) -> Tensor:
    """(size / 8,) int64: the text, which has no zero bytes, and zeros after it."""
    return torch.frombuffer(bytearray(text.ljust(size, b"\0")), dtype=torch.int64)


def _unpack(words: Tensor) -> bytes:
    return bytes(words.contiguous().view(torch.uint8).tolist()).rstrip(b"\0")
