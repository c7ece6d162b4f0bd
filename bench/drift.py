"""What the roundings of in-place perturbations do to weights: steps with a learning rate of zero, which should change nothing.

``python -m bench.drift`` writes ``bench/results/drift_cpu.json``: after how many steps the weights of a 1024 x 1024 layer (standard
deviation 0.02, rank 2, eps 1e-3) are how far from where they began, relative to their norm, by dtype, and with fused steps.
"""

import sys

import torch

from bench.evidence import made_by, result_parser, write_result
from lozo_kernels import LOZO

STEPS = (1, 10, 100)


def drift(dtype: torch.dtype, fuse_steps: bool) -> list[dict]:
    torch.manual_seed(0)
    model = torch.nn.Linear(1024, 1024, bias=False).to(dtype)
    torch.nn.init.normal_(model.weight, std=0.02)
    start = model.weight.detach().clone().double()
    optimizer = LOZO(model, lr=0.0, eps=1e-3, rank=2, fuse_steps=fuse_steps)
    rows = []
    for step in range(1, max(STEPS) + 1):
        optimizer.step(lambda: 0.0)
        if step in STEPS:
            optimizer.flush()
            moved = model.weight.detach().double() - start
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "fuse_steps": fuse_steps,
                    "steps": step,
                    "relative_distance": float(moved.norm() / start.norm()),
                    "mean_over_std": float(moved.mean() / start.std()),
                    "changed": float((moved != 0).double().mean()),
                }
            )
    optimizer.handle.restore()
    return rows


def main() -> int:
    args = result_parser(__doc__, "drift_cpu.json").parse_args()
    document = made_by("bench.drift", sys.argv[1:])
    rows = [r for d in (torch.float32, torch.bfloat16, torch.float16) for fused in (False, True) for r in drift(d, fused)]
    for r in rows:
        print(f"{r['dtype']:9} fused {r['fuse_steps']!s:5} {r['steps']:5} steps: {r['relative_distance']:.2e} of the norm")
    write_result(document | {"rows": rows}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
