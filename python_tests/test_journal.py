"""Runs and their replays: the same bits on every backend, whatever happened in between; and what is refused."""

import copy
import errno
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.journal import elsewhere
from lozo_kernels import AGZO, LOZO, MeZO, SubZero, ZOMuon, capture_step
from lozo_kernels.journal import (
    Detour,
    Flushed,
    Guides,
    Journal,
    JournalError,
    Settled,
    diff,
    read_journal,
    replay,
    revert,
    verify,
)
from lozo_kernels.journal import arrivals as arrivals_module
from lozo_kernels.journal import file as file_module
from lozo_kernels.kernels.backends import native
from lozo_kernels.model import contract
from python_tests.journal_helpers import recorded, zoo
from python_tests.models import same, weights, zoo_loss

RUNS = [
    (LOZO, {}),
    (LOZO, {"fuse_steps": True, "momentum": 0.9}),
    (LOZO, {"directions": 3, "two_sided": False, "fuse_steps": True}),
    (LOZO, {"directions": 2, "rounding": "stochastic", "weight_decay": 0.1}),
    (MeZO, {"momentum": 0.9, "weight_decay": 0.1}),
    (SubZero, {"momentum": 0.5}),
    (LOZO, {"placement": "probe"}),
    (LOZO, {"placement": "probe", "momentum": 0.9, "directions": 3, "scaling": "published"}),
    (LOZO, {"placement": "probe", "rounding": "stochastic", "weight_decay": 0.1, "side": "scratch"}),
    (MeZO, {"placement": "probe", "two_sided": False}),
    (SubZero, {"placement": "probe"}),
    (ZOMuon, {"directions": 3, "two_sided": False, "fuse_steps": True, "weight_decay": 0.1}),
    (ZOMuon, {"placement": "probe", "momentum": 0.5}),
    (AGZO, {"fuse_steps": True}),
    (AGZO, {"momentum": 0.9, "placement": "probe"}),
]


@pytest.mark.parametrize(("kind", "options"), RUNS, ids=lambda x: x.__name__ if isinstance(x, type) else "-".join(x))
def test_replays_end_in_the_bits_of_the_run(tmp_path, rng, kind, options):
    """With an evaluation, a merge, a failing closure and a skipped update on the way."""
    path = tmp_path / "run"
    base, trained = recorded(path, zoo(), optimizer=kind, odd=True, **options)
    run = read_journal(path)
    assert run.steps == 9 and run.torn == 0
    assert [r.window for r in run.records if isinstance(r, Guides)] == ([0, 1, 2] if kind is AGZO else [])
    kinds = {type(r) for r in run.records}
    assert (Flushed in kinds) == ("fuse_steps" in options)
    assert (Detour in kinds) == ("placement" not in options)
    assert (Settled in kinds) == ("placement" in options and kind is not MeZO)
    backends = ["native"] if "momentum" in options and kind is not MeZO else ["native", "eager"]
    for backend in backends:
        copied = copy.deepcopy(base)
        found = replay(copied, path, backend=backend)
        assert found.steps == 9 and found.skipped == 1 and found.agrees is True
        assert same(weights(copied), weights(trained))


def test_every_backend_replays_a_probe(tmp_path):
    """The short form of what ``bench/journal.py`` does; of Triton's interpreter see below."""
    rows = elsewhere(tmp_path, 120, interpreted=False)
    assert all(row["equal"] for row in rows)
    assert {row["backend"] for row in rows} >= {"eager", "native"}
    assert [row["isa"] for row in rows if row["backend"] == "native"] == native.supported_isas()


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_begin_one_file_one_is_refused(tmp_path, monkeypatch, rng, links):
    """Also when neither saw the other's, as processes that start together do not."""
    optimizers = [LOZO(nn.Linear(3, 2)) for _ in range(2)]
    first = Journal.create(tmp_path / "run", optimizers[0])
    if links:
        monkeypatch.setattr(Path, "exists", lambda self: False)
    else:
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    with pytest.raises(JournalError, match="is there already"):
        Journal.create(tmp_path / "run", optimizers[1])
    monkeypatch.undo()
    optimizers[0].step(lambda: 1.0)
    first.finish()
    assert read_journal(tmp_path / "run").steps == 1 and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_tritons_interpreter_replays_a_probe(tmp_path):
    pytest.importorskip("triton")
    torch.manual_seed(1)
    model = nn.Linear(9, 7).to(torch.bfloat16)
    base, x = copy.deepcopy(model), torch.randn(4, 9).to(torch.bfloat16)
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, interval=5, placement="probe")
    with Journal.create(tmp_path / "run", optimizer):
        for _ in range(12):
            optimizer.step(lambda: model(x).float().square().mean())
    optimizer.handle.restore()
    assert replay(base, tmp_path / "run", backend="triton").agrees is True
    assert same(weights(base), weights(model))


def test_groups_with_settings_that_are_tensors(tmp_path, rng):
    model = zoo(torch.float32)
    base = copy.deepcopy(model)
    first = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": first[:3], "lr": torch.tensor(3e-3), "weight_decay": torch.tensor(0.0)},
        {"params": first[3:], "weight_decay": 0.2},
    ]
    optimizer = LOZO(model, groups, lr=1e-2, eps=1e-2)
    with Journal.create(tmp_path / "run", optimizer):
        for step in range(5):
            optimizer.param_groups[0]["lr"].mul_(0.9)
            optimizer.step(zoo_loss(model, step))
    optimizer.handle.restore()
    replay(base, tmp_path / "run")
    assert same(weights(base), weights(model))


@pytest.mark.parametrize("options", [{}, {"directions": 2, "two_sided": False}, {"placement": "probe"}])
def test_loops_that_call_backward(tmp_path, rng, options):
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 5).to(torch.bfloat16)

        def forward(self, x):
            return self.inner(x).float().square().mean()

    model = WithLoss()
    base = copy.deepcopy(model)
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, interval=3, drive="backward", **options)
    with Journal.create(tmp_path / "run", optimizer):
        for step in range(7):
            for _ in range(1 + step % 3):  # micro-batches
                model(torch.randn(3, 6).to(torch.bfloat16)).backward()
            optimizer.step()
    optimizer.handle.restore()
    records = read_journal(tmp_path / "run").records
    assert any(isinstance(r, Detour) for r in records) == (options != {"placement": "probe"})
    assert replay(base, tmp_path / "run").agrees is True
    assert same(weights(base), weights(model))


@pytest.mark.parametrize("fused", [False, True])
def test_captured_steps(tmp_path, rng, fused):
    model = zoo()
    base, loss = copy.deepcopy(model), zoo_loss(model)
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, interval=3, fuse_steps=fused)
    with Journal.create(tmp_path / "run", optimizer):
        step = capture_step(optimizer, loss)
        for _ in range(7):
            step()
        optimizer.step(loss)
    optimizer.handle.restore()
    assert replay(base, tmp_path / "run").agrees is True
    assert same(weights(base), weights(model))


def test_evaluations_that_share_a_forward_pass(tmp_path, rng):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    base, x = copy.deepcopy(model), torch.randn(5, 6)
    optimizer = LOZO(model, lr=1e-2, placement="probe", evaluation="batched", directions=2, interval=3)
    with Journal.create(tmp_path / "run", optimizer):
        for _ in range(5):
            optimizer.step(lambda batch: model(batch).square().mean(1), x)
    optimizer.handle.restore()
    assert replay(base, tmp_path / "run").agrees is True
    assert same(weights(base), weights(model))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_probe_with_a_parameter_that_is_moved(tmp_path, rng, momentum):
    """One that the closure uses outside of any module."""
    model = zoo()
    base, loss = copy.deepcopy(model), zoo_loss(model)
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, interval=3, placement="probe", momentum=momentum)
    with Journal.create(tmp_path / "run", optimizer):
        for _ in range(7):
            optimizer.step(lambda: loss() + model.up.weight.float().square().mean())
    moved = [m.name for m in optimizer.handle.members if m.side == "inplace"]
    optimizer.handle.restore()
    assert moved == ["up.weight"]
    assert replay(base, tmp_path / "run").agrees is True
    assert same(weights(base), weights(model))


def test_verify_and_revert(tmp_path, rng):
    path = tmp_path / "run"
    base, trained = recorded(path, zoo(), placement="probe")
    before = weights(base)
    assert verify(base, path).good and verify(base, path, trained).good and same(weights(base), before)
    with torch.no_grad():
        trained.up.weight[0, 0] += 1
    found = verify(base, path, trained)
    assert not found.good and found.differing == ("up.weight",)
    short, _ = recorded(tmp_path / "short", copy.deepcopy(base), steps=5, placement="probe")
    assert diff(path, tmp_path / "short").field in ("lr", "c")
    middle = copy.deepcopy(base)
    assert revert(middle, path, 5).agrees is None
    again = copy.deepcopy(base)
    replay(again, path, upto=5)
    assert same(weights(middle), weights(again)) and not same(weights(middle), weights(short))
    with pytest.raises(ValueError, match="has 9 steps, not 10"):
        revert(middle, path, 10)


def test_what_is_refused(tmp_path, rng, monkeypatch):
    path = tmp_path / "run"
    base, trained = recorded(path, zoo(), momentum=0.9)
    after = weights(trained)
    with pytest.raises(JournalError, match=r"starts from other weights: '.*' differs\. Give the model that the run started from"):
        replay(trained, path)
    with pytest.raises(JournalError, match="starts from other weights"):
        revert(trained, path, 3)
    with pytest.raises(
        JournalError, match=r"momentum carried from one V to the next has the same bits on that backend only, not on eager"
    ):
        replay(base, path, backend="eager")
    with pytest.raises(JournalError, match="another model"):
        replay(nn.Linear(3, 3), path)
    with pytest.raises(JournalError, match=r"dtype of '.*' is bfloat16 there and float32 here"):
        replay(copy.deepcopy(base).float(), path)
    optimizer = LOZO(base, eps=2e-2, momentum=0.9, interval=4)
    with pytest.raises(JournalError, match=r"other settings: eps is 0\.01 there and 0\.02 here"):
        Journal.resume(path, optimizer)
    optimizer.handle.restore()
    monkeypatch.setattr(contract, "CONTRACT_VERSION", 4)
    with pytest.raises(JournalError, match=r"made with version 3 of the contract .* this lozo_kernels makes version 4"):
        replay(base, path)
    assert same(weights(trained), after)


def test_a_full_disk_costs_one_error_and_no_weight(tmp_path, rng, monkeypatch):
    model, path = zoo(), tmp_path / "run"
    base, loss = copy.deepcopy(model), zoo_loss(model)
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, placement="probe")
    journal = Journal.create(path, optimizer)
    for _ in range(3):
        optimizer.step(loss)
    before = {m.name: m.b.clone() for m in optimizer.handle.members}
    real = os.pwrite

    def full(descriptor, data, offset):
        real(descriptor, data[:5], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_module.os, "pwrite", full)
    with pytest.raises(JournalError, match="No space left on device; it ends with the step before, and this one was not taken"):
        optimizer.step(loss)
    monkeypatch.undo()
    assert optimizer.steps_done == 3 and all(torch.equal(m.b, before[m.name]) for m in optimizer.handle.members)
    assert read_journal(path).steps == 3 and read_journal(path).torn == 0
    optimizer.step(loss)
    journal.finish()
    optimizer.handle.restore()
    assert replay(base, path).agrees is True and same(weights(base), weights(model))


@pytest.mark.parametrize("options", [{"fuse_steps": True}, {"placement": "probe"}])
def test_a_full_disk_between_steps(tmp_path, rng, monkeypatch, options):
    """What cannot be noted is not done, and not noted later either."""
    model, path = zoo(), tmp_path / "run"
    base, loss = copy.deepcopy(model), zoo_loss(model)
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, **options)
    journal = Journal.create(path, optimizer)
    optimizer.step(loss)
    before, size = weights(model), path.stat().st_size
    real = os.pwrite

    def full(descriptor, data, offset):
        real(descriptor, data[:2], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_module.os, "pwrite", full)
    with pytest.raises(JournalError, match="No space left on device"):
        model.state_dict()
    monkeypatch.undo()
    assert same(before, weights(model)) and path.stat().st_size == size
    optimizer.step(loss)
    journal.finish()
    optimizer.handle.restore()
    assert [type(r).__name__ for r in read_journal(path).records if type(r) in (Flushed, Settled)] == []
    assert replay(base, path).agrees is True and same(weights(base), weights(model))


def test_an_update_that_fails_is_not_in_the_journal(tmp_path, rng):
    model = zoo()
    loss = zoo_loss(model)
    optimizer = LOZO(model, lr=1e-2, placement="probe")
    journal = Journal.create(tmp_path / "run", optimizer)
    optimizer.step(loss)

    def spoils():
        with torch.no_grad():
            model.up.weight.add_(0)
        return loss()

    with pytest.raises(RuntimeError, match="was changed during the evaluations"):
        optimizer.step(spoils)
    journal.close()
    assert read_journal(tmp_path / "run").steps == 1
    optimizer.handle.restore()


def test_numbers_that_arrive_late(tmp_path, rng, monkeypatch):
    """As on a GPU: records wait in order, nothing is lost at the end, and a step that is not taken is not written later."""
    waiting = []

    class Arrived:
        def __init__(self):
            self.there = False
            waiting.append(self)

        def query(self):
            return self.there

        def synchronize(self):
            self.there = True

    monkeypatch.setattr(arrivals_module, "to_host", lambda values: (values.clone(), Arrived()))
    model, path = zoo(), tmp_path / "run"
    base, loss = copy.deepcopy(model), zoo_loss(model)
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, placement="probe", interval=4)
    journal = Journal.create(path, optimizer)
    for _ in range(6):
        optimizer.step(loss)
    assert read_journal(path).steps == 0
    journal.add_step(optimizer.info)
    journal.take_back()
    waiting[0].there = waiting[1].there = True
    optimizer.step(loss)
    assert read_journal(path).steps == 2
    model.state_dict()
    for _ in range(20):
        optimizer.step(loss)
    assert 27 - 16 <= read_journal(path).steps < 27
    journal.finish()
    optimizer.handle.restore()
    assert read_journal(path).steps == 27
    assert replay(base, path).agrees is True and same(weights(base), weights(model))


def test_beginnings(tmp_path, rng, monkeypatch):
    model, path = zoo(), tmp_path / "run"
    optimizer = LOZO(model, momentum=0.5)
    with pytest.raises(JournalError, match=r"cannot write the journal .*: No such file or directory"):
        Journal.create(tmp_path / "no" / "run", optimizer)
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(JournalError, match=r"cannot write the journal .*: Permission denied"):
        Journal.create(path, optimizer)
    monkeypatch.undo()
    assert optimizer.journal is None and not list(tmp_path.iterdir())
    journal = Journal.create(path, optimizer, about={"who": "me"}, fsync=2)
    with pytest.raises(JournalError, match="has a journal already"):
        Journal.create(tmp_path / "other", optimizer)
    optimizer.step(zoo_loss(model))
    with pytest.raises(RuntimeError, match="has a journal, which cannot say"):
        optimizer.load_state_dict(optimizer.state_dict() | {"step": 7})
    optimizer.eps = 0.5
    with pytest.raises(JournalError, match="a setting of the optimiser changed"):
        optimizer.step(zoo_loss(model))
    optimizer.eps = 1e-3
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="is there already"):
        Journal.create(path, optimizer)
    with pytest.raises(JournalError, match="momentum of 1 steps is in no journal"):
        Journal.create(tmp_path / "late", optimizer)
    assert read_journal(path).header.about == {"who": "me"} and read_journal(path).steps == 1
    optimizer.handle.restore()
