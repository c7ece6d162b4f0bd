"""Journals of sharded models: replayed in one process or in other shards, and gone on with by fewer."""

import pytest
import torch
from torch import distributed

from lozo_kernels import PeerLostError

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch.distributed or its gloo backend is missing", allow_module_level=True)

import os
import signal

from lozo_kernels.journal import Journal, diff, read_journal, replay
from python_tests.machine import wait_until
from python_tests.models import full
from python_tests.parallel_helpers import finish, logs, start
from python_tests.test_sharded_parallel import Model, cut, ended, examples, fully, make, mesh_of, same, train

STEPS, LAST = 7, 4  # LAST: the step during which a process is killed
WAYS = {
    "rows": ("lozo-m", {}),
    "dense": ("mezo-m", {}),
    "probe": ("lozo-m", {"placement": "probe", "side": "scratch"}),
    "tensor parallel": ("lozo-m", {}),
}


def sharded(way, ranks):
    model = Model()
    return (cut if way == "tensor parallel" else fully)(model, mesh_of(ranks))


def whole(model):
    return {name: full(p) for name, p in model.state_dict().items()}


def recording(rank, ranks, folder, ways):
    for way in ways:
        method, options = WAYS[way]
        model = sharded(way, ranks)
        optimizer = make(method, model, **options)
        with Journal.create(folder / f"{way}-{rank}.journal", optimizer):
            train(optimizer, model, STEPS, [0])
        found = ended(optimizer, model)
        if rank == 0:
            torch.save(found, folder / f"{way}.pt")


def replaying(rank, ranks, folder, ways):
    for way in ways:
        model = sharded(way, ranks)
        assert replay(model, folder / f"{way}-0.journal").agrees is True
        expected = torch.load(folder / f"{way}.pt")["weights"]
        assert all(torch.equal(p, expected[name]) for name, p in whole(model).items())


def losing(rank, ranks, folder):
    """One process dies in the middle of a step."""
    model = sharded("rows", ranks)
    optimizer = make("lozo-m", model)
    journal = Journal.create(folder / f"lost-{rank}.journal", optimizer)

    def loss(step, part):
        if rank == 1 and step == LAST:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(examples(step, part))

    try:
        for step in range(STEPS):
            optimizer.step(lambda step=step: loss(step, rank))
    except (PeerLostError, RuntimeError):  # whichever notices first: the forward that FSDP gathers weights for, or the exchange
        journal.close()
        os._exit(3)


def going_on(rank, ranks, folder):
    model = sharded("rows", ranks)
    optimizer = make("lozo-m", model)
    assert Journal.resume(folder / f"lost-{2 * rank}.journal", optimizer) == LAST
    train(optimizer, model, STEPS, [0, 1, 2])
    optimizer.journal.finish()
    torch.save(ended(optimizer, model), folder / f"on-{rank}.pt")


def test_a_sharded_run_is_replayed_anywhere(tmp_path):
    assert finish(start(3, tmp_path, recording, [w for w in WAYS if w != "tensor parallel"])) == [0] * 3, logs(tmp_path)
    assert finish(start(2, tmp_path, recording, ["tensor parallel"])) == [0] * 2, logs(tmp_path)
    for way in WAYS:
        model = Model()
        assert replay(model, tmp_path / f"{way}-1.journal").agrees is True
        expected = torch.load(tmp_path / f"{way}.pt")["weights"]
        assert all(torch.equal(p, expected[name]) for name, p in whole(model).items())
        assert diff(tmp_path / f"{way}-0.journal", tmp_path / f"{way}-1.journal") is None
    assert finish(start(2, tmp_path, replaying, list(WAYS))) == [0] * 2, logs(tmp_path)


def test_a_sharded_run_that_lost_a_process_goes_on_with_fewer(tmp_path):
    processes = start(3, tmp_path, losing)
    wait_until(lambda: all(p.exitcode is not None for p in processes))
    assert [p.exitcode for p in processes] == [3, -signal.SIGKILL, 3], logs(tmp_path)
    assert read_journal(tmp_path / "lost-0.journal").steps == LAST
    assert finish(start(2, tmp_path, going_on)) == [0] * 2, logs(tmp_path)
    model = Model()
    optimizer = make("lozo-m", model)
    train(optimizer, model, STEPS, [0, 1, 2])
    expected = ended(optimizer, model)
    assert all(same(torch.load(tmp_path / f"on-{rank}.pt"), expected) for rank in range(2))
