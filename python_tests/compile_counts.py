"""Prints, as JSON, which kernels Triton would compile for calls whose scalars lie at multiples of 16 bytes, and then for the same
calls with scalars that do not. A process of its own: kernels must not be interpreted. Nothing is compiled, and there is no GPU."""

import collections
import dataclasses
import json
import random

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lozo_kernels.bench.cases import OPS, random_case
from lozo_kernels.kernels import skinny
from lozo_kernels.kernels.backends.triton import TritonBackend
from lozo_kernels.kernels.backends.triton.launcher import Launcher

COMPILED = collections.Counter()
SHAPES = [(1, 64, 64)] * 3


class NoDevice:
    """A driver without a device."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def is_active(self):
        return True


class NoKernel:
    """Stands in place of a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        return None


def count(function, key, signature, device, *rest):
    COMPILED[function.fn.__name__] += 1
    function.device_caches[device][0][key] = NoKernel()
    return NoKernel()


def placed(value, offset):
    """A copy of a tensor of scalars that begins so many elements after a multiple of 16 bytes."""
    if not isinstance(value, torch.Tensor):
        return value
    room = torch.empty(value.numel() + 16, dtype=value.dtype)
    assert room.data_ptr() % 16 == 0
    return room[offset : offset + value.numel()].view(value.shape).copy_(value)


def calls(backend, offset):
    """Makes every call that takes scalars."""
    for dtype in (torch.float32, torch.bfloat16):
        for op in OPS.values():
            for draws in range(op.draws[0], op.draws[1] + 1):
                for decay, rank in ((False, 4), (True, 32)):
                    call = {"draws": draws, "decay": decay, "stochastic": False}
                    case = random_case(random.Random(0), op, SHAPES, rank, call=call, dtypes=[dtype], step=8)
                    dataclasses.replace(case, call={k: placed(x, offset) for k, x in case.call.items()}).run(backend)
    x, y, factor, v = torch.zeros(32, 64), torch.zeros(32, 64), torch.zeros(64, 4), torch.zeros(4, 64, dtype=torch.float16)
    draws, scales = placed(torch.zeros(1, 2, dtype=torch.int64), offset), placed(torch.zeros(1), offset)
    for gain, shift in ((None, None), (torch.ones(1), torch.zeros(1, 64))):
        for transposed in (False, True):
            skinny.lowrank_linear_(
                y, x, v, factor, seed=1, tensor_id=2, draws=draws, scales=scales, transposed=transposed,
                gain=placed(gain, offset), shift=placed(shift, offset), backend=backend,
            )  # fmt: skip
    ids = torch.zeros(32, dtype=torch.int64)
    skinny.lowrank_embedding_(y, ids, v, factor, seed=1, tensor_id=2, draws=draws, scales=scales, backend=backend)


def main():
    driver.set_active(NoDevice())
    JITFunction._do_compile = count
    backend = TritonBackend(Launcher())
    calls(backend, 0)
    aligned = dict(COMPILED)
    COMPILED.clear()
    for offset in (1, 2, 3, 4):
        calls(backend, offset)
    print(json.dumps({"aligned": aligned, "again": dict(COMPILED)}))


if __name__ == "__main__":
    main()
