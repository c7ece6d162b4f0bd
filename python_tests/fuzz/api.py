"""Generated cases over the public API: each ends in the right answer, or in an error that the library raised on purpose.

``python -m python_tests.fuzz.api --cases 10000`` writes ``bench/results/api_fuzz.json``: the cases of each entry, how many were
answered, and which errors the others ended in. Answers are compared with ``reference.py``, ``noise.py`` or plain arithmetic, with
everything in the storage around the tensors; after an error all of it must be what it was. A case that ends otherwise is shrunk and
printed.
"""

from __future__ import annotations

import collections
import json
import random
import time
import warnings
from collections.abc import Callable

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bench.evidence import made_by, result_parser, write_result
from python_tests.fuzz import journals, models, noise, ops, optimizers
from python_tests.fuzz.choices import Choices

ENTRIES: dict[str, tuple[Callable[[Choices], str], int]] = {
    "TensorTable and the ops": (ops.run_op, 38),
    "noise functions": (noise.run_noise, 8),
    "products of activations": (noise.run_skinny, 10),
    "PatchConfig": (models.run_config, 6),
    "patch() and handles": (models.run_handle, 12),
    "optimisers": (optimizers.run_optimizer, 12),
    "states of optimisers": (optimizers.run_state, 5),
    "journals": (journals.run_journal, 4),
    "export_lora()": (journals.run_export, 2),
    "gradient estimators": (journals.run_gradients, 3),
}
"""What runs a case, and its share of the cases in percent."""

_ROUND = 500  # cases of one run of hypothesis, which begins with simple ones


def fuzz(entry: Callable[[Choices], str], count: int, seed: int) -> collections.Counter[str]:
    """Runs so many cases of an entry.

    Returns:
        How many ended in an answer, and in each kind of error.

    Raises:
        Finding: a case ended otherwise; it is the smallest that hypothesis found, and its notes say how it was drawn.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    rounds = 0
    while (left := count - outcomes.total()) > 0:

        @hypothesis.seed(seed + rounds)
        @settings(
            max_examples=min(left, _ROUND),
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(st.data())
        def run(data: st.DataObject) -> None:
            outcomes[entry(Choices(data))] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
        rounds += 1
    return outcomes


def fuzz_all(cases: int, seed: int, progress: Callable[[str], None] = lambda _: None) -> list[dict]:
    """A row for each entry: its cases by outcome, and how long they took."""
    counts = {name: cases * share // 100 for name, (_, share) in ENTRIES.items()}
    counts[next(iter(counts))] += cases - sum(counts.values())
    rows = []
    for name, (entry, _) in ENTRIES.items():
        start = time.perf_counter()
        outcomes = fuzz(entry, counts[name], seed)
        answers = outcomes.pop("answer", 0)
        row = {"entry": name, "cases": counts[name], "answers": answers, "errors": dict(outcomes.most_common())}
        rows.append(row | {"seconds": round(time.perf_counter() - start, 1)})
        progress(json.dumps(rows[-1]))
    return rows


def main() -> None:
    parser = result_parser(__doc__, "api_fuzz.json")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, help="default: a fresh one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    start = time.perf_counter()
    rows = fuzz_all(arguments.cases, seed, lambda line: print(line, flush=True))
    where = made_by("python_tests.fuzz.api", ["--cases", str(arguments.cases), "--seed", str(seed)])
    document = {
        "cases": sum(row["cases"] for row in rows),
        "findings": 0,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "hypothesis": hypothesis.__version__,
        "entries": rows,
        **where,
    }
    write_result(document, arguments.output)


if __name__ == "__main__":
    main()
