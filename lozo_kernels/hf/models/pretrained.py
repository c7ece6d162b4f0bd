"""What transformers and PEFT read from a folder or the Hub. Whose it is nobody knows: its code runs only when the user says so,
and whatever is wrong with it is said in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError, require

_SAYING = (OSError, ValueError, RuntimeError)
"""Errors whose message is understood without their kind."""
_LONGEST = 300
_NUMBERS = ("max_position_embeddings", "pad_token_id", "vocab_size")
"""Fields of a configuration that this library computes with."""


def read_pretrained(loader: Any, path: str, what: str, *, trusted: bool, option: str = "--model", **options: Any) -> Any:
    """What ``loader.from_pretrained(path, **options)`` returns.

    Args:
        what: what is read, for the message.
        trusted: run Python code that lies there. Otherwise nothing of it is run and nobody is asked.
        option: the option of the command line that named the path, for the message.

    Raises:
        InputError: it cannot be read, whatever the reason is.
    """
    try:
        return loader.from_pretrained(path, trust_remote_code=trusted, **options)
    except Exception as e:  # a damaged or odd file can make transformers raise anything
        raise unreadable(e, f"{option} {path}", what, where(path)) from e


def unreadable(error: Exception, named: str, what: str, place: str) -> InputError:
    """The error for something that cannot be read or built, in one line.

    Args:
        named: the option and the path.
        what: what cannot be had; ``place``: where it was looked for.
    """
    if "trust_remote_code" in str(error):
        return InputError(
            f"{named}: its {what} needs Python code that comes with it, and such code is not run unasked; "
            "read the code, and give --trust-remote-code if you trust it"
        )
    return InputError(f"{named}: no usable {what} {place}: {in_one_line(error)}")


@contextlib.contextmanager
def computing(path: str) -> Iterator[None]:
    """Around the first forward passes of a model, which show whether its files fit each other.

    Raises:
        InputError: they fail, whatever the reason is.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as e:  # as in read_pretrained
        raise InputError(f"--model {path}: a forward pass of it fails: {in_one_line(e)}") from e


def open_config(path: str, what: str = "model", *, trusted: bool = False) -> Any:
    """The configuration of a model on the Hub or in a folder.

    Args:
        what: what is looked for, for the message.
        trusted: as in :func:`read_pretrained`.

    Raises:
        InputError: there is none, or a field that this library reads is none.
    """
    transformers = require("transformers")
    transformers.utils.logging.set_verbosity_error()
    config = read_pretrained(transformers.AutoConfig, path, what, trusted=trusted)
    names = config.architectures
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        raise InputError(f"--model {path}: architectures in its config.json is a list of names, not {names!r:.100}")
    for field in _NUMBERS:
        value = getattr(config, field, None)
        if value is not None and (type(value) is not int or not -(2**31) < value < 2**31):
            raise InputError(f"--model {path}: {field} in its config.json is a number, not {value!r:.100}")
    return config


def first_line(error: BaseException) -> str:
    """What an error says, up to the end of its first line that is not blank; its kind if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def in_one_line(error: BaseException) -> str:
    """The first line of an error, with its kind where the words alone say too little, as text that any terminal takes."""
    text = first_line(error).rstrip(":")
    if not isinstance(error, _SAYING) and text != type(error).__name__:
        text = f"{type(error).__name__}: {text}"
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return text.encode("utf-8", "backslashreplace").decode()


def where(path: str) -> str:
    """Where a model of this name was looked for."""
    return "in that folder" if Path(path).is_dir() else "as a folder or on the Hub"
