"""Fingerprints of weights: BLAKE2b of every parameter's bytes, on all threads, without a copy of weights in memory."""

from __future__ import annotations

import ctypes
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..model.handle import Handle
from ..model.parameters import Parameter
from .format import DIGEST_BYTES

_CHUNK = 1 << 26  # bytes of a device's weight that are copied to the host at once
_SIZE = 16


def weight_fingerprints(handle: Handle) -> list[str]:
    """Returns the fingerprint of each trained weight as it is now, in the order of ``Handle.names``: 32 hexadecimal digits.

    Sharded weights are gathered, one after the other, which is a collective.
    """
    found = {p.name: _of_parameter(handle, p) for p in handle.trained if p.storage.sharded}

    def one(p: Parameter) -> str:
        return found.get(p.name) or _of_parameter(handle, p)

    try:
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            return list(pool.map(one, handle.trained))
    except RuntimeError:  # the system gives no more threads; an error of another kind comes again here
        return [one(p) for p in handle.trained]


def fingerprint(handle: Handle) -> str:
    """Returns one fingerprint of all trained weights, and of what quantised layers learned: 64 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, own in zip(handle.names, weight_fingerprints(handle), strict=True):
        digest.update(f"{name}\0{own}\0".encode())
    past = handle.past
    for name in sorted(past):
        digest.update(name.encode())
        for key in ("b", "v"):
            _update(digest, past[name][key])
    return digest.hexdigest()


def _of_parameter(handle: Handle, p: Parameter) -> str:
    digest = hashlib.blake2b(digest_size=_SIZE)
    _update(digest, p.storage.load(handle.device_of(p)))
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None and type(tensor) is not Tensor:  # a quantised weight is several tensors
        for name in flatten()[0]:
            _update(digest, getattr(tensor, name))
        return
    flat = tensor.detach().reshape(-1)
    step = max(1, _CHUNK // max(1, flat.element_size()))
    for part in flat.split(step) if flat.device.type != "cpu" else (flat,):
        here = part.cpu().contiguous()
        nbytes = here.numel() * here.element_size()
        if nbytes:
            digest.update((ctypes.c_char * nbytes).from_address(here.data_ptr()))
