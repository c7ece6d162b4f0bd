"""Which architectures a probe is right on.

``python -m bench.coverage`` writes ``bench/results/coverage.json`` and ``docs/coverage.md``, which says what is compared: for every
architecture of ``python_tests/architecture_table.py``, tiny, a probe and a model whose weights really are perturbed.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from bench.evidence import REPO, made_by, result_parser, write_result
from python_tests.architecture_table import ARCHITECTURES
from python_tests.coverage import check

Row = dict[str, Any]

SIDES = ("activation", "scratch")
_SEED = 0
_LETTERS = {"activation": "a", "shift": "s", "scratch": "w", "copy": "c", "inplace": "p"}
_PAGE = """# Architectures that a probe was checked on

{summary}

Made by `{command}`: PyTorch {torch}, transformers {transformers}, backend {backend}, commit {commit}, {date}.

A tiny model of each architecture, with random weights in fp32, is evaluated by a probe after two steps, and with weights that
really are perturbed. *Error* is the norm of the difference of the first output beyond what its last bits can hold, in units of the
norm of what the perturbation changes. *Sides* counts parameters: activation (a), shift (s: a bias beside it), scratch (w), copy
(c), in place (p). On the weight side the outputs are to be the same, bit for bit. *Moved* counts parameters that the check of the
first step took from the side that was chosen first.

| architecture | family | sides, asked for activation | error | sides, asked for scratch | same bits | moved |
|---|---|---|---|---|---|---|
{table}
"""


def measure(name: str, side: str) -> Row:
    """Checks one architecture with a side asked for. An error is a result too."""
    row: Row = {"name": name, "family": ARCHITECTURES[name].family, "side": side}
    try:
        found = dataclasses.asdict(check(name, side, seed=_SEED))
    except Exception as e:  # whatever a model or the probe raises
        return row | {"error": f"{type(e).__name__}: {e}".splitlines()[0]}
    return row | found | {"demoted": list(found["demoted"])}


def markdown(document: Row) -> str:
    """Formats the results as a page."""
    rows = document["rows"]
    table = [_line(name, {r["side"]: r for r in rows if r["name"] == name}) for name in dict.fromkeys(r["name"] for r in rows)]
    fields = {key: document[key] for key in ("command", "backend", "commit")} | {"date": document["date"][:10]}
    return _PAGE.format(**document["versions"], **fields, summary=_summary(rows), table="\n".join(table))


def _line(name: str, sides: dict[str, Row]) -> str:
    activation, scratch = (sides.get(side, {"error": "not run"}) for side in SIDES)
    error = activation.get("error") or _figure(activation["logits_error"])
    same = scratch.get("error") or ("yes" if scratch["same_bits"] else f"no: {_figure(scratch['logits_error'])}")
    moved = len(activation.get("demoted", ())) + len(scratch.get("demoted", ()))
    family = ARCHITECTURES[name].family
    return f"| {name} | {family} | {_sides(activation)} | {error} | {_sides(scratch)} | {same} | {moved or ''} |"


def _figure(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _sides(row: Row) -> str:
    return ", ".join(f"{row['sides'][side]} {letter}" for side, letter in _LETTERS.items() if row.get("sides", {}).get(side))


def _summary(rows: list[Row]) -> str:
    done = [r for r in rows if "error" not in r]
    names = {r["name"] for r in rows}
    worst = max((r["logits_error"] for r in done if r["side"] == "activation"), default=0.0)
    scratch = [r for r in done if r["side"] == "scratch"]
    same = sum(r["same_bits"] for r in scratch)
    text = f"{len(names)} architectures: largest error on the activation side {_figure(worst)}; same bits on the weight side in"
    return f"{text} {same} of {len(scratch)}; no weight touched in {sum(r['untouched'] for r in done)} of {len(rows)} runs."


def main(argv: list[str] | None = None) -> int:
    parser = result_parser(__doc__, "coverage.json")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of architectures (default: all)")
    parser.add_argument("--page", type=Path, default=REPO / "docs" / "coverage.md")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # the models are too small for more
    where = made_by("bench.coverage", argv)
    rows = []
    for name in options.only or ARCHITECTURES:
        rows += [measure(name, side) for side in SIDES]
        if any("error" in r for r in rows[-len(SIDES) :]):
            print(f"{name}: {next(r['error'] for r in rows[-len(SIDES) :] if 'error' in r)}", flush=True)
    document = where | {"seed": _SEED, "rows": rows}
    write_result(document, options.output)
    options.page.write_text(markdown(document), encoding="utf-8")
    print(_summary(rows))
    return 1 if any("error" in r for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
