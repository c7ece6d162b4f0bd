"""A rank that dies or hangs stops the others at once, and those that are left go on where the run was."""

import copy
import os
import signal
import time

import pytest
import torch
from torch import distributed

from lozo_kernels import LOZO, Parallel, PeerLostError

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch.distributed or its gloo backend is missing", allow_module_level=True)

from python_tests.machine import stretched, wait_until
from python_tests.models import same
from python_tests.parallel_helpers import Model, batch, finish, logs, start

STEPS, LAST = 7, 4  # LAST: the step during which a rank is lost
PLACEMENTS = {"probe": {"placement": "probe", "side": "scratch"}, "in place": {"fuse_steps": True}}
# name: (placement, ranks, the one that is lost, signal, how many ranks go on)
CASES = {
    "one of four": ("probe", 4, 2, signal.SIGKILL, 3),
    "in place": ("in place", 3, 1, signal.SIGKILL, 2),
    "the first": ("probe", 3, 0, signal.SIGKILL, 2),
    "one that hangs": ("probe", 2, 1, signal.SIGSTOP, 1),
}


def build(placement, parallel=None):
    model = Model()
    options = {"lr": 3e-2, "eps": 1e-2, "interval": 3, "seed": 9, "momentum": 0.9}
    return model, LOZO(model, **options, **PLACEMENTS[placement], parallel=parallel)


def step(model, optimizer, parts=1, part=0, during=lambda _: None):
    calls = []

    def closure(rows):
        calls.append(None)
        during(len(calls))
        return model(rows)

    optimizer.step(closure, batch(optimizer.steps_done).chunk(parts)[part])


def checkpoint(model, optimizer):
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": optimizer.steps_done})


def lose(rank, ranks, folder, case, timeout):
    """Runs until a rank is lost, and saves what this one knows then."""
    placement, _, victim, number, _ = CASES[case]
    distributed.barrier()  # the time that the slowest takes to get here is not part of the timeout
    model, optimizer = build(placement, Parallel("examples", timeout=timeout))

    def die(calls):
        if rank == victim and optimizer.steps_done == LAST and calls == 2:
            (folder / "pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), number)

    # The weights that are moved in place are those of a checkpoint; a probe's are where they were.
    kept = checkpoint(model, optimizer)
    try:
        while True:
            step(model, optimizer, ranks, rank, die)
            if placement == "in place":
                kept = checkpoint(model, optimizer)
    except PeerLostError as error:
        found = {"message": str(error), "when": time.time(), "left": checkpoint(model, optimizer)}
        found["kept"] = kept if placement == "in place" else found["left"]
        torch.save(found, folder / f"lost-{rank}.pt")
        os._exit(3)  # as an uncaught error would, without waiting for the group


def go_on(rank, ranks, folder, case):
    """Goes on from a checkpoint with another number of ranks."""
    placement, before, victim, *_ = CASES[case]
    model, optimizer = build(placement, "examples")
    saved = torch.load(folder / f"lost-{(victim + 1) % before}.pt", weights_only=False)["kept"]
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    while optimizer.steps_done < STEPS:
        step(model, optimizer, ranks, rank)
        if placement == "in place":
            checkpoint(model, optimizer)
    torch.save(checkpoint(model, optimizer), folder / f"end-{rank}.pt")


def undisturbed(placement):
    """Checkpoints of a run of one process after the last complete step, taken there, and at the end."""
    model, optimizer = build(placement)
    taken = {}
    while optimizer.steps_done < STEPS:
        step(model, optimizer)
        if placement == "in place" or optimizer.steps_done == LAST:  # saving brings weights up to date, which rounds once more
            taken[optimizer.steps_done] = checkpoint(model, optimizer)
    return taken[LAST], checkpoint(model, optimizer)


@pytest.mark.parametrize("case", CASES)
def test_the_others_stop_and_fewer_or_more_go_on(tmp_path, case):
    placement, ranks, victim, number, others = CASES[case]
    # A rank that ends is noticed at once, one that hangs only when the timeout is over.
    started = start(ranks, tmp_path, lose, case, stretched(1.5) if number == signal.SIGSTOP else 300.0)
    survivors = [rank for rank in range(ranks) if rank != victim]
    wait_until(lambda: all(started[rank].exitcode is not None for rank in survivors))
    stopped = [started[rank].exitcode for rank in survivors]
    lost_at = (tmp_path / "pid").stat().st_mtime
    started[victim].kill()
    wait_until(lambda: started[victim].exitcode is not None)
    assert stopped == [3] * (ranks - 1) and started[victim].exitcode == -signal.SIGKILL, logs(tmp_path)
    before, end = undisturbed(placement)
    for rank in survivors:
        found = torch.load(tmp_path / f"lost-{rank}.pt", weights_only=False)
        took = found["when"] - lost_at
        assert took < 30 or took < stretched(30)
        assert f"The last complete step is {LAST - 1}" in found["message"] and "start again with the ranks" in found["message"]
        if victim and number == signal.SIGKILL:
            assert found["message"].startswith(f"rank {victim} is gone")
        assert found["kept"]["step"] == LAST and same(found["kept"]["model"], before["model"])
        for name, p in found["left"]["model"].items():
            assert torch.allclose(p, before["model"][name], rtol=1e-5, atol=1e-5)
    assert finish(start(others, tmp_path, go_on, case)) == [0] * others, logs(tmp_path)
    for rank in range(others):
        found = torch.load(tmp_path / f"end-{rank}.pt", weights_only=False)
        assert found["step"] == STEPS and same(found["model"], end["model"])
        assert all(
            torch.equal(v["momentum"], end["optimizer"]["state"][n]["momentum"]) for n, v in found["optimizer"]["state"].items()
        )
