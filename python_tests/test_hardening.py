"""Runs in threads and forked processes, on full disks and with clocks that jump: no bit is lost, and no journal."""

import errno
import os
import random
import threading
import time

import pytest
import torch

from lozo_kernels import LOZO, patch
from lozo_kernels.journal import Journal, JournalError, read_journal
from lozo_kernels.journal import file as file_module
from lozo_kernels.model.probe.choosing import cost
from python_tests.hardening_helpers import KINDS, STEPS, begun, calm, check_replay, finished, leaves_rounding, take_steps, zoo_of
from python_tests.machine import stretched, wait_until
from python_tests.models import same, weights, zoo_loss
from python_tests.processes import forked


def in_threads(*works):
    """Runs functions at once, and raises what one of them raised."""
    failed = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            failed.append(error)

    # Those that wait for one that failed are left behind.
    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    ended = wait_until(lambda: failed or not any(thread.is_alive() for thread in threads), seconds=120)
    if failed:
        raise failed[0]
    assert ended


@pytest.mark.parametrize("pair", [("in place", "fused, momentum"), ("scratch, momentum", "activation"), ("copy", "subzero")])
def test_two_models_in_two_threads(tmp_path, backend, pair):
    """Each ends in the bits of the same run alone, and so do their journals."""
    alone = [calm(kind, tmp_path / "alone", seed=i, backend=backend.name) for i, kind in enumerate(pair)]
    for _ in range(3):
        models, bases = [zoo_of(kind, seed=i) for i, kind in enumerate(pair)], [None, None]
        ends, together = [None, None], threading.Barrier(2)

        def work(i, models=models, bases=bases, ends=ends, together=together):
            torch.set_num_threads(2)  # of this thread
            together.wait()
            bases[i], optimizer = begun(pair[i], tmp_path / str(i), models[i], backend=backend.name)
            for step in range(STEPS):
                together.wait()
                take_steps(models[i], optimizer, step + 1)
            ends[i] = finished(models[i], optimizer)

        in_threads(lambda: work(0), lambda: work(1))
        for i in range(2):
            assert same(ends[i], alone[i])
            check_replay(bases[i], tmp_path / str(i), ends[i], backend=backend.name)


def test_one_is_patched_and_restored_while_another_steps(tmp_path):
    """Neither sees the other, nor do operators of torch that pack their tensors."""
    alone = calm("scratch, momentum", tmp_path / "alone")
    model, other = zoo_of("scratch, momentum"), zoo_of("in place", seed=1)
    _, optimizer = begun("scratch, momentum", tmp_path / "run", model)
    before, ended, ends = weights(other), threading.Event(), []

    def steps():
        try:
            take_steps(model, optimizer)
            ends.append(finished(model, optimizer))
        finally:
            ended.set()

    def patches():
        while not ended.is_set():
            for placement in ("inplace", "probe"):
                handle = patch(other, placement=placement)
                handle.report()
                handle.restore()
            x = [torch.zeros(1, 3, 4) for _ in range(2)]
            torch.ops.lozo_kernels.dense_update_(
                x, [0, 0, 0, 4] * 2, 0, torch.tensor([1]), [0], torch.ones(1, 2), None, None, 0, ""
            )
            assert all(t.any() for t in x)

    in_threads(steps, patches)
    assert same(ends[0], alone) and same(before, weights(other))


def test_costs_are_measured_once(monkeypatch):
    """Threads that ask at the same time are told the same, so that they choose the same sides."""
    measured, asked = [], []
    together = threading.Barrier(3)
    monkeypatch.setattr(cost, "fastest", lambda call, device: measured.append(call) or random.random())
    cost._measured.cache_clear()

    def ask():
        together.wait()
        asked.append(cost.measure_costs(torch.device("cpu"), torch.float32, 3, "eager"))

    try:
        in_threads(ask, ask, ask)
    finally:
        cost._measured.cache_clear()
    assert len(measured) == 4 and len(set(asked)) == 1


def test_tensors_that_do_not_fit_are_not_known_the_next_time():
    x, v = [torch.zeros(1, 4, 6)], [torch.zeros(1, 2, 5, dtype=torch.float16)]
    for _ in range(2):
        with pytest.raises(ValueError, match="v of tensor 0"):
            torch.ops.lozo_kernels.lowrank_update_(
                x, v, [0, 0, 0, 6], 0, torch.tensor([0]), [0], torch.ones(1, 1), None, None, 0, ""
            )


def failing_writes(monkeypatch, number, most):
    """The n-th write of a journal fails, after at most so many bytes of it."""
    real, count = os.pwrite, []

    def pwrite(descriptor, data, offset):
        count.append(len(data))
        if len(count) == number:
            real(descriptor, data[:most], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(file_module.os, "pwrite", pwrite)
    return count


def disturbed(kind, path, model):
    """A run in which a failed write is met by making space and trying again; what failed."""
    base, optimizer = begun(kind, path, model)
    said = []
    looked = False
    while optimizer.steps_done < STEPS:
        step = optimizer.steps_done
        try:
            if step == 3 and not looked:
                model.state_dict()
                looked = True
            optimizer.step(zoo_loss(model, step))
        except JournalError as error:
            said.append(str(error))
            assert optimizer.steps_done == step and read_journal(path).steps == step and not read_journal(path).torn
    try:
        end = finished(model, optimizer)
    except JournalError as error:  # the file is closed then, with all steps in it: the run can be resumed
        said.append(str(error))
        optimizer.handle.restore()
        assert read_journal(path).steps == STEPS
        model.load_state_dict(base.state_dict())
        again = LOZO(model, lr=1e-2, eps=1e-2, interval=4, **KINDS[kind][2])
        assert Journal.resume(path, again) == STEPS
        end = finished(model, again)
    return base, end, said


@pytest.mark.parametrize("kind", ["in place", "fused, momentum", "scratch, momentum"])
def test_a_disk_that_is_full_at_any_write(tmp_path, rng, monkeypatch, kind):
    """The step that cannot be noted is not taken; with space again the run goes on, and its journal leads where it led."""
    with monkeypatch.context() as patched:
        writes = failing_writes(patched, None, 0)
        _, undisturbed, said = disturbed(kind, tmp_path / "calm", zoo_of(kind))
    assert not said and len(writes) > STEPS
    for number in range(1, len(writes) + 1):
        for most in (0, rng.randrange(1, writes[number - 1]), writes[number - 1]):
            path = tmp_path / f"{number}-{most}"
            with monkeypatch.context() as patched:
                failing_writes(patched, number, most)
                base, end, said = disturbed(kind, path, zoo_of(kind))
            assert len(said) == 1 and "No space left on device" in said[0]
            check_replay(base, path, end)
            if not leaves_rounding(kind):
                assert same(end, undisturbed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process limits itself")
def test_a_file_that_may_not_grow(tmp_path):
    """The operating system's own short writes and errors, in a process with a limit on the size of files."""

    def work():
        import resource

        path, model = tmp_path / "run", zoo_of("activation")
        base, optimizer = begun("activation", path, model)
        take_steps(model, optimizer, 3)
        end = path.stat().st_size
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for more in (0, 5):  # the file's end is reached before a record, and within it
            resource.setrlimit(resource.RLIMIT_FSIZE, (end + more, hard))
            with pytest.raises(JournalError, match=f"cannot write the journal .*{os.strerror(errno.EFBIG)}"):
                optimizer.step(zoo_loss(model, 3))
            assert path.stat().st_size == end and optimizer.steps_done == 3
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        take_steps(model, optimizer)
        check_replay(base, path, finished(model, optimizer))

    assert forked(work)


def test_clocks_that_jump(tmp_path, rng, monkeypatch):
    """Backwards and by years, at every look: no clock decides a bit."""
    expected = {kind: calm(kind, tmp_path / "calm") for kind in KINDS}
    journal = (tmp_path / "calm").read_bytes()
    with monkeypatch.context() as patched:
        for name in ("time", "monotonic", "perf_counter"):
            patched.setattr(time, name, lambda: rng.uniform(-1e9, 3e9))
        for kind in KINDS:
            assert same(calm(kind, tmp_path / "jumping"), expected[kind]), kind
    assert (tmp_path / "jumping").read_bytes() == journal


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ["in place", "fused, momentum", "activation", "scratch, momentum"])
def test_a_forked_process_goes_on_by_itself(tmp_path, backend, kind, count):
    """With the bits of the process that it was forked from, to whom the journal belongs."""
    torch.set_num_threads(count)
    path, model = tmp_path / "run", zoo_of(kind)
    base, optimizer = begun(kind, path, model, backend=backend.name)
    take_steps(model, optimizer, 3)
    recorded = path.read_bytes()

    def work():
        torch.set_num_threads(1)  # PyTorch's own threads, if it had some, are not there
        if not leaves_rounding(kind):
            with pytest.raises(JournalError, match="written by the process that this one was forked from"):
                optimizer.step(zoo_loss(model, 3))
        optimizer.journal.close()
        take_steps(model, optimizer)
        optimizer.handle.restore()
        torch.save(weights(model), tmp_path / "child")

    assert forked(work)
    assert path.read_bytes() == recorded
    take_steps(model, optimizer)
    end = finished(model, optimizer)
    assert same(torch.load(tmp_path / "child"), end)
    check_replay(base, path, end, backend=backend.name)


@needs_fork
def test_a_process_that_lives_on_does_not_keep_the_journal(tmp_path):
    """A worker of a data loader may survive its parent by seconds: the run can be resumed at once all the same."""
    path, model = tmp_path / "run", zoo_of("activation")
    base, optimizer = begun("activation", path, model)
    take_steps(model, optimizer, 3)
    ours, theirs = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(theirs)
        os.read(ours, 1)  # until the parent ends
        os._exit(0)
    try:
        optimizer.journal.close()  # as its end would
        again = LOZO(base, lr=1e-2, eps=1e-2, interval=4, **KINDS["activation"][2])
        assert Journal.resume(path, again) == 3
        again.journal.close()
    finally:
        os.close(theirs)
        os.close(ours)
        os.waitpid(worker, 0)


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2 * STEPS

    def __getitem__(self, i):
        return torch.randint(0, 11, (9,), generator=torch.Generator().manual_seed(i))


@needs_fork
def test_a_loader_with_workers(tmp_path):
    """Its processes are forked between steps, and change nothing."""
    ends = []
    for workers in (0, 2):
        path, model = tmp_path / str(workers), zoo_of("scratch, momentum")
        base, optimizer = begun("scratch, momentum", path, model)
        take_steps(model, optimizer, 1)
        options = {"multiprocessing_context": "fork", "timeout": stretched(60)} if workers else {}
        for tokens in torch.utils.data.DataLoader(_Rows(), batch_size=2, num_workers=workers, **options):
            optimizer.step(
                lambda x=tokens, m=model: torch.nn.functional.cross_entropy(m(x[:, :-1]).float().flatten(0, 1), x[:, 1:].flatten())
            )
        ends.append(finished(model, optimizer))
        check_replay(base, path, ends[-1])
    assert same(*ends)
