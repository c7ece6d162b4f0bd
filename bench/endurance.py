"""Whether memory grows in a long run: ``python -m bench.endurance``, 20,000 steps of every placement on a small model.

It writes ``bench/results/endurance.json``: what the process holds (resident bytes, and objects that Python's collector knows) after
a tenth of the steps and at the end. The result is 1 if something grew by more than ``--allowed`` KiB, or by an object in ten steps.
"""

import gc
import resource
import sys
import time
from typing import Any

import psutil
import torch
from torch import nn

from bench.evidence import made_by, result_parser, write_result
from lozo_kernels import LOZO, MeZO, SubZero
from lozo_kernels.optim import ZerothOrderOptimizer

PLACEMENTS: dict[str, tuple[type[ZerothOrderOptimizer], dict[str, Any]]] = {
    "in place": (LOZO, {}),
    "in place, momentum": (LOZO, {"momentum": 0.9}),
    "in place, fused": (LOZO, {"fuse_steps": True}),
    "in place, MeZO": (MeZO, {}),
    "in place, SubZero": (SubZero, {}),
    "probe, activation": (LOZO, {"placement": "probe", "side": "activation"}),
    "probe, scratch": (LOZO, {"placement": "probe", "side": "scratch"}),
    "probe, copy": (LOZO, {"placement": "probe", "side": "copy"}),
    "probe, momentum": (LOZO, {"placement": "probe", "momentum": 0.9}),
    "probe, batched": (LOZO, {"placement": "probe", "evaluation": "batched", "directions": 2}),
    "probe, MeZO": (MeZO, {"placement": "probe"}),
}


def make() -> nn.Module:
    """A model with a buffer that forwards write, and layers of every kind of side."""
    return nn.Sequential(nn.Embedding(31, 32), nn.Linear(32, 32), nn.LayerNorm(32), nn.Dropout(0.1), nn.Tanh(), nn.Linear(32, 31))


def held() -> tuple[int, int]:
    """Resident bytes, and live objects."""
    gc.collect()
    return psutil.Process().memory_info().rss, len(gc.get_objects())


def measure(kind: type[ZerothOrderOptimizer], options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Takes the steps; returns what was held on the way and at the end."""
    model = make().train(options.get("evaluation") != "batched")  # dropout differs between points that share a forward
    optimizer = kind(model, lr=1e-4, interval=50, **options) if kind is not MeZO else kind(model, lr=1e-4, **options)
    tokens = torch.randint(31, (4, 8))

    def losses(batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch).transpose(1, 2), batch, reduction="none").mean(1)

    first: tuple[int, int] | None = None
    start = time.perf_counter()
    for step in range(steps):
        optimizer.step(losses, tokens)
        if step % 100 == 99:
            model.state_dict()
        if step + 1 == steps // 10:
            first = held()
    assert first is not None
    seconds = time.perf_counter() - start
    last = held()
    return {
        "steps": steps,
        "resident_kib": [first[0] // 1024, last[0] // 1024],
        "objects": [first[1], last[1]],
        "seconds": round(seconds, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> int:
    parser = result_parser(__doc__, "endurance.json")
    parser.add_argument("--steps", type=int, default=20_000, help="of each placement (default: 20000)")
    parser.add_argument("--allowed", type=int, default=2048, help="KiB that a run may grow by (default: 2048)")
    args = parser.parse_args()
    document = made_by("bench.endurance", sys.argv[1:])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows, grew = [], False
    for name, (kind, options) in PLACEMENTS.items():
        row = {"placement": name} | measure(kind, options, args.steps)
        more = row["resident_kib"][1] - row["resident_kib"][0]
        objects = row["objects"][1] - row["objects"][0]
        row["grew"] = more > args.allowed or objects > args.steps // 10
        grew = grew or row["grew"]
        print(
            f"{name}: {more:+d} KiB, {objects:+d} objects in {row['steps'] * 9 // 10} steps{'  GREW' if row['grew'] else ''}",
            flush=True,
        )
        rows.append(row)
    write_result(document | {"allowed_kib": args.allowed, "rows": rows}, args.output)
    return int(grew)


if __name__ == "__main__":
    sys.exit(main())
