"""The error of c at the eps that ``find_eps`` measures, beside 1e-3 and the best of a grid.

``python -m bench.eps`` writes ``bench/results/eps.json``: the 260K-parameter Llama of the data folder on eight sentences of SST-2,
for every dtype, placement and kind of direction. The error is that of c over eight directions, other ones than those that
``find_eps`` measured, against the gradient in fp64 at the same weights: the root of its mean square, in parts of that of c.
"""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from bench.evidence import made_by, result_parser, write_result
from bench.learning import Llama
from lozo_kernels import LOZO, MeZO, find_eps, patch
from lozo_kernels.optim.eps_finder import SCALES

BATCH, DIRECTIONS = range(8), 8


def slopes(task: Llama, model: nn.Module, options: dict[str, Any]) -> Tensor:
    """The derivatives of the loss along the directions of step 0, (directions,) fp64."""
    wide = copy.deepcopy(model).double()
    task.loss(wide, BATCH).backward()
    gradients = {name: p.grad for name, p in wide.named_parameters()}
    handle = patch(copy.deepcopy(model), **options)

    def slope(direction: int) -> Tensor:
        parts = (gradients[name] * handle.materialize(name, 0, direction=direction).double() for name in handle.names)
        return torch.stack([part.sum() for part in parts]).sum()

    return torch.stack([slope(d) for d in range(DIRECTIONS)])


def measure(task: Llama, kind: type[LOZO] | type[MeZO], dtype: torch.dtype, placement: str, seed: int) -> dict[str, Any]:
    """One row: what is found, and the errors of c."""
    model, rank = task.model().to(dtype), {"rank": 2} if kind is LOZO else {}
    options = {"placement": placement, **rank}
    found = find_eps(model, lambda: task.loss(model, BATCH), estimator=kind.estimator, seed=seed, **options)
    expected = slopes(task, model, {"estimator": kind.estimator, "seed": seed + 1, **rank})

    def error(eps: float) -> float:
        own = copy.deepcopy(model)  # as it was: in place, an evaluation rounds
        optimizer = kind(own, eps=eps, lr=0.0, directions=DIRECTIONS, seed=seed + 1, **options)
        c, _ = optimizer.estimate(lambda: task.loss(own, BATCH))
        return float((c[0] - expected).square().mean().sqrt() / expected.square().mean().sqrt())

    grid = {eps: error(eps) for eps in SCALES}
    best = min(grid, key=lambda eps: grid[eps])
    errors = {"error_found": error(found), "error_best": grid[best], "error_1e-3": error(1e-3)}
    row = {"method": kind.__name__, "dtype": str(dtype).removeprefix("torch."), "placement": placement, "seed": seed}
    return row | {"found": found, "best": best} | {name: float(f"{value:.3g}") for name, value in errors.items()}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = result_parser(__doc__, "eps.json")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    task, rows = Llama(), []
    for kind in (LOZO, MeZO):
        for dtype in (torch.float32, torch.bfloat16):
            for placement in ("inplace", "probe"):
                for seed in range(args.seeds):
                    rows.append(measure(task, kind, dtype, placement, 10 * seed))
                    print(rows[-1], flush=True)
    apart = max(abs(math.log2(row["found"] / row["best"])) for row in rows)
    worst = max(row["error_found"] / row["error_best"] for row in rows)
    summary = {"most_octaves_from_the_best": apart, "most_error_over_the_best": float(f"{worst:.3g}")}
    write_result({**made_by("bench.eps", argv), "model": "stories260K", "rank": 2, **summary, "rows": rows}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
