"""Checks of settings that are numbers."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max
"""Of the numbers that fp32, in which all scalars reach the ops, can hold."""


def check_number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> None:
    """Raises TypeError or ValueError unless it is a finite number in [low, high), or a tensor of one, read on the CPU only."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} is one number, not a tensor of shape {tuple(value.shape)}")
        if value.is_complex() or value.layout != torch.strided or value.device.type == "meta":
            raise TypeError(f"{name} is a real number, not {value.dtype} {value.layout} on {value.device}")
        if value.device.type != "cpu":  # nobody waits for a device
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


def check_count(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is an integer, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} is at least 1, not {value}")


def check_scale(scale: float) -> None:
    """Raises TypeError or ValueError for a scale that is no number that fp32 holds."""
    if not isinstance(scale, Real) and not (isinstance(scale, Tensor) and scale.numel() == 1 and not scale.is_complex()):
        raise TypeError(f"scale is a number, not {scale!r}")
    if not abs(scale) <= LARGEST:
        raise ValueError(f"scale is a finite number, not {scale}, in fp32")


def check_integer(name: str, value: int) -> None:
    """Raises TypeError unless it is one."""
    if not isinstance(value, int):
        raise TypeError(f"{name} is an integer, not {value!r}")


def check_range(name: str, value: int, bound: int) -> None:
    """Raises TypeError or ValueError unless it is an integer and 0 <= value < bound."""
    check_integer(name, value)
    if not 0 <= value < bound:
        raise ValueError(f"{name} is 0 to {bound - 1}, not {value}")
