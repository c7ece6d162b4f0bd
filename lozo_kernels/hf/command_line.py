"""Settings as dataclasses whose fields say their help, choices and bounds, from which command lines and checks are made."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import numbers
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError, require
from ..kernels.checks import LARGEST_INTEGER, check_text, shortened, suggestion

T = TypeVar("T")


class Option(str):
    """The help of a field, with what it says beside its type and its default.

    It is text, so that ``HfArgumentParser`` of transformers reads the same dataclasses.

    Attributes:
        group: the heading under which ``--help`` lists it.
        hidden: ``--help`` does not list it.
        choices: the words that it may be; of a tuple, each of its items.
        low, high: bounds that it may reach; a float ``low`` also says that it is finite. Integers reach 2^31 - 1 at most.
        above, below: bounds that it may not reach.
        later: it came after journals that go on without it.
    """

    group: str = ""
    hidden: bool = False
    choices: Collection[str] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    later: bool = False


def option(default: Any = dataclasses.MISSING, help: str = "", also: str = "", **more: Any) -> Any:
    """A field of a dataclass of settings: its default (required without one), its help (its choices without one), and the
    attributes of :class:`Option`.

    Args:
        also: another name on the command line and in files, which other projects give it.
    """
    about = Option(help or ", ".join(more.get("choices", ())))
    vars(about).update(more)
    return dataclasses.field(default=default, metadata={"help": about} | ({"aliases": [flag(also)]} if also else {}))


def about(field: dataclasses.Field[Any]) -> Option | None:
    """What a field says that :func:`option` made; None of any other."""
    found = field.metadata.get("help")
    return found if isinstance(found, Option) else None


def flag(name: str) -> str:
    """A field as it is spelled on the command line."""
    return "--" + name.replace("_", "-")


def add_options(
    parser: argparse.ArgumentParser,
    settings: type,
    names: Iterable[str] | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Adds an option for each field of a dataclass of settings, under the heading of its group.

    Args:
        names: only these fields, in this order and without headings; None for all.
        changes: arguments of ``add_argument`` by field, in place of those that follow from the field.

    Returns:
        The groups that were made, by their headings.
    """
    hints = typing.get_type_hints(settings)
    fields = {f.name: f for f in dataclasses.fields(settings)}
    groups: dict[str, Any] = {"": parser}
    for name in fields if names is None else names:
        said = about(fields[name])
        assert said is not None
        if said.group not in groups:
            groups[said.group] = parser if names is not None else parser.add_argument_group(said.group)
        parsed = _how_to_parse(hints[name], fields[name].default)
        arguments = {"help": str(said), **parsed, **(changes or {}).get(name, {})}
        if arguments.get("default") is not None and "(default: " not in arguments["help"]:
            arguments["help"] = f"{arguments['help']} (default: %(default)s)".strip()
        if said.hidden and names is None:
            arguments["help"] = argparse.SUPPRESS
        groups[said.group].add_argument(flag(name), *fields[name].metadata.get("aliases", ()), **arguments)
    return groups


def read_options(settings: type[T], args: argparse.Namespace) -> T:
    """The settings of a parsed command line; a field without an option there has its default."""
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    return settings(**{f.name: getattr(args, f.name) for f in fields if hasattr(args, f.name)})


def read_config(settings: type, path: Path) -> dict[str, Any]:
    """The settings in a file of YAML by the names of their fields; numbers and words are parsed as on the command line.

    Raises:
        InputError: it cannot be read, is no mapping, or names what is no setting.
    """
    try:
        found = require("yaml").safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    except ValueError as e:  # not UTF-8
        raise InputError(f"{path}: {e}") from None
    except require("yaml").YAMLError as e:
        raise InputError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: a file of settings has a line NAME: VALUE for each, and this is {shortened(found)}")
    names = {f.name: f.name for f in dataclasses.fields(settings)}
    for f in dataclasses.fields(settings):
        names |= {_field(also): f.name for also in f.metadata.get("aliases", ())}
    values = {}
    for key, value in found.items():
        name = names.get(_field(str(key)))
        if name is None:
            raise InputError(f"{path}: {shortened(key)} is no setting{suggestion(_field(str(key)), names)}")
        if isinstance(value, dict):
            value = json.dumps(value)
        values[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    return values


def _field(word: str) -> str:
    """The name of a field from its spelling on the command line or in a file."""
    return word.lstrip("-").replace("-", "_")


def check_options(settings: Any) -> None:
    """Holds every field of a dataclass of settings to its type, and one that is not None to its choices and bounds.

    Raises:
        InputError: one is of another type, none of its choices, out of bounds, or text that names nothing.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, said = getattr(settings, field.name), about(field)
        if said is None:
            continue
        if not _is_of(value, hints[field.name]):
            raise InputError(f"{flag(field.name)} is {_described(hints[field.name])}, not {shortened(value)}")
        if value is None:
            continue
        words = value if isinstance(value, tuple) else (value,)
        for word in words:
            if isinstance(word, str):
                check_text(flag(field.name), word)
        unknown = [word for word in words if said.choices and word not in said.choices]
        if unknown:
            raise InputError(
                f"{flag(field.name)} {shortened(unknown[0])} is not known; there are {', '.join(said.choices)}"
                + suggestion(unknown[0], said.choices)
            )
        bound = _missed_bound(value, said)
        if bound is not None:
            raise InputError(f"{flag(field.name)} is {bound}, not {shortened(value)}")


def _how_to_parse(hint: Any, default: Any) -> dict[str, Any]:
    if hint is bool:
        return {"action": "store_true"} if default is False else {"action": argparse.BooleanOptionalAction, "default": default}
    (kind,) = [a for a in typing.get_args(hint) if a is not type(None)] if isinstance(hint, types.UnionType) else [hint]
    parsed = {"type": kind if kind in (int, float) else _words if typing.get_origin(kind) is tuple else str}
    return parsed | ({"required": True} if default is dataclasses.MISSING else {"default": default})


def _words(text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


_KINDS = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
}


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type that a field of settings can have."""
    if isinstance(hint, types.UnionType):
        return any(_is_of(value, one) for one in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(word, str) for word in value)
    return isinstance(value, _KINDS[hint][0]) and (hint is bool or not isinstance(value, bool))


def _described(hint: Any) -> str:
    kinds = [kind for kind in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)) if kind is not type(None)]
    return " or ".join(_KINDS[kind][1] if kind in _KINDS else "a tuple of words" for kind in kinds)


def _missed_bound(value: Any, about: Option) -> str | None:
    most = about.high if about.high is not None else LARGEST_INTEGER
    if isinstance(value, numbers.Integral) and int(value) > most:
        return f"at most {most}"
    if isinstance(about.low, float) and not (math.isfinite(value) and value >= about.low):
        return f"a finite number of at least {about.low:g}"
    if about.low is not None and value < about.low:
        return f"at least {about.low}"
    if about.high is not None and value > about.high:
        return f"at most {about.high}"
    if about.above is not None and value <= about.above:
        return f"above {about.above:g}"
    if about.below is not None and value >= about.below:
        return f"below {about.below:g}"
    return None
