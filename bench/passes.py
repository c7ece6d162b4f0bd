"""What a forward pass buys: update rules at equal numbers of forward passes, on the tasks of ``bench.learning``.

``python -m bench.passes llama`` (and ``minilm``) writes ``bench/results/passes_llama.json`` and a plot. Every rule gets the same
batches and the same budget of forward passes. Rates are two a decade; a grid on seed 0 goes on until its best has a worse one on
either side, and the other seeds take that. ``difference`` is the final dev loss beside LOZO's, mean and standard error over seeds
(paired); ``passes_to_lozo`` is the share of the budget after which the mean curve of a rule is where LOZO's ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.evidence import made_by, result_parser, write_result
from bench.learning import TASKS, Llama, MiniLM, Row, batches
from bench.plots import passes, save
from bench.rates import best_of_grid, rate_at
from lozo_kernels import LOZO, MeZO
from lozo_kernels.bench.environment import OtherLoad

BUDGETS = {"llama": 2000, "minilm": 20_000}
SCORED = 10
"""How often a run is scored."""
MOST = 9
"""Rates of a grid."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        kind: LOZO or MeZO; options: its arguments.
        begin: half decade of the first rate of its grid; None: the rate finds itself.
    """

    name: str
    kind: Any
    options: Row
    begin: int | None

    @property
    def forwards(self) -> int:
        """Forward passes of a step."""
        directions = self.options.get("directions", 1)
        return 2 * directions if self.options.get("two_sided", True) else 1 + directions


def rules(usual: int) -> tuple[Rule, ...]:
    """The rules, whose rates for c as it is begin at a half decade."""
    one_sided = {"two_sided": False, "directions": 7}
    return (
        Rule("LOZO", LOZO, {}, usual),
        Rule("LOZO, 7 one-sided", LOZO, one_sided, usual + 1),
        Rule("LOZO, auto", LOZO, {}, None),
        Rule("LOZO, 7 one-sided, auto", LOZO, one_sided, None),
        Rule("LOZO, 7 one-sided, spread", LOZO, one_sided | {"normalise": "spread"}, -5),
        Rule("MeZO", MeZO, {}, usual),
        Rule("LOZO, scalar", LOZO, {"normalise": "scalar"}, -5),
        Rule("LOZO-M", LOZO, {"momentum": 0.9}, usual),
    )


@torch.no_grad()
def run(task: Llama | MiniLM, rule: Rule, half_decade: int | None, seed: int, budget: int) -> Row:
    """Trains once; returns scores along the forward passes."""
    model, order = task.model().eval(), batches(task.examples["train"], task.batch, seed)
    shape = {} if rule.kind is MeZO else {"rank": 2, "interval": 50}
    rate = "auto" if half_decade is None else rate_at(half_decade)
    optimizer = rule.kind(model, lr=rate, eps=1e-3, seed=seed, **shape, **rule.options)
    spent, seconds = 0, 0.0
    points = [{"passes": 0, "seconds": 0.0, **task.score(model)}]
    while spent < budget:
        index = next(order)
        halves = [index[: len(index) // 2], index[len(index) // 2 :]] if optimizer.measures_next else [index]
        # A step that measures goes to F(0) and to both sides of every direction.
        spent += 1 + 2 * optimizer.directions if optimizer.measures_next else rule.forwards
        start = time.perf_counter()
        loss = optimizer.step([lambda part=part: task.loss(model, part) for part in halves])
        seconds += time.perf_counter() - start
        if not bool(torch.isfinite(loss)):
            break
        if spent >= min(budget, len(points) * budget // SCORED):
            points.append({"passes": spent, "seconds": round(seconds, 2), **task.score(model)})
    optimizer.handle.restore()
    return {"rule": rule.name, "lr": rate, "seed": seed, "ended": spent >= budget, "points": points}


def final(row: Row) -> float:
    """The last dev loss; infinite for a run that ended early."""
    return row["points"][-1]["loss"] if row["ended"] else math.inf


def compare(runs: Sequence[Row]) -> list[Row]:
    """Every rule beside LOZO at its best rate: paired differences, and the passes after which it is where LOZO ends."""
    chosen = {name: [r for r in runs if r["rule"] == name and r["best"]] for name in dict.fromkeys(r["rule"] for r in runs)}
    ends = {r["seed"]: final(r) for r in chosen["LOZO"]}
    goal, rows = statistics.mean(ends.values()), []
    for name, some in chosen.items():
        differences = [final(r) - ends[r["seed"]] for r in some]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
        rows.append(
            {
                "rule": name,
                "lr": some[0]["lr"],
                "final": statistics.mean(map(final, some)),
                "difference": statistics.mean(differences),
                "standard_error": error,
                "passes_to_lozo": _reached(some, goal),
            }
        )
    return rows


def _reached(runs: Sequence[Row], goal: float) -> float | None:
    """The share of the budget after which the mean loss is at the goal, between two scores along a straight line."""
    curve = [
        (statistics.mean(p["passes"] for p in at), statistics.mean(p["loss"] for p in at))
        for at in zip(*(r["points"] for r in runs), strict=False)
    ]
    for (x, y), (x2, y2) in itertools.pairwise(curve):
        if y2 <= goal:
            return (x + (x2 - x) * (y - goal) / (y - y2)) / curve[-1][0]
    return None


def main(argv: list[str] | None = None) -> int:
    parser = result_parser(__doc__, "passes_TASK.json")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--passes", type=int)
    parser.add_argument("--seeds", type=int, default=5)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    task, budget = TASKS[args.task](), args.passes or BUDGETS[args.task]
    output: Path = args.output.with_name(args.output.name.replace("TASK", args.task))
    others, document, runs = OtherLoad(), made_by("bench.passes", argv), []
    document |= {"task": task.name, "unit": "dev loss", "passes": budget, "batch_size": task.batch, "examples": task.examples}
    for rule in rules({"llama": -8, "minilm": -6}[args.task]):

        def attempt(half_decade: int | None, seed: int = 0, rule: Rule = rule) -> Row:
            row = run(task, rule, half_decade, seed, budget)
            print(f"{rule.name}, lr {row['lr']}, seed {seed}: {final(row):.4f}", flush=True)
            return row

        best, tried = None, {}
        if rule.begin is None:
            tried[0] = attempt(None)
        else:
            best, tried = best_of_grid(rule.name, [rule.begin], attempt, final, MOST)
        lr = "auto" if best is None else rate_at(best)
        runs += [tried[i] | {"best": tried[i]["lr"] == lr} for i in sorted(tried)]
        runs += [attempt(best, seed) | {"best": True} for seed in range(1, args.seeds)]
        done = document | {"cpus_used_by_others": others.mean(), "rules": compare(runs), "runs": runs}
        write_result(done, output)
        save(passes(done), done, output.with_suffix(".png"))
    for row in done["rules"]:
        error = "" if row["standard_error"] is None else f" +- {row['standard_error']:.4f}"
        share = "never" if row["passes_to_lozo"] is None else f"{row['passes_to_lozo']:.2f}"
        print(f"{row['rule']:28} {row['final']:.4f}  {row['difference']:+.4f}{error}  at LOZO's end after {share}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
