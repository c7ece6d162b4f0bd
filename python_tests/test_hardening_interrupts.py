"""Ctrl-C at any line of a step, once or several times: what the books say is what the weights are."""

import os
import signal
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import lozo_kernels
from lozo_kernels import LOZO
from lozo_kernels.model.interrupts import deferred_interrupt, interruptible
from python_tests.hardening_helpers import KINDS, begun, calm, check_replay, finished, leaves_rounding, take_steps, zoo_of
from python_tests.models import weights, zoo_loss

LIBRARY = str(Path(lozo_kernels.__file__).parent)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGINT")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class AtLine:
    """Counts the lines of the library that are executed, and sends SIGINT before one of them."""

    def __init__(self, number=None):
        self.number, self.lines, self.where = number, 0, None

    def __call__(self, frame, event, argument):
        ours = frame.f_code.co_filename.startswith(LIBRARY) or frame.f_code.co_filename.endswith("contextlib.py")
        return self.line if ours else None

    def line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.number:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self.line

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *_):
        sys.settrace(self.before)


def interrupted(kind, path, at, disturbed):
    """A run, one step of which is interrupted and then taken again if it was not."""
    model = zoo_of(kind)
    base, optimizer = begun(kind, path, model)
    take_steps(model, optimizer, disturbed)
    raised = False
    try:
        with at:
            optimizer.step(zoo_loss(model, disturbed))
    except KeyboardInterrupt:
        raised = True
    assert optimizer.steps_done in (disturbed, disturbed + 1)
    take_steps(model, optimizer)
    return base, finished(model, optimizer), raised


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_any_line_of_a_step(tmp_path, rng, kind):
    """The step is taken, or it is not and can be tried again; the journal agrees with the weights in every bit."""
    undisturbed = calm(kind, tmp_path / "calm")
    for disturbed in (0, 3, 4):  # the first looks where weights are used, the last merges and draws V anew
        count = AtLine()
        interrupted(kind, tmp_path / "run", count, disturbed)
        for number in sorted(rng.sample(range(1, count.lines), 3)):
            at = AtLine(number)
            base, end, raised = interrupted(kind, tmp_path / "run", at, disturbed)
            assert raised, at.where
            check_replay(base, tmp_path / "run", end)
            if not leaves_rounding(kind):
                assert all(torch.equal(p, undisturbed[name]) for name, p in end.items()), at.where


class Burst:
    """A few SIGINTs a random time apart, of which only those count that arrive while the library runs."""

    def __init__(self, rng, most=4):
        self.rng, self.left, self.raised = rng, rng.randint(2, most), 0

    def __enter__(self):
        self.before = signal.signal(signal.SIGALRM, self.alarm), signal.signal(signal.SIGINT, self.interrupt)
        self.wait()
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before[0])
        signal.signal(signal.SIGINT, self.before[1])

    def wait(self):
        signal.setitimer(signal.ITIMER_REAL, 10 ** self.rng.uniform(-5, -2.2))

    def alarm(self, number, frame):
        self.left -= 1
        if self.left > 0:
            self.wait()
        signal.raise_signal(signal.SIGINT)

    def interrupt(self, number, frame):
        while frame is not None:
            if frame.f_code.co_filename.startswith(LIBRARY):
                self.raised += 1
                raise KeyboardInterrupt
            frame = frame.f_back


@pytest.mark.parametrize("kind", KINDS)
def test_somebody_who_presses_it_again_and_again(tmp_path, rng, kind):
    undisturbed = calm(kind, tmp_path / "calm")
    raised = 0
    for _ in range(4):
        model = zoo_of(kind)
        base, optimizer = begun(kind, tmp_path / "run", model)
        with Burst(rng) as burst:
            while True:
                try:
                    take_steps(model, optimizer)
                    break
                except KeyboardInterrupt:
                    continue
        raised += burst.raised
        end = finished(model, optimizer)
        check_replay(base, tmp_path / "run", end)
        if not leaves_rounding(kind):
            assert all(torch.equal(p, undisturbed[name]) for name, p in end.items())
    assert raised


def test_an_interrupted_merge_is_not_made_twice(tmp_path, rng):
    """``merge()``, as ``state_dict()`` calls it, outside of any step."""

    def run(at):
        model = zoo_of("activation")
        base, optimizer = begun("activation", tmp_path / "run", model)
        take_steps(model, optimizer, 3)
        raised = False
        try:
            with at:
                model.state_dict()
        except KeyboardInterrupt:
            raised = True
        model.state_dict()
        take_steps(model, optimizer)
        return base, finished(model, optimizer), raised

    count = AtLine()
    _, undisturbed, _ = run(count)
    for number in sorted(rng.sample(range(1, count.lines), 25)):
        at = AtLine(number)
        base, end, raised = run(at)
        assert raised and all(torch.equal(p, undisturbed[name]) for name, p in end.items()), at.where
        check_replay(base, tmp_path / "run", end)


def press():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("when", ["getsignal", "signal"])
def test_none_is_lost_at_the_end_of_a_block(monkeypatch, when):
    """One that comes while the handler of before is put back."""
    own = getattr(signal, when)

    def late(*args):
        monkeypatch.undo()
        press()
        return own(*args)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        monkeypatch.setattr(signal, when, late)
    assert signal.getsignal(signal.SIGINT) is before


def test_where_an_interrupt_is_raised():
    """At once in interruptible parts, at the end of everything else; a second one waits until the first is dealt with."""
    seen = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        press()
        seen.append("held")
        with deferred_interrupt():
            seen.append("nested")
        seen.append("still held")
    assert seen == ["held", "nested", "still held"]
    with pytest.raises(KeyboardInterrupt) as first, deferred_interrupt():
        try:
            with interruptible():
                with deferred_interrupt():
                    press()
                    seen.append("within")
                raise AssertionError("not reached")
        finally:
            press()
            press()
            seen.append("undone")
    assert seen[3:] == ["within", "undone"] and isinstance(first.value.__context__, KeyboardInterrupt)
    with deferred_interrupt(), pytest.raises(KeyboardInterrupt), interruptible():
        press()
    with pytest.raises(KeyboardInterrupt):
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_others(monkeypatch):
    """One that returns is called once for each part; one that a block installs stays; ignored stays ignored."""
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        with deferred_interrupt():
            press()
            assert not calls
            with interruptible():
                assert len(calls) == 1
                press()
                assert len(calls) == 2
            press()
        assert len(calls) == 3
        mine = signal.getsignal(signal.SIGINT)
        with deferred_interrupt():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN and mine is not signal.SIG_IGN
        with deferred_interrupt():
            press()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_not_concerned():
    """They receive no signals, and what they do changes nothing for the main thread."""

    def work():
        for _ in range(200):
            with deferred_interrupt(), interruptible():
                pass

    thread = threading.Thread(target=work)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        thread.start()
        press()
        thread.join()


def test_a_closure_that_hangs_can_be_interrupted(rng):
    model = zoo_of("in place")
    before = weights(model)
    optimizer = LOZO(model, lr=1e-2, eps=1e-2)
    waiting = threading.Event()
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))

    def hangs():
        timer.start()
        waiting.wait()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(hangs)
    assert optimizer.steps_done == 0
    for name, p in weights(model).items():
        assert torch.allclose(p.float(), before[name].float(), atol=0.02, rtol=0.02)
