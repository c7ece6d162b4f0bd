"""Checks of numbers that users give: one kind of number, one message."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max
"""The largest number that fp32 holds; all scalars reach the ops in fp32."""


def as_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A setting that is an integer of any type (numpy's too) as an ``int``; True and False are no integers.

    Raises:
        TypeError, ValueError: it is none, or not in [low, high].
    """
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
    """Raises TypeError unless it is an ``int``. For coordinates of the noise, which kernels take as they are."""
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

    A tensor of one element is a number too. On a device it is not read, because nobody waits for a device.
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
