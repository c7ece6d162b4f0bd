"""The journal: what it costs, how fast a run is replayed, and whether kills, damage and other backends leave its promise whole.

``python -m bench.journal`` writes ``bench/results/journal_cpu.json`` in less than four minutes of one thread. ``--fuzz 1000000``
and ``--kills 50`` run the long forms of two tests, ``--atheris 1000000`` reads inputs that follow the parser's branches; each adds
what it found to the same file.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from itertools import starmap

import torch
from torch import nn

from bench.evidence import CPU, made_by, result_parser, write_result
from lozo_kernels import LOZO, StepInfo
from lozo_kernels.bench.models import build_model
from lozo_kernels.journal import Journal, Sides, StepTaken, read_journal, replay
from lozo_kernels.journal.fingerprint import fingerprint
from lozo_kernels.kernels.backends import native
from lozo_kernels.kernels.registry import backend_names, choose_backend
from python_tests.fuzz import journal_atheris
from python_tests.fuzz.journal_kills import KINDS, kill_runs
from python_tests.fuzz.journal_mutations import fuzz

LONG_RUN = 20_000
LONGER = 25
"""Times that the steps of a run are replayed, so that what is done once does not count."""


def seconds_of(function: Callable[[], Any]) -> float:
    """Times a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def writing(folder: Path, model: str) -> dict[str, Any]:
    """Writes 20,000 steps whose learning rate changes at every step; returns bytes, and the time that the writer adds to a step."""
    net = build_model(model, torch.bfloat16, CPU)
    optimizer = LOZO(net, lr=1e-6, placement="probe")
    tokens = torch.randint(0, 1000, (1, 4))
    start = time.perf_counter()
    fingerprint(optimizer.handle)
    hashing = time.perf_counter() - start
    journal = Journal.create(folder / "long.journal", optimizer)
    optimizer.step(lambda: net(input_ids=tokens, labels=tokens).loss)
    header = (folder / "long.journal").stat().st_size
    no, zero = torch.tensor(False), torch.zeros((), dtype=torch.int64)
    losses = torch.zeros(1, dtype=torch.float64)
    cs = torch.randn(LONG_RUN, 1, dtype=torch.float64).unbind()
    start = time.perf_counter()
    for i in range(1, LONG_RUN):
        optimizer.param_groups[0]["lr"] = 1e-6 * (1 - i / LONG_RUN)
        journal.add_step(optimizer, StepInfo(i, losses[0], losses, losses, cs[i], no, zero, zero, zero, losses))
    seconds = time.perf_counter() - start
    journal.close()
    size = (folder / "long.journal").stat().st_size
    reading = seconds_of(lambda: read_journal(folder / "long.journal"))
    weights = sum(p.numel() * p.element_size() for p in optimizer.handle.parameters)
    optimizer.handle.restore()
    return {
        "model": model,
        "steps": LONG_RUN,
        "bytes": size,
        "bytes_of_header_sides_and_first_step": header,
        "bytes_per_step": (size - header) / (LONG_RUN - 1),
        "write_us_per_step": seconds / (LONG_RUN - 1) * 1e6,
        "read_s": reading,
        "weights_bytes": weights,
        "fingerprint_s": hashing,
        "fingerprint_gb_per_s": weights / hashing / 1e9,
    }


def replaying(folder: Path, model: str, options: dict[str, Any], steps: int, batch: int, tokens: int) -> dict[str, Any]:
    """Times a training step, and the same step replayed."""
    torch.manual_seed(0)
    net = build_model(model, torch.bfloat16, CPU)
    base = copy.deepcopy(net)
    optimizer = LOZO(net, lr=1e-6, rank=4, **options)
    path = folder / f"{optimizer.handle.config.placement}.journal"
    journal, times = Journal.create(path, optimizer), []
    for _ in range(steps):
        ids = torch.randint(0, 1000, (batch, tokens))
        times.append(seconds_of(lambda x=ids: optimizer.step(lambda: net(input_ids=x, labels=x).loss)))
    journal.finish()
    optimizer.handle.restore()
    run = read_journal(path)
    taken = [r for r in run.records if isinstance(r, StepTaken)] * LONGER
    longer = dataclasses.replace(run, records=[*(r for r in run.records if isinstance(r, Sides)), *taken])
    whole = seconds_of(lambda: replay(copy.deepcopy(base), longer))
    fixed = min(seconds_of(lambda: replay(copy.deepcopy(base), run, upto=0)) for _ in range(3))
    found = replay(base, path)
    equal = all(starmap(torch.equal, zip(base.parameters(), net.parameters(), strict=True)))
    training = sorted(times[1:])[len(times[1:]) // 2]
    again = (whole - fixed) / len(taken)
    return {
        "model": model,
        "dtype": "bfloat16",
        **options,
        "rank": 4,
        "steps": steps,
        "tokens": batch * tokens,
        "training_step_s": training,
        "replayed_step_s": again,
        "ratio": again / training,
        "fixed_s": fixed,
        "equal": equal and found.agrees is True,
    }


def elsewhere(folder: Path, steps: int, interpreted: bool = True) -> list[dict[str, Any]]:
    """Replays a probe's run in bf16 on native kernels on every backend and instruction set that serves this CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 13)).to(torch.bfloat16)
    base, ids = copy.deepcopy(model), torch.randint(0, 13, (6, 9))
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, placement="probe", backend="native")
    path = folder / "elsewhere.journal"
    with Journal.create(path, optimizer):
        for _ in range(steps):
            optimizer.step(lambda: nn.functional.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten()))
    optimizer.handle.restore()
    rows = []
    for backend in backend_names():
        if backend == "triton" and not interpreted:
            continue
        try:
            choose_backend(CPU, backend)
        except RuntimeError:
            continue
        for isa in native.supported_isas() if backend == "native" else [None]:
            native.set_isa(isa)
            copied = copy.deepcopy(base)
            start = time.perf_counter()
            replay(copied, path, backend=backend)
            seconds = time.perf_counter() - start
            equal = all(starmap(torch.equal, zip(copied.parameters(), model.parameters(), strict=True)))
            rows.append({"backend": backend, "isa": isa, "steps": steps, "equal": equal, "seconds": seconds})
    native.set_isa(None)
    return rows


def main() -> int:
    """Runs what was asked for."""
    parser = result_parser(__doc__, "journal_cpu.json")
    parser.add_argument("--fuzz", type=int, default=0, help="read so many mutated journals, and nothing else")
    parser.add_argument("--atheris", type=int, default=0, help="read so many that atheris makes up, and nothing else")
    parser.add_argument("--kills", type=int, default=0, help="kill runs so many times, and nothing else")
    parser.add_argument("--seed", type=int, default=None, help="of these (default: a new one)")
    parser.add_argument("--model", default="opt-125m", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="to train and replay (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    known = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    found: dict[str, Any] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.fuzz:
            print(f"seed {seed}")
            found["fuzz"] = fuzz(args.fuzz, seed) | {"seed": seed}
        if args.atheris:
            print(f"seed {seed}")
            found["atheris"] = journal_atheris.run(args.atheris, seed)
        if args.kills:
            print(f"seed {seed}")
            found["kills"] = _kills(args.kills, folder, random.Random(seed)) | {"seed": seed}
        if not found:
            found["writing"] = writing(folder, args.model)
            places: tuple[dict[str, Any], ...] = ({"placement": "inplace"}, {"placement": "probe"})
            found["replay"] = [replaying(folder, args.model, place, args.steps, 16, 32) for place in places]
            found["backends"] = elsewhere(folder, 300)
    for name, value in found.items():
        print(name, json.dumps(value, indent=2))
    here = made_by("bench.journal", sys.argv[1:]) | {"seconds": time.perf_counter() - start}
    document = known | {key: {"environment": here, "found": value} for key, value in found.items()}
    write_result(document, args.output)
    return 0


def _kills(count: int, folder: Path, rng: random.Random) -> dict[str, Any]:
    """Kills so many runs in all, of every kind about equally many."""
    rows = []
    for i, kind in enumerate(KINDS):
        (folder / str(i)).mkdir()
        share = count // len(KINDS) + (i < count % len(KINDS))
        if share:
            rows.append(kill_runs(kind, share, folder / str(i), rng))
    return {"kills": sum(row["kills"] for row in rows), "kinds": rows}


if __name__ == "__main__":
    sys.exit(main())
