"""Generated cases over the public API: each ends in the right answer, or in an error that the library raised on purpose.

``python bench/api_fuzz.py --cases 10000`` writes ``bench/results/api_fuzz.json``: the cases of each entry, how many were answered,
and which errors the others ended in. Answers are compared with ``reference.py``, ``noise.py`` or plain arithmetic, with everything
in the storage around the tensors; after an error all of it must be what it was. A case that ends otherwise is shrunk and printed.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bench import api_fuzz_journal, api_fuzz_models, api_fuzz_noise, api_fuzz_ops, api_fuzz_optim
from bench.api_fuzz_cases import Choices
from lozo_kernels.bench.environment import environment

ENTRIES: dict[str, tuple[Callable[[Choices], str], int]] = {
    "TensorTable and the ops": (api_fuzz_ops.run_op, 38),
    "noise functions": (api_fuzz_noise.run_noise, 8),
    "products of activations": (api_fuzz_noise.run_skinny, 10),
    "PatchConfig": (api_fuzz_models.run_config, 6),
    "patch() and handles": (api_fuzz_models.run_handle, 12),
    "optimisers": (api_fuzz_optim.run_optimizer, 12),
    "states of optimisers": (api_fuzz_optim.run_state, 5),
    "journals": (api_fuzz_journal.run_journal, 4),
    "export_lora()": (api_fuzz_journal.run_export, 2),
    "gradient estimators": (api_fuzz_journal.run_gradients, 3),
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


def fuzz_all(cases: int, seed: int, progress: Callable[[str], None] = lambda line: None) -> list[dict]:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, help="default: a fresh one")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "api_fuzz.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    start = time.perf_counter()
    rows = fuzz_all(arguments.cases, seed, lambda line: print(line, flush=True))
    where = environment(torch.device("cpu"), [])
    where["command"] = f"python bench/api_fuzz.py --cases {arguments.cases} --seed {seed}"
    document = {
        "cases": sum(row["cases"] for row in rows),
        "findings": 0,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "hypothesis": hypothesis.__version__,
        "entries": rows,
        **where,
    }
    Path(arguments.output).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
