"""Checks of numbers and text that users give. Each kind has one check and one message."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

LARGEST = torch.finfo(torch.float32).max
"""The largest number that fp32 holds; all scalars reach the ops in fp32."""
LARGEST_INTEGER = 2**31 - 1
"""The largest integer that all libraries take for a size or a count."""
MAX_THREADS = 1024
"""More than any machine gains from. At some tens of thousands the system ends the process."""
_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # in bytes, on all usual file systems of Linux
_SHOWN = 100


def as_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Returns a setting that is an integer of any type (numpy's too) as an ``int``. Raises TypeError or ValueError if it is not an
    integer (True and False are none), or not in [low, high]."""
    if type(value) is not int:
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} is an integer, not {value!r}") from None
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} is at least {low}" + ("" if high is None else f" and at most {high}") + f", not {value}")
    return value  # type: ignore[no-any-return]


def check_integer(name: str, value: Any) -> None:
    """Raises TypeError unless the value is an ``int``. For coordinates of the noise, which kernels take without conversion."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name} is an integer, not {value!r}")


def check_range(name: str, value: Any, bound: int) -> None:
    """Raises TypeError or ValueError unless it is an ``int`` and 0 <= value < bound."""
    if type(value) is int and 0 <= value < bound:
        return
    check_integer(name, value)
    if not 0 <= value < bound:
        raise ValueError(f"{name} is 0 to {bound - 1}, not {value}")


def check_number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> None:
    """Raises TypeError or ValueError unless it is a finite number in [low, high), or in (low, high) with ``open_low``.

    A tensor of one element is a number too. If it is on a device, its value is not checked, because that would wait for the device.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} is one number, not a tensor of shape {tuple(value.shape)}")
        if value.is_complex() or value.layout != torch.strided or value.device.type == "meta":
            raise TypeError(f"{name} is a real number, not {value.dtype} {value.layout} on {value.device}")
        if value.device.type != "cpu":
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number, not {value!r}")
    if not math.isfinite(value) or value < low or (open_low and value == low) or value >= high:
        bound = f"above {low:g}" if open_low else f"at least {low:g}"
        raise ValueError(
            f"{name} is a finite number {bound}" + (f" and below {high:g}" if high < math.inf else "") + f", not {value}"
        )


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {value!r:.200}")


def check_scale(scale: Any) -> None:
    """Raises TypeError or ValueError unless it is a number that fp32 holds."""
    if not isinstance(scale, Real) and not (isinstance(scale, Tensor) and scale.numel() == 1 and not scale.is_complex()):
        raise TypeError(f"scale is a number, not {scale!r}")
    if not abs(scale) <= LARGEST:  # type: ignore[operator]
        raise ValueError(f"scale is a finite number, not {scale}, in fp32")


def check_text(named: str, text: str) -> None:
    """Holds text of a user to what names and paths can be.

    Args:
        named: the option, for the message.

    Raises:
        InputError: it has a NUL or a character that is not in UTF-8, or is longer than a path can be.
    """
    try:
        length = max(len(text.encode()) / _LONGEST_PATH, *(len(part.encode()) / _LONGEST_NAME for part in text.split("/")))
    except UnicodeEncodeError:
        raise InputError(f"{named} {shortened(text)} is not text in UTF-8") from None
    if "\0" in text:
        raise InputError(f"{named} {shortened(text)} has a NUL character in it")
    if length > 1:
        raise InputError(
            f"{named} {shortened(text)} is too long: a path has at most {_LONGEST_PATH} bytes, and each name in it {_LONGEST_NAME}"
        )


def suggestion(word: str, known: Iterable[str]) -> str:
    """The word that may have been meant, as the end of a message; nothing if no known word is like it."""
    by_sound = {other.lower(): other for other in known}
    close = difflib.get_close_matches(word.lower(), by_sound, 1)
    return f"; did you mean {by_sound[close[0]]}?" if close else ""


def shortened(value: Any) -> str:
    """A value as Python writes it, which any terminal takes; its beginning if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists without end
        return f"a {type(value).__name__} that is too large to show"
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text
