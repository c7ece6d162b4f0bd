"""What many directions cost: the update of a step and the passes of its evaluations, beside those of one direction.

``python -m bench.directions`` writes ``bench/results/directions_cpu.json``: seconds of ``Handle.update_`` for 1 to 16 directions on
weights that no cache holds, called in turn, and the median ratio within a round to one direction.
"""

import sys

import torch

from bench.evidence import made_by, result_parser, write_result
from lozo_kernels import patch
from lozo_kernels.bench.timing import Contender, interleave, median, paired_ratio

COUNTS = (1, 2, 3, 7, 16)
SHAPE, LAYERS, RANK = (4096, 4096), 4, 2


def cost(dtype: torch.dtype, momentum: float | None, rounds: int) -> list[dict]:
    layers = [torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=dtype) for _ in range(LAYERS)]
    handle = patch(torch.nn.Sequential(*layers), rank=RANK)
    if momentum is not None:
        handle.enable_momentum()

    def update(count: int) -> Contender:
        return Contender(lambda: handle.update_(0, [0.5] * count, 1e-6, beta=momentum))

    seconds = interleave({str(count): update(count) for count in COUNTS}, rounds)
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "momentum": momentum,
            "directions": count,
            "milliseconds": 1e3 * median(seconds[str(count)].values()),
            "beside_one": paired_ratio(seconds[str(count)], seconds["1"]),
        }
        for count in COUNTS
    ]


def main() -> int:
    parser = result_parser(__doc__, "directions_cpu.json")
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    document = made_by("bench.directions", sys.argv[1:])
    dtypes = (torch.float32, torch.bfloat16)
    rows = [row for dtype in dtypes for momentum in (None, 0.9) for row in cost(dtype, momentum, args.rounds)]
    for r in rows:
        beside = f"{r['milliseconds']:7.2f} ms, {r['beside_one']:.2f} of one"
        print(f"{r['dtype']:9} momentum {r['momentum']!s:5} {r['directions']:3} directions: {beside}")
    write_result(document | {"shape": SHAPE, "layers": LAYERS, "rank": RANK, "rows": rows}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
