"""Runs that are killed: each is gone on with from its journal, and has to end in the bits of the run that nobody killed."""

import functools
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lozo_kernels import AGZO, GRZO, LOZO
from lozo_kernels.journal import Journal, diff, read_journal
from python_tests.processes import forked

KINDS: dict[str, dict[str, Any]] = {
    "in place": {"dtype": torch.bfloat16, "fuse_steps": True},
    "probe": {"dtype": torch.bfloat16, "placement": "probe"},
    "LOZO-M, probe": {"dtype": torch.float32, "placement": "probe", "momentum": 0.9},
    "AGZO, probe": {"dtype": torch.bfloat16, "placement": "probe", "momentum": 0.9, "method": AGZO},
    "LOZO-M, in place": {"dtype": torch.float32, "momentum": 0.9},
    "GRZO": {"dtype": torch.bfloat16, "method": GRZO, "directions": 4},
}
STEPS = 400


def small() -> nn.Module:
    """17 symbols to as many logits."""
    return nn.Sequential(nn.Embedding(17, 12), nn.Linear(12, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 17))


def train(kind: str, journal: Path, result: Path, steps: int = STEPS, build: Callable[[], nn.Module] = small) -> None:
    """A run of a small model, from its beginning or from where its journal ends; writes its weights.

    Its learning rate changes at every step, and now and then it looks at ``state_dict()``, which merges or flushes.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "not guided by inputs")
    options = dict(KINDS[kind])
    model = build().to(options.pop("dtype"))
    method = options.pop("method", LOZO)
    optimizer = method(model, lr=1e-2, eps=1e-2, interval=13, **options)
    first = 0
    if journal.exists():
        first = Journal.resume(journal, optimizer)
    else:
        Journal.create(journal, optimizer)
    for step in range(first, steps):
        if step % 31 == 0:
            model.state_dict()
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 17, (4, 7), generator=generator)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        if method is GRZO:
            optimizer.step(functools.partial(_losses, model), tokens)
        else:
            optimizer.step(lambda x=tokens: _losses(model, x).mean())
    assert optimizer.journal is not None
    optimizer.journal.finish()
    optimizer.handle.restore()
    half = result.with_suffix(".half")
    torch.save(model.state_dict(), half)
    half.replace(result)


def _losses(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    output = model(tokens[:, :-1])
    logits = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def instant(rng: random.Random, journal: Path, size: int) -> Callable[[], bool]:
    """A random moment: mostly when a journal has grown to some bytes and a little later, so that no phase of a step is spared; now
    and then soon after the start, when it is begun or replayed."""
    begun, least = time.monotonic(), 0
    if journal.exists():
        least = journal.stat().st_size
    if rng.random() < 0.2:
        wait = rng.uniform(0, 0.5)
        return lambda: time.monotonic() > begun + wait
    bytes_, later = least + (size - least) * rng.random() ** 2, rng.uniform(0, 0.004)
    reached: list[float] = []

    def enough() -> bool:
        if not reached and journal.exists() and journal.stat().st_size > bytes_:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() > reached[0] + later

    return enough


def kill_runs(
    kind: str, kills: int, folder: Path, rng: random.Random, steps: int = STEPS, build: Callable[[], nn.Module] = small
) -> dict[str, Any]:
    """Kills runs of one kind at random instants, so many times in all.

    Args:
        build: makes the model, of at least 17 tokens and the same at each call with the same seed.

    Returns:
        How many kills and whole runs there were, and at how many steps the kills came.

    Raises:
        AssertionError: a run did not end as the undisturbed one; JournalError: a kill left a journal that cannot be read.
    """
    calm, calm_result = folder / "calm.journal", folder / "calm.pt"
    train(kind, calm, calm_result, steps, build)  # here, so that what it imports is there in every fork
    expected = torch.load(calm_result)
    done, runs, instants = 0, 0, []
    while done < kills:
        journal, result = folder / f"killed{runs}.journal", folder / f"killed{runs}.pt"
        again = functools.partial(train, kind, journal, result, steps, build)
        while done < kills and not forked(again, instant(rng, journal, calm.stat().st_size)):
            done += 1
            instants.append(read_journal(journal).steps if journal.exists() else 0)
        if not result.exists():
            forked(again)
        found = torch.load(result)
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found), f"{kind}: other weights"
        assert diff(calm, journal) is None, f"{kind}: {diff(calm, journal)}"
        runs += 1
    return {"kind": kind, "kills": done, "runs": runs, "steps_at_kills": instants}
