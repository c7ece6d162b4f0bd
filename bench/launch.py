"""Runs one op a few times, for profilers: ``ncu python -m bench.launch``."""

from __future__ import annotations

import argparse
import sys

import torch

from lozo_kernels import choose_backend
from lozo_kernels.bench import op_calls
from lozo_kernels.bench.arguments import DTYPE_NAMES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", default="lowrank_update", help="a row of bench perturb (default: lowrank_update)")
    parser.add_argument("--rank", type=int, default=4, help="default: 4")
    parser.add_argument("--shape", default="8192x8192", help="RxC or a model (default: 8192x8192)")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPE_NAMES), help="default: bfloat16")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--times", type=int, default=4, help="default: 4")
    options = parser.parse_args()
    device = torch.device(options.device)
    backend = choose_backend(device).backend
    case = op_calls.make_weights(options.shape, DTYPE_NAMES[options.dtype], device)
    if options.op.startswith("dense_update"):
        calls = op_calls.dense_calls(case.dense_table(), backend)
    else:
        calls = op_calls.lowrank_calls(case.lowrank_table(options.rank, backend), backend)
    for _ in range(options.times):
        calls[options.op].run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
