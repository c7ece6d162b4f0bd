"""What a forward pass buys: update rules at equal numbers of forward passes, on the cases of ``bench.passes_cases``.

``python -m bench.passes llama`` (``demo``, ``minilm``) writes ``bench/results/passes_llama.json`` and a plot. Every rule gets the
same batches and the same budget of forward passes. Rates are two a decade; a grid on seed 0 goes on until its best has a worse
one on either side, and the other seeds take that; if one of them ends above where it began, all take the next lower one.
``difference`` is the final dev loss beside LOZO's, mean and standard error over seeds (paired); ``passes_to_lozo`` is the share of
the budget after which the mean curve of a rule is where LOZO's ends.

Runs that the output has already are kept, each with the commit that made it, and only the others are made: a comparison takes
hours, and can be made in parts (``--only``, ``--seeds``). ``--anew`` makes all. Times are taken at the end, of all rules in turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.evidence import made_by, result_parser, write_result
from bench.learning import Row, batches
from bench.passes_cases import CASES
from bench.plots import passes, save
from bench.rates import best_of_grid, rate_at
from lozo_kernels import AGZO, GRZO, LOZO, MeZO, SubZero, ZOMuon
from lozo_kernels.bench.environment import OtherLoad

BUDGET = 2000
BEGIN = {"llama": -8, "demo": -7, "minilm": -8}
"""The half decade at which the grids of LOZO and MeZO begin."""
SCORED = 10
"""How often a run is scored."""
MOST = 9
"""Rates of a grid."""
WARM_UP, ROUNDS = 10, 24
"""Steps before times are taken, the first measurements of ``lr="auto"`` among them, and rounds of times."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        kind: an optimiser; options: its arguments.
        begin: half decade of the first rate of its grid; None: the rate finds itself.
    """

    name: str
    kind: Any
    options: Row
    begin: int | None


def rules(usual: int) -> tuple[Rule, ...]:
    """The rules, whose rates for c as it is begin at a half decade."""
    one_sided = {"two_sided": False, "directions": 7}
    split = {"placement": "probe", "evaluation": "split", "directions": 8}
    return (
        Rule("LOZO", LOZO, {}, usual),
        Rule("LOZO, 7 one-sided", LOZO, one_sided, usual + 1),
        Rule("LOZO, auto", LOZO, {}, None),
        Rule("LOZO, 7 one-sided, auto", LOZO, one_sided, None),
        Rule("LOZO, 7 one-sided, spread", LOZO, one_sided | {"normalise": "spread"}, -5),
        Rule("LOZO, 8 split", LOZO, split, usual),
        Rule("LOZO, scalar", LOZO, {"normalise": "scalar"}, -5),
        Rule("MeZO", MeZO, {}, usual),
        Rule("FZOO", MeZO, one_sided | {"directions_law": "rademacher", "normalise": "spread"}, -5),
        Rule("SubZero", SubZero, {"rank": 8, "interval": 500}, usual - 1),
        Rule("LOZO-M", LOZO, {"momentum": 0.9}, usual),
        Rule("AGZO", AGZO, {}, usual - 2),
        Rule("AGZO, 7 one-sided", AGZO, one_sided, usual - 1),
        Rule("AGZO, 7 one-sided, auto", AGZO, one_sided, None),
        Rule("AGZO, 8 split", AGZO, split | {"rank": 4}, usual - 1),
        Rule("AGZO, 8 split, auto", AGZO, split | {"rank": 4}, None),
        Rule("GRZO", GRZO, {"directions": 8}, -5),
        Rule("ZO-Muon", ZOMuon, {"rank": 16, "interval": 100}, -5),
    )


class Training:
    """One run: a model, its batches, and the optimiser of a rule.

    Args:
        half_decade: of the rate; None: it finds itself.
    """

    def __init__(self, case: Any, rule: Rule, half_decade: int | None, seed: int) -> None:
        self.model, self.rate = case.model().eval(), "auto" if half_decade is None else rate_at(half_decade)
        shape = {} if rule.kind is MeZO else {"rank": 2, "interval": 50}
        self.optimizer = rule.kind(self.model, lr=self.rate, seed=seed, **{"eps": 1e-3} | shape | rule.options)
        self._case, self._evaluated = case, 0
        self._order = batches(case.examples["train"], case.batch, seed)

    def step(self) -> tuple[torch.Tensor, float]:
        """Takes a step. Returns its loss and its forward passes of a batch: all that the optimiser asks for, checks included."""
        before = self._evaluated
        loss = self.optimizer.step(self._losses, torch.tensor(next(self._order)))
        return loss, (self._evaluated - before) / self._case.batch

    def _losses(self, index: torch.Tensor) -> Any:
        self._evaluated += len(index)
        return self._case.losses(self.model, index.tolist())


@torch.no_grad()
def run(case: Any, rule: Rule, half_decade: int | None, seed: int, budget: int) -> Row:
    """Trains once; returns scores along the forward passes."""
    training, spent = Training(case, rule, half_decade, seed), 0
    points = [{"passes": 0, **case.score(training.model)}]
    while spent < budget:
        loss, forwards = training.step()
        spent += forwards
        if not bool(torch.isfinite(loss)):
            break
        if spent >= min(budget, len(points) * budget // SCORED):
            points.append({"passes": round(spent, 1), **case.score(training.model)})
    training.optimizer.handle.restore()
    return {"rule": rule.name, "lr": training.rate, "seed": seed, "ended": spent >= budget, "points": points}


@torch.no_grad()
def milliseconds(case: Any, some: Sequence[Rule]) -> dict[str, float]:
    """The time of a step over its forward passes, by rule: medians of rounds in which the rules take turns. Weights do not move."""
    trainings = [Training(case, rule, rule.begin, 0) for rule in some]
    for training in trainings:
        for group in training.optimizer.param_groups:
            group["lr"] = 0.0
    seen: dict[str, list[float]] = {rule.name: [] for rule in some}
    for turn in range(WARM_UP + ROUNDS):
        for rule, training in zip(some, trainings, strict=True):
            start = time.perf_counter()
            _, forwards = training.step()
            if turn >= WARM_UP:
                seen[rule.name].append(1e3 * (time.perf_counter() - start) / forwards)
    return {name: statistics.median(times) for name, times in seen.items()}


def final(row: Row) -> float:
    """The last dev loss; infinite for a run that ended early."""
    return row["points"][-1]["loss"] if row["ended"] else math.inf


def compare(runs: Sequence[Row], times: dict[str, float]) -> list[Row]:
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
                "ms_per_pass": times.get(name),
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


class Comparison:
    """The runs of a case, kept in a document that has them from earlier commands too.

    Args:
        head: what the document says of this command, ``case`` and budget included.
        anew: leave earlier runs out.
    """

    def __init__(self, case: Any, budget: int, head: Row, output: Path, *, anew: bool) -> None:
        same = {"task": case.name, "passes": budget, "batch_size": case.batch, "examples": case.examples}
        self._case, self._budget, self._output = case, budget, output
        self._head, self._others = head | same | {"unit": "dev loss"}, OtherLoad()
        earlier = json.loads(output.read_text(encoding="utf-8")) if output.exists() and not anew else {}
        known = earlier["runs"] if same.items() <= earlier.items() else []
        self.runs: list[Row] = [{"commit": earlier["commit"]} | row for row in known]

    def add(self, rule: Rule, seeds: int) -> None:
        """Makes what is missing of the runs of a rule."""

        def attempt(half_decade: int | None, seed: int = 0) -> Row:
            wanted = {"rule": rule.name, "lr": "auto" if half_decade is None else rate_at(half_decade), "seed": seed}
            for known in self.runs:
                if wanted.items() <= known.items():
                    return known
            self.runs.append(run(self._case, rule, half_decade, seed, self._budget) | {"commit": self._head["commit"]})
            print(f"{rule.name}, lr {wanted['lr']}, seed {seed}: {final(self.runs[-1]):.4f}", flush=True)
            return self.runs[-1]

        best = None if rule.begin is None else best_of_grid(rule.name, [rule.begin], attempt, final, MOST)[0]
        while True:
            of_seeds = [attempt(best, seed) for seed in range(seeds)]
            if best is None or all(final(row) <= row["points"][0]["loss"] for row in of_seeds):
                break
            best -= 1
        for row in self.runs:
            if row["rule"] == rule.name:
                row["best"] = best is None or row["lr"] == rate_at(best)

    def write(self, some: Sequence[Rule], *, timed: bool = False) -> list[Row]:
        """Writes document and plot. Returns its rows, one for each of the rules that has runs."""
        there = [rule for rule in some if any(r["rule"] == rule.name for r in self.runs)]
        order = {rule.name: i for i, rule in enumerate(some)}
        self.runs.sort(key=lambda r: (order[r["rule"]], r["seed"], str(r["lr"])))
        rows = compare(self.runs, milliseconds(self._case, there) if timed else {})
        done = self._head | {"cpus_used_by_others": self._others.mean(), "rules": rows, "runs": self.runs}
        write_result(done, self._output)
        if timed:
            save(passes(done), done, self._output.with_suffix(".png"))
        return rows


def table(rules: Sequence[Row]) -> str:
    """The rows of docs/benchmarks.md."""
    lines = ["| rule | rate | dev loss | beside LOZO | where LOZO ends after |", "|---|---|---|---|---|"]
    for row in rules:
        rate = row["lr"] if isinstance(row["lr"], str) else f"{row['lr']:.0e}".replace("e-0", "e-")
        error, share = row["standard_error"], row["passes_to_lozo"]
        beside = "" if row["rule"] == "LOZO" else f"{row['difference']:+.3f}" + ("" if error is None else f" +- {error:.3f}")
        reached = "" if row["rule"] == "LOZO" else "never" if share is None else f"{share:.2f} of its passes"
        name = row["rule"].replace("one-sided", "one-sided directions")
        lines.append(f"| {name} | {rate} | {row['final']:.3f} | {beside} | {reached} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = result_parser(__doc__, "passes_CASE.json")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--passes", type=int, default=BUDGET)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", action="append", help="rules whose name contains this, or another --only; LOZO comes with them")
    parser.add_argument("--anew", action="store_true", help="make runs again that the output has")
    parser.add_argument("--table", action="store_true", help="print the table of docs/benchmarks.md of the output, and make no run")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    output = args.output.with_name(args.output.name.replace("CASE", args.case))
    if args.table:
        print(table(json.loads(output.read_text(encoding="utf-8"))["rules"]))
        return 0
    comparison = Comparison(CASES[args.case](), args.passes, made_by("bench.passes", argv), output, anew=args.anew)
    some = rules(BEGIN[args.case])
    for rule in some:
        if args.only is None or rule.name == "LOZO" or any(part in rule.name for part in args.only):
            comparison.add(rule, args.seeds)
            comparison.write(some)
    for row in comparison.write(some, timed=True):
        error = "" if row["standard_error"] is None else f" +- {row['standard_error']:.4f}"
        share = "never" if row["passes_to_lozo"] is None else f"{row['passes_to_lozo']:.2f}"
        print(f"{row['rule']:28} {row['final']:.4f}  {row['difference']:+.4f}{error}  at LOZO's end after {share}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
