"""How many Python functions of the package one step of a small model calls: ``python -m bench.calls``.

Time on a host is noisy and this is not, so a test holds it. The model has four parameters, and five steps come before the one that
is counted. ``--show`` lists the functions.
"""

import argparse
import collections
import json
import sys
from types import FrameType

import torch
from torch import nn

import lozo_kernels

ROOT = lozo_kernels.__path__[0]
PLACEMENTS = ("inplace", "probe")


def calls_of_a_step(placement: str) -> collections.Counter[str]:
    """Counts the calls of each function of the package in one LOZO step."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(5, 8)
    optimizer = lozo_kernels.LOZO(model, lr=1e-3, placement=placement)

    def loss() -> torch.Tensor:
        return model(x).square().mean()

    found: collections.Counter[str] = collections.Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT):
            found[f"{code.co_filename[len(ROOT) + 1 :]}: {getattr(code, 'co_qualname', code.co_name)}"] += 1

    for _ in range(5):
        optimizer.step(loss)
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        optimizer.step(loss)
    finally:
        sys.setprofile(before)
        optimizer.handle.restore()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="list the functions")
    show = parser.parse_args().show
    found = {placement: calls_of_a_step(placement) for placement in PLACEMENTS}
    for placement, calls in found.items() if show else ():
        print(placement, *(f"  {count:4} {name}" for name, count in calls.most_common()), sep="\n", file=sys.stderr)
    print(json.dumps({placement: calls.total() for placement, calls in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
