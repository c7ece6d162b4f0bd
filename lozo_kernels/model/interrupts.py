"""Ctrl-C where it can do no harm: in what the user runs, never between a change and the note of it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class _Gate:
    """Whether a SIGINT may be raised now. Only the main thread receives signals, so there is one.

    Attributes:
        armed: :func:`_receive` stands in the place of the handler ``before``.
        open: it may.
        held: one that came while it might not.
    """

    armed = False
    before: Callable[[int, FrameType | None], Any]
    open = False
    held: tuple[int, FrameType | None] | None = None


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Holds SIGINT back until the block ends, or to an :func:`interruptible` part of it.

    Whatever is undone in the block when an interrupt was raised in such a part is not interrupted by another. Elsewhere than in the
    main thread, which alone receives signals, this does nothing. A handler that Python did not install is left alone.
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
        if signal.getsignal(signal.SIGINT) is _receive:  # else the block chose another, which stays
            signal.signal(signal.SIGINT, handler)
        held, _Gate.held = _Gate.held, None  # only now does none come here any more
        if held is not None:
            handler(*held)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A part of a block of :func:`deferred_interrupt` in which SIGINT is raised at once; elsewhere this does nothing."""
    if not _Gate.armed or _Gate.open or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        _Gate.open = True
        _let_through()
        yield
    finally:
        _Gate.open = False


def as_interruptible(function: Callable[..., T]) -> Callable[..., T]:
    """The function, each call of which is an :func:`interruptible` part."""

    def call(*args: Any, **kwargs: Any) -> T:
        with interruptible():
            return function(*args, **kwargs)

    return call


def _receive(number: int, frame: FrameType | None) -> None:
    """The handler inside of a block. Once it has raised, another interrupt waits until what the first one ended is undone."""
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
