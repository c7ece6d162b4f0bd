"""What the package costs the host, beside another checkout of it, in one run: ``python -m bench.overhead --before DIR``.

It writes ``bench/results/overhead.json``: the calls of a step (``bench/calls.py``), and the passes of ``python -m bench host`` in
rounds that take turns, each a process of its own; of the medians of the rounds the median, and the ratio of this checkout to the
other one. DIR is a clone at another commit, in which the native library is built.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.evidence import REPO, made_by, result_parser, write_result

CALLS = REPO / "bench" / "calls.py"


def run(checkout: Path, *words: str) -> Any:
    """Runs Python on a checkout; returns the JSON that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, *words], cwd=checkout, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def host(checkout: Path, repeats: int) -> dict[str, float]:
    """The median microseconds of each pass."""
    program = ("bench",) if (checkout / "bench" / "host.py").exists() else ("lozo_kernels", "bench")  # where it was before
    found = run(checkout, "-m", *program, "host", "--json", "--repeats", str(repeats))
    return {row["pass"]: row["median"] for row in found["rows"]}


def main() -> int:
    parser = result_parser(__doc__, "overhead.json")
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=7, help="(default: 7)")
    parser.add_argument("--repeats", type=int, default=300, help="passes of each kind in a round (default: 300)")
    args = parser.parse_args()
    words = ["DIR" if word == str(args.before) else word for word in sys.argv[1:]]  # a path means nothing elsewhere
    document = made_by("bench.overhead", words)
    before, after = args.before.resolve(), REPO
    head = ("git", "-C", str(before), "rev-parse", "--short=12", "HEAD")
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    was, now = (run(place, str(CALLS)) for place in (before, after))
    rows = [{"measured": "calls of a step", "row": name, "before": was[name], "after": now[name]} for name in now]
    rounds: dict[Path, list[dict[str, float]]] = {before: [], after: []}
    for i in range(args.rounds):
        for place in (before, after) if i % 2 == 0 else (after, before):
            rounds[place].append(host(place, args.repeats))
    for name in rounds[after][0]:
        was, now = (statistics.median(found[name] for found in rounds[place]) for place in (before, after))
        rows.append({"measured": "host microseconds of a pass", "row": name, "before": was, "after": now})
    for row in rows:
        row["ratio"] = round(row["after"] / row["before"], 3)
        print(f"{row['measured']}: {row['row']}: {row['before']:g} -> {row['after']:g} ({row['ratio']:g})")
    write_result(document | {"commit_before": commit, "rounds": args.rounds, "rows": rows}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
