"""What ``finetune`` learns without a learning rate, beside the best constant one of a grid.

``python -m bench.rates`` writes ``bench/results/rates.json``: four pairs of model and task, each trained for 500 steps with the
default rate and with constant rates, two a decade. A grid goes on until its best rate has a worse one on either side.
``share`` is the fall of the dev loss by default, over that of the best constant rate. The data folder is named by
LOZO_KERNELS_DATA, or is shared/data beside the repository.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.evidence import made_by, result_parser, write_result
from bench.real_input import real_models, run

Row = dict[str, Any]
COMMON = "--steps 500 --eval-every 250 --compare-steps 0 --threads 1"
REAL = f"--data-dir ./data --max-length 48 --batch-size 16 {COMMON}"
PAIRS = {
    "demo": (COMMON, (-7, -6)),
    "llama lm": (f"--model ./stories260K --task sst2 --objective lm {REAL}", (-9, -8)),
    "llama sst2": (f"--model ./stories260K --task sst2 {REAL}", (-9, -8)),
    "minilm trec": (f"--model ./minilm --task trec --data-dir ./data --max-length 24 --batch-size 16 {COMMON}", (-7, -6)),
}
"""Arguments of ``finetune`` by pair, and the half decades at which its grid begins. MiniLM on SST-2 is not among them: from
a new head no constant rate of 1e-5 to 3e-4 lowers its dev loss in 500 steps."""
MOST = 12
"""Rates of a grid."""


def rate_at(half_decade: int) -> float:
    """1 and 3 times a power of ten."""
    return float(f"{'3' if half_decade % 2 else '1'}e{half_decade // 2}")


def best_of_grid(
    name: str, begin: Sequence[int], attempt: Callable[[int], Row], loss: Callable[[Row], float], most: int
) -> tuple[int, dict[int, Row]]:
    """Tries half decades, from some on, until the best has a worse one on either side. Returns it and all that were tried.

    Raises:
        SystemExit: the best of ``most`` is at an end of the grid; the message says whose, by ``name``.
    """
    tried: dict[int, Row] = {}
    wanted = list(begin)
    while wanted:
        for half_decade in wanted:
            tried[half_decade] = attempt(half_decade)
        best = min(tried, key=lambda i: loss(tried[i]))
        wanted = [i for i in (best - 1, best + 1) if i not in tried] if len(tried) < most else []
    if not {best - 1, best + 1} <= set(tried):
        raise SystemExit(f"{name}: the best of {most} rates is at an end of the grid")
    return best, tried


def measure(pair: str, arguments: str, begin: tuple[int, ...], folder: Path, seed: int) -> dict[str, Any]:
    def trained(name: str, more: str = "") -> dict[str, Any]:
        row = run(f"{arguments} --seed {seed} {more}", folder, f"{pair} {name}")
        print(f"{pair}, {name}: dev loss {row['loss_before']:.4f} -> {row['loss_after']:.4f}", flush=True)
        return {key: row[key] for key in ("loss_before", "loss_after", "accuracy_after", "stopped", "train_seconds", "command")}

    def loss(row: dict[str, Any]) -> float:
        """Of a run that ended early, or whose loss is not finite: infinite."""
        return math.inf if row["loss_after"] is None or row["stopped"] is not None else row["loss_after"]

    def attempt(half_decade: int) -> dict[str, Any]:
        return trained(f"{rate_at(half_decade):g}", f"--lr {rate_at(half_decade):g}")

    default = trained("default")
    best, grid = best_of_grid(pair, begin, attempt, loss, MOST)
    fall = [row["loss_before"] - row["loss_after"] for row in (default, grid[best])]
    return {
        "pair": pair,
        "seed": seed,
        "default": default,
        "grid": [{"lr": rate_at(i), **grid[i]} for i in sorted(grid)],
        "best_lr": rate_at(best),
        "share": fall[0] / fall[1],
    }


def main() -> int:
    parser = result_parser(__doc__, "rates.json")
    parser.add_argument("--only", default="", help="pairs whose name contains this")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    document, rows = made_by("bench.rates", sys.argv[1:]), []
    with real_models() as folder:
        for pair, (arguments, begin) in PAIRS.items():
            for seed in range(args.seeds if args.only in pair else 0):
                rows.append(measure(pair, arguments, begin, folder, seed))
                print(f"{pair}: {rows[-1]['share']:.1%} of the fall with {rows[-1]['best_lr']:g}", flush=True)
                write_result(document | {"rows": rows}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
