"""What the package costs the host, beside another checkout of it, in one run: ``python -m bench.overhead --before DIR``.

It writes ``bench/results/overhead.json``: the calls of a step (``bench/calls.py``); the passes of ``python -m bench host`` in
rounds that take turns, each a process of its own, and of the medians of the rounds the median; and steps of the OPT-125m
architecture at 16 tokens on one thread, step by step in turn, of which the ratios are the medians of those of neighbours. DIR is a
clone at another commit, in which the native library is built.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.evidence import REPO, made_by, result_parser, write_result
from bench.step_in_turn import PLACEMENTS

CALLS = REPO / "bench" / "calls.py"
STEPS = REPO / "bench" / "step_in_turn.py"


def run(checkout: Path, *words: str) -> Any:
    """Runs Python on a checkout; returns the JSON that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, *words], cwd=checkout, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def host(checkout: Path, repeats: int) -> dict[str, float]:
    """The median microseconds of each pass."""
    program = ("bench",) if (checkout / "bench" / "host.py").exists() else ("lozo_kernels", "bench")  # where it was before
    found = run(checkout, "-m", *program, "host", "--json", "--repeats", str(repeats))
    return {row["pass"]: row["median"] for row in found["rows"] if not row["pass"].startswith(("layer", "step"))}  # of probes


def steps_in_turn(checkouts: Sequence[Path], repeats: int) -> dict[str, list[list[float]]]:
    """For each placement the milliseconds of pairs of steps, one on each checkout."""
    workers = []
    for checkout in checkouts:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        words = (sys.executable, str(STEPS))
        workers.append(
            subprocess.Popen(words, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    found: dict[str, list[list[float]]] = {}
    for name in PLACEMENTS:
        pairs = found.setdefault(name, [])
        for i in range(repeats):
            pair = [0.0, 0.0]
            for k in (0, 1) if i % 2 == 0 else (1, 0):
                into, out = workers[k].stdin, workers[k].stdout
                assert into is not None and out is not None
                into.write(f"{name}\n")
                into.flush()
                pair[k] = float(out.readline())
            pairs.append(pair)
    for worker in workers:
        worker.communicate()
    return found


def main() -> int:
    parser = result_parser(__doc__, "overhead.json")
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=7, help="of host passes; 0 leaves them out (default: 7)")
    parser.add_argument("--repeats", type=int, default=300, help="passes of each kind in a round (default: 300)")
    parser.add_argument("--steps", type=int, default=200, help="of OPT-125m, for each placement (default: 200)")
    args = parser.parse_args()
    document = made_by("bench.overhead", sys.argv[1:])
    before, after = args.before.resolve(), REPO
    head = ("git", "-C", str(before), "rev-parse", "--short=12", "HEAD")
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    was, now = (run(place, str(CALLS)) for place in (before, after))
    rows = [{"measured": "calls of a step", "row": name, "before": was[name], "after": now[name]} for name in now]
    rounds: dict[Path, list[dict[str, float]]] = {before: [], after: []}
    for i in range(args.rounds):
        for place in (before, after) if i % 2 == 0 else (after, before):
            rounds[place].append(host(place, args.repeats))
    for name in rounds[after][0] if args.rounds else ():
        was, now = (statistics.median(found[name] for found in rounds[place]) for place in (before, after))
        rows.append({"measured": "host microseconds of a pass", "row": name, "before": was, "after": now})
    for name, pairs in steps_in_turn((before, after), args.steps).items():
        was, now = (statistics.median(pair[k] for pair in pairs) for k in (0, 1))
        ratio = round(statistics.median(pair[1] / pair[0] for pair in pairs), 4)
        rows.append({"measured": "milliseconds of a step of OPT-125m", "row": name, "before": was, "after": now, "ratio": ratio})
    for row in rows:
        row.setdefault("ratio", round(row["after"] / row["before"], 3))
        print(f"{row['measured']}: {row['row']}: {row['before']:g} -> {row['after']:g} ({row['ratio']:g})")
    write_result(document | {"commit_before": commit, "rounds": args.rounds, "rows": rows}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
