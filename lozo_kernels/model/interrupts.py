"""Lets Ctrl-C through only where it does no harm: in what the user runs, never between a change and the record of it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class _Gate:
    """Whether a SIGINT may be raised now. There is one gate, because only the main thread receives signals.

    Attributes:
        armed: :func:`_receive` is installed in place of the handler ``before``.
        open: a SIGINT is raised at once.
        held: a SIGINT that came while the gate was closed.
    """

    armed = False
    before: Callable[[int, FrameType | None], Any]
    open = False
    held: tuple[int, FrameType | None] | None = None


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Holds SIGINT back until the block ends or comes to an :func:`interruptible` part.

    After an interrupt in such a part, the clean-up in the block is not interrupted again. Outside of the main thread, which alone
    receives signals, this does nothing. A handler that Python did not install is left alone.
    """
    main = threading.current_thread() is threading.main_thread()
    if main and _Gate.armed:
        was_open, _Gate.open = _Gate.open, False
        try:
            yield
        finally:
            _Gate.open = was_open
            _let_through()
        return
    handler = signal.getsignal(signal.SIGINT) if main else None
    if not callable(handler):
        yield
        return
    try:
        _Gate.before, _Gate.open, _Gate.held = handler, False, None
        signal.signal(signal.SIGINT, _receive)
        _Gate.armed = True
        yield
    finally:
        _Gate.armed = False
        if signal.getsignal(signal.SIGINT) is _receive:  # otherwise the block installed another, which stays
            signal.signal(signal.SIGINT, handler)
        held, _Gate.held = _Gate.held, None  # read last: no signal comes to _receive any more
        if held is not None:
            handler(*held)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets SIGINT through at once in a part of a :func:`deferred_interrupt` block. Elsewhere this does nothing."""
    if not _Gate.armed or _Gate.open or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        _Gate.open = True
        _let_through()
        yield
    finally:
        _Gate.open = False


def _receive(number: int, frame: FrameType | None) -> None:
    """The handler inside of a block. Once it has raised, other interrupts wait for the clean-up of the first one."""
    if not _Gate.open:
        _Gate.held = number, frame
        return
    _Gate.open = False
    _Gate.before(number, frame)
    _Gate.open = True


def _let_through() -> None:
    if _Gate.open and _Gate.held is not None:
        held, _Gate.held = _Gate.held, None
        _receive(*held)
