"""Command lines of the measurements: one clear line for a wrong one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

import torch

from ..errors import InputError
from ..kernels.noise import MAX_RANK
from ..kernels.table import DTYPES
from .models import MODELS

DTYPE_NAMES = {str(d).removeprefix("torch."): d for d in DTYPES}


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as an :class:`InputError`."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and exiting."""
        raise InputError(message)


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every measurement takes."""
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="where to measure (default: cpu)")
    parser.add_argument("--threads", type=positive, help="threads of torch, which are this library's too (default: torch's choice)")
    parser.add_argument("--json", action="store_true", help="print the JSON document instead of a table")
    parser.add_argument("--output", metavar="FILE", help="also write the JSON document to FILE")


def add_model(parser: argparse.ArgumentParser, methods: Collection[str], default: Sequence[str]) -> None:
    """What measurements of whole steps take besides: ``default`` of the ``methods`` unless others are named."""
    parser.add_argument("--model", type=model_name, default="opt-125m", help="architecture (default: opt-125m); needs transformers")
    parser.add_argument("--dtype", type=several(dtype_name), default=["bfloat16", "float32"], help="default: bfloat16,float32")
    parser.add_argument(
        "--methods",
        type=several(method_of(methods)),
        default=list(default),
        help=f"of {', '.join(methods)} (default: {','.join(default)})",
    )
    parser.add_argument("--rank", type=rank_number, default=4, help="default: 4")


def method_of(methods: Collection[str]) -> Callable[[str], str]:
    """The name of one of these methods."""

    def parse(text: str) -> str:
        if text not in methods:
            raise argparse.ArgumentTypeError(f"method is one of {', '.join(methods)}, not {text!r}")
        return text

    return parse


def check_output(path: str | None) -> None:
    """Fails before a long measurement, not after it, if its result cannot be written.

    Raises:
        InputError: the folder does not exist or cannot be written to.
    """
    if path is None:
        return
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise InputError(f"--output {path}: is a folder")
    if not os.path.isdir(folder):
        raise InputError(f"--output {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {path}: cannot write to {folder}")


def device(text: str) -> torch.device:
    """A device that is here."""
    try:
        found = torch.device(text)
        found = torch.empty(1, device=found).device  # with its index
    except (RuntimeError, AssertionError) as e:  # an unknown word, no such accelerator, or a torch built without it
        raise argparse.ArgumentTypeError(str(e).splitlines()[0]) from None
    if found.type == "meta":
        raise argparse.ArgumentTypeError("there is nothing to measure on 'meta'")
    return found


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def rank_number(text: str) -> int:
    """A rank that the ops take."""
    value = positive(text)
    if value > MAX_RANK:
        raise argparse.ArgumentTypeError(f"rank is 1 to {MAX_RANK}, not {value}")
    return value


def dtype_name(text: str) -> str:
    """The name of a weight dtype."""
    if text not in DTYPE_NAMES:
        raise argparse.ArgumentTypeError(f"dtype is one of {', '.join(DTYPE_NAMES)}, not {text!r}")
    return text


def shape_label(text: str) -> str:
    """ "RxC"."""
    parts = text.split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"a shape is rows x columns as in 8192x8192, not {text!r}")
    return "x".join(str(int(p)) for p in parts)


def model_name(text: str) -> str:
    """The name of a known architecture."""
    if text not in MODELS:
        raise argparse.ArgumentTypeError(f"model is one of {', '.join(MODELS)}, not {text!r}")
    return text


def several(item: Callable[[str], object]) -> Callable[[str], list]:
    """A list of items, separated by commas, without repetitions."""

    def parse(text: str) -> list:
        return list(dict.fromkeys(item(part.strip()) for part in text.split(",")))

    return parse
