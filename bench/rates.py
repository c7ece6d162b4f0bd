"""What ``finetune`` learns without a learning rate, beside the best constant one of a grid.

``python -m bench.rates`` writes ``bench/results/rates.json``: four pairs of model and task, each trained for 500 steps with the
default rate and with constant rates, two a decade. A grid goes on until its best rate has a worse one on either side.
``share`` is the fall of the dev loss by default, over that of the best constant rate. The data folder is named by
LOZO_KERNELS_DATA, or is shared/data beside the repository.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.evidence import made_by, result_parser, write_result
from bench.real_input import run
from python_tests import hf_helpers

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


def measure(pair: str, arguments: str, begin: tuple[int, ...], folder: Path, seed: int) -> dict[str, Any]:
    def trained(name: str, more: str = "") -> dict[str, Any]:
        row = run(f"{arguments} --seed {seed} {more}", folder, f"{pair} {name}")
        print(f"{pair}, {name}: dev loss {row['loss_before']:.4f} -> {row['loss_after']:.4f}", flush=True)
        return {key: row[key] for key in ("loss_before", "loss_after", "accuracy_after", "stopped", "train_seconds", "command")}

    default, grid = trained("default"), {}
    wanted = list(begin)
    while wanted:
        for index in wanted:
            grid[index] = trained(f"{rate_at(index):g}", f"--lr {rate_at(index):g}")
        # A run that ended early, or whose loss is not finite, is no candidate.
        losses = {i: row["loss_after"] for i, row in grid.items() if row["loss_after"] is not None and row["stopped"] is None}
        best = min(losses, key=losses.__getitem__)
        wanted = [i for i in (best - 1, best + 1) if i not in grid] if len(grid) < MOST else []
    if not {best - 1, best + 1} <= set(grid):
        raise SystemExit(f"{pair}: the best of {MOST} rates is at an end of the grid")
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
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "data").symlink_to(hf_helpers.data_folder())
        (folder / "minilm").symlink_to(hf_helpers.minilm_folder())
        hf_helpers.convert_stories260k(folder / "data", folder / "stories260K")
        for pair, (arguments, begin) in PAIRS.items():
            for seed in range(args.seeds if args.only in pair else 0):
                rows.append(measure(pair, arguments, begin, folder, seed))
                print(f"{pair}: {rows[-1]['share']:.1%} of the fall with {rows[-1]['best_lr']:g}", flush=True)
                write_result(document | {"rows": rows}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
