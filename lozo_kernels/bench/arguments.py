"""The command lines of the measurements. A wrong one is answered by one clear line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import InputError
from ..kernels.checks import LARGEST_INTEGER, MAX_THREADS, check_text, shortened, suggestion
from ..kernels.noise import MAX_RANK
from ..kernels.table import DTYPES
from .batches import LENGTH
from .models import MODELS

_LONGEST = 1000  # characters of a message, which repeats what was given

DTYPE_NAMES = {str(d).removeprefix("torch."): d for d in DTYPES}


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as an :class:`InputError`, with the word that may have been meant."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}...")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses an unknown option before it looks for those that are required, whose lack would be the lesser news."""
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            name = word.partition("=")[0]
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break
            if word.startswith("--") and not any(option.startswith(name) for option in self._option_string_actions):
                self.error(f"unrecognized arguments: {word}{suggestion(name, self._option_string_actions)}")
        return super().parse_known_args(words, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as e:
            e.message += suggestion(str(value), map(str, action.choices or ()))
            raise


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every measurement takes."""
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="where to measure (default: cpu)")
    parser.add_argument(
        "--threads", type=thread_count, help="threads of torch, which are this library's too (default: torch's choice)"
    )
    parser.add_argument(
        "--seconds", type=positive, help="begin nothing more after so long, from the start of the process (default: measure all)"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON document instead of a table")
    parser.add_argument("--output", metavar="FILE", type=path, help="also write the JSON document to FILE")


def add_model(parser: argparse.ArgumentParser, methods: Collection[str], default: Sequence[str], model: str = "opt-125m") -> None:
    """Adds the options of measurements of whole steps; ``default`` are the methods that are measured unless others are named."""
    add_choice(parser, "model", MODELS, model, f"architecture (default: {model}); needs transformers")
    add_choice(parser, "methods", methods, list(default))
    parser.add_argument("--rank", type=rank_number, default=4, help="default: 4")
    parser.add_argument(
        "--length", type=positive, default=LENGTH, help=f"most tokens of a sequence, which divide --tokens (default: {LENGTH})"
    )


def add_choice(
    parser: argparse.ArgumentParser, name: str, choices: Collection[str], default: str | list[str] | None, text: str | None = None
) -> None:
    """Adds ``--NAME``, which takes one of the choices, or several separated by commas where the default is not a single one."""
    parse = one_of(name.partition("-")[0].removesuffix("s"), choices)
    shown = default if isinstance(default, str) else ",".join(default or ())
    help_text = text or f"of {', '.join(choices)} (default: {shown})"
    parser.add_argument(f"--{name}", type=parse if isinstance(default, str) else several(parse), default=default, help=help_text)


def one_of(what: str, names: Collection[str]) -> Callable[[str], str]:
    """Makes a parser of one of these names. The message for any other word says that a ``what`` is one of them."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{what} is one of {', '.join(names)}, not {text!r}{suggestion(text, names)}")
        return text

    return parse


def check_output(path: str | Path | None) -> None:
    """Checks before a long measurement that its result can be written after it.

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
    """Parses a device that this machine has."""
    try:
        found = torch.device(text)
        found = torch.empty(1, device=found, dtype=torch.float32).device  # with its index
    except (RuntimeError, AssertionError) as e:  # an unknown word, no such accelerator, or a torch built without it
        raise argparse.ArgumentTypeError(str(e).splitlines()[0]) from None
    if found.type == "meta":
        raise argparse.ArgumentTypeError("there is nothing to measure on 'meta'")
    return found


def path(text: str) -> Path:
    """Parses what can be a path."""
    try:
        check_text("path", text)
    except InputError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return Path(text)


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shortened(text)} is not an integer") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    if value > LARGEST_INTEGER:
        raise argparse.ArgumentTypeError(f"{shortened(value)} is above {LARGEST_INTEGER}")
    return value


def thread_count(text: str) -> int:
    """Parses a number of threads that a system gives."""
    value = positive(text)
    if value > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{value} is above {MAX_THREADS}")
    return value


def rank_number(text: str) -> int:
    """Parses a rank that the ops take."""
    value = positive(text)
    if value > MAX_RANK:
        raise argparse.ArgumentTypeError(f"rank is 1 to {MAX_RANK}, not {value}")
    return value


def shape_label(text: str) -> str:
    """Parses a shape such as "8192x8192"."""
    parts = text.split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"a shape is rows x columns as in 8192x8192, not {text!r}")
    return "x".join(str(int(p)) for p in parts)


def several(item: Callable[[str], object]) -> Callable[[str], list]:
    """Makes a parser of items separated by commas; repeated ones count once."""

    def parse(text: str) -> list:
        return list(dict.fromkeys(item(part.strip()) for part in text.split(",")))

    return parse
