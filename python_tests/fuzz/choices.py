"""What a generated case may end in: the right answer, or an error that the library raised on purpose with nothing changed."""

from __future__ import annotations

import contextlib
import dis
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import lozo_kernels
from python_tests import gradients

CHECKED = (Path(lozo_kernels.__file__).parent, Path(gradients.__file__))
"""Whose errors have to be deliberate: the library, and the plain estimators that it is compared with."""
ANSWER = "answer"
ODD_NUMBERS = (math.nan, math.inf, -math.inf, -0.0, 1e300, -1e300, 5e-324, 3.5e38)
ODD_THINGS = (None, "x", b"", (), [], {}, object(), 1.5, 1j, True)
INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Finding(AssertionError):
    """A wrong answer, an error that nobody meant, or an error that left something changed."""


class PlannedError(Exception):
    """What a closure of a case raises on purpose."""


class Choices:
    """What hypothesis draws for a case.

    Attributes:
        tame: nothing odd was chosen, so that an error would be a finding.
        notes: what was odd.
    """

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self.notes: list[str] = []
        torch.manual_seed(self.integer(0, 2**32))

    @property
    def tame(self) -> bool:
        return not self.notes

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def of(self, *options: Any) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, percent: int) -> bool:
        return self.integer(0, 99) >= 100 - percent

    def odd(self, percent: int, *options: Any, note: str) -> Any:
        """Now and then one of the options, in a list of one; otherwise nothing."""
        if not self.chance(percent):
            return []
        self.notes.append(note)
        return [self.of(*options)]

    def whole(self, note: str, bound: int, percent: int = 4) -> Any:
        """A number below a bound, often at an end; now and then what is no such number."""
        for value in self.odd(percent, -1, bound, bound + 7, -(2**70), 2**70, *ODD_THINGS[:-1], note=note):
            return value
        return self.of(0, 1, bound - 1, self.integer(0, bound - 1), self.integer(0, bound - 1))


class Memory:
    """Bytes that were there before a call."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        for t in tensors:
            self.add(t)

    def add(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            whole = all_bytes(tensor)
            self._kept.append((whole, whole.clone()))

    def check(self, what: str) -> None:
        for now, before in self._kept:
            if not torch.equal(now, before):
                raise Finding(f"{what}, and something was changed")


def all_bytes(tensor: Tensor) -> Tensor:
    """The storage below a tensor, whatever the tensor covers of it."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]


def deliberate(error: BaseException) -> str | None:
    """Why an error is none that the library raised by a statement of its own, or None if it is one."""
    last = _last(error.__traceback__)
    if last is None or not any(Path(last.tb_frame.f_code.co_filename).is_relative_to(place) for place in CHECKED):
        return f"raised in {last and last.tb_frame.f_code.co_filename}"
    code = last.tb_frame.f_code
    where = f"{code.co_filename}:{last.tb_lineno}"
    if dis.opname[code.co_code[last.tb_lasti]] not in ("RAISE_VARARGS", "RERAISE"):
        return f"raised by no statement, at {where}"
    own = type(error).__module__.startswith("lozo_kernels")
    if not own and not isinstance(error, (TypeError, ValueError, RuntimeError, KeyError, MemoryError)):
        return f"a {type(error).__name__}, at {where}"
    return None if str(error).strip() else f"without a message, at {where}"


def _last(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


@contextlib.contextmanager
def refusals(case: Choices, memory: Memory, outcome: list[str]) -> Iterator[None]:
    """The body ends well, or in an error that is right; ``outcome`` then has its name.

    Raises:
        Finding: the error is not deliberate, left something changed, or there was no reason for one.
    """
    try:
        yield
    except (Finding, KeyboardInterrupt):
        raise
    except PlannedError:
        memory.check("the closure raised")
        outcome.append("the closure's own error")
    except Exception as error:
        if error.__class__.__module__.startswith("hypothesis"):
            raise
        what = f"{type(error).__name__}: {str(error)[:200]}"
        wrong = deliberate(error)
        if wrong is not None:
            raise Finding(f"{what} ({wrong}); odd: {case.notes}") from error
        if case.tame:
            raise Finding(f"{what} for arguments that are right") from error
        memory.check(what)
        outcome.append(type(error).__name__)


def attempt(case: Choices, memory: Memory, call: Callable[[], Any]) -> tuple[str, Any]:
    """Calls; returns :data:`ANSWER` and the value, or the name of the error and None."""
    outcome: list[str] = []
    value = None
    with refusals(case, memory, outcome):
        value = call()
    return (outcome[0], None) if outcome else (ANSWER, value)


@contextlib.contextmanager
def reference_answer(case: Choices) -> Iterator[None]:
    """The body is plain code that must have an answer where the library had one.

    Raises:
        Finding: it has none.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Finding) or error.__class__.__module__.startswith("hypothesis"):
            raise
        raise Finding(f"answered what has no answer: {type(error).__name__}: {str(error)[:200]}; odd: {case.notes}") from error


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, any NaN being as good as another."""
    kind = INT_OF_SIZE[a.element_size()]
    x, y = a.detach().contiguous().view(-1), b.detach().contiguous().view(-1)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = x.resolve_neg(), y.resolve_neg()
    equal = x.view(kind) == y.view(kind)
    return bool((equal | (x.isnan() & y.isnan())).all() if a.is_floating_point() else equal.all())


def expect(good: bool, what: str, case: Choices) -> None:
    if not good:
        raise Finding(f"{what}; odd: {case.notes}")
