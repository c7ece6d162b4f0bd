"""``lozo-kernels doctor``: what this installation stands on, which backends work and why others do not, and a self-test."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from ..bench.correctness import hold, plans
from ..bench.environment import commit, cpu_name, versions
from ..kernels import noise
from ..kernels.backends import native
from ..kernels.registry import backend_names, choose_backend
from ..optim.methods import LOZO

_PHILOX_ZERO = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
"""Philox4x32-10 of a zero counter under a zero key, from the test vectors of its authors."""

_NOISE_DIGEST = "ad0f9070bbd6ebcb"
"""BLAKE2s of a sample of every stream; see :func:`_noise_digest`."""


Check = dict[str, Any]
"""One line of the self-test: "name", "problem" (None if it passed) and "seconds"."""


def devices() -> dict[str, str]:
    """The devices that PyTorch can use, by name."""
    return {"cpu": cpu_name()} | {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}


def backend_status(device: str) -> dict[str, str | None]:
    """Every backend and why it cannot serve a device, or None if it can."""
    return {name: _reason_against(name, device) for name in backend_names()}


def instruction_set() -> dict[str, Any]:
    """The instruction set that the native library uses and the others that this machine runs, or why it cannot be used."""
    found: dict[str, Any] = {"library": str(native.library_path()), "isa": None, "supported": [], "problem": None}
    try:
        return found | {"isa": native.isa(), "supported": native.supported_isas()}
    except (OSError, RuntimeError, ValueError) as e:
        return found | {"problem": str(e)}


def self_test() -> list[Check]:
    """Tests the noise, each backend of each device against eager, and a step of LOZO."""
    checks = [_check("noise contract", _test_noise)]
    for device in devices():
        for name, reason in backend_status(device).items():
            if reason is None and name != "eager":
                checks.append(_check(f"{name} on {device} equals eager", functools.partial(_test_backend, name, device)))
        checks.append(_check(f"a LOZO step on {device}", functools.partial(_test_step, device)))
    return checks


def main(*, as_json: bool = False) -> int:
    """Prints the findings; returns 1 if the self-test failed."""
    found = {
        "versions": versions(),
        "commit": commit(),
        "platform": platform.platform(),
        "devices": devices(),
        "threads": torch.get_num_threads(),
        "native": instruction_set(),
        "backends": {device: backend_status(device) for device in devices()},
    }
    if not as_json:
        print("\n".join(_lines(found)), flush=True)
    checks = self_test()
    passed = all(c["problem"] is None for c in checks)
    if as_json:
        print(json.dumps(found | {"self_test": checks, "passed": passed}, indent=2))
        return 0 if passed else 1
    print("self-test")
    for c in checks:
        verdict, problem = ("ok", "") if c["problem"] is None else ("FAILED", f": {c['problem']}")
        print(f"  {verdict:8}{c['name']} ({c['seconds']:.1f} s){problem}")
    return 0 if passed else 1


def _reason_against(backend: str, device: str) -> str | None:
    try:
        choose_backend(device, backend)
    except RuntimeError as e:
        return str(e).split(": ", 1)[1]
    except ValueError as e:  # LOZO_KERNELS_ISA
        return str(e)
    return None


def _backend_in_use(device: str) -> str | None:
    try:
        return choose_backend(device).backend.name
    except (RuntimeError, ValueError):
        return None


def _lines(found: dict[str, Any]) -> list[str]:
    lines = ["versions"]
    lines += [f"  {name:14}{version or 'not installed'}" for name, version in found["versions"].items()]
    lines += [f"  {'commit':14}{found['commit'] or 'not a clone'}", f"  {'platform':14}{found['platform']}"]
    lines += ["devices", *(f"  {name:14}{description}" for name, description in found["devices"].items())]
    lines += [f"  {'threads':14}{found['threads']}"]
    for device, status in found["backends"].items():
        used = _backend_in_use(device)
        words = {name: f"does not work: {reason}" if reason else "works" for name, reason in status.items()}
        if used is not None:
            words[used] += ", in use"
        lines += [f"backends for {device}", *(f"  {name:14}{text}" for name, text in words.items())]
    isa = found["native"]
    lines += ["native library", f"  {'file':14}{isa['library']}"]
    if isa["problem"]:
        return [*lines, f"  {'problem':14}{isa['problem']}"]
    return [*lines, f"  {'instructions':14}{isa['isa']} (this machine runs {', '.join(isa['supported'])})"]


def _check(name: str, test: Callable[[], str | None]) -> Check:
    start = time.perf_counter()
    try:
        problem = test()
    except Exception as e:  # whatever breaks is the finding
        problem = f"{type(e).__name__}: {e}"
    return {"name": name, "problem": problem, "seconds": time.perf_counter() - start}


def _test_noise() -> str | None:
    words = noise.philox(0, torch.zeros(1, dtype=torch.int64, device="cpu"), 0, 0, 0)[0].tolist()
    if tuple(words) != _PHILOX_ZERO:
        return f"Philox gives {[hex(w) for w in words]}, its authors {[hex(w) for w in _PHILOX_ZERO]}"
    digest = _noise_digest()
    return None if digest == _NOISE_DIGEST else f"the sample has digest {digest}, version {noise.NOISE_VERSION} has {_NOISE_DIGEST}"


def _noise_digest() -> str:
    """BLAKE2s of U, V, Z, signs and rounding bits at some coordinates, as little-endian bytes."""
    seed, i = 0x123456789ABCDEF, noise.tensor_id("model.layers.0.weight")
    sample = [
        noise.factor(seed, 1000, 7, i, 3, row_offset=11),
        noise.factor(seed, 1000, 7, i, 3, stream="V", direction=2),
        noise.dense(seed, 10_000, i, 5, offset=(1 << 34) - 4097),
        noise.dense(seed, 10_000, i, 5, offset=(1 << 39) - 4097, law="rademacher"),
        noise.rounding_bits(seed, 10_000, i, 5, offset=3),
    ]
    digest = hashlib.blake2s(digest_size=8)
    for values in sample:
        integers = values.contiguous().view(torch.int32)
        digest.update(b"".join(v.to_bytes(4, "little", signed=True) for v in integers.flatten().tolist()))
    return digest.hexdigest()


def _test_backend(name: str, device: str) -> str | None:
    """Holds every op to eager on the CPU, bit for bit, on small tables of fresh random numbers."""
    eager, backend = choose_backend("cpu", "eager").backend, choose_backend(device, name).backend
    tiny = [plan for plan in plans(quick=True) if plan.layout == "tiny"]
    _, failures, _ = hold([backend], eager, torch.device(device), random.SystemRandom().getrandbits(32), tiny)
    return failures[0] if failures else None


def _test_step(device: str) -> str | None:
    """Checks that a step moves a small model along its own direction by as much as the projected gradient says."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 4)).to(device)
    inputs, targets = (
        torch.randn(8, 12, dtype=torch.float32, device="cpu").to(device),
        torch.randn(8, 4, dtype=torch.float32, device="cpu").to(device),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lr, rank = 1e-2, 2
    optimizer = LOZO(model, lr=lr, eps=1e-3, rank=rank)
    optimizer.step(lambda: torch.nn.functional.mse_loss(model(inputs), targets))
    assert optimizer.info is not None
    c = float(optimizer.info.c)
    for name, p in model.named_parameters():
        expected = before[name] - lr * c * optimizer.handle.materialize(name, 0) / (rank if p.dim() > 1 else 1)
        if not torch.allclose(p, expected, atol=1e-5):
            return f"{name} is off by {float((p - expected).abs().max()):.1e}"
    optimizer.handle.restore()
    return None
