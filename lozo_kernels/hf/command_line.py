"""Settings as dataclasses whose fields say their help, choices and bounds, from which command lines and checks are made."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field says beside its type and its default.

    Attributes:
        help: what it means, for the command line; without it the choices are shown.
        group: the heading under which ``--help`` lists it.
        hidden: ``--help`` does not list it.
        choices: the words that it may be; of a tuple, each of its items.
        low, high: bounds that it may reach; a float ``low`` also says that it is finite.
        above, below: bounds that it may not reach.
    """

    help: str = ""
    group: str = ""
    hidden: bool = False
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None


def option(default: Any = dataclasses.MISSING, help: str = "", **more: Any) -> Any:
    """A field of a dataclass of settings: its default (required without one), its help, and more of :class:`Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **more)})


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
        about: Option = fields[name].metadata["option"]
        if about.group not in groups:
            groups[about.group] = parser if names is not None else parser.add_argument_group(about.group)
        parsed = _how_to_parse(hints[name], fields[name].default)
        arguments = {"help": about.help or ", ".join(about.choices), **parsed, **(changes or {}).get(name, {})}
        if arguments.get("default") is not None and "(default: " not in arguments["help"]:
            arguments["help"] = f"{arguments['help']} (default: %(default)s)".strip()
        if about.hidden and names is None:
            arguments["help"] = argparse.SUPPRESS
        groups[about.group].add_argument(flag(name), **arguments)
    return groups


def read_options(settings: type[T], args: argparse.Namespace) -> T:
    """The settings of a parsed command line; a field without an option there has its default."""
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    return settings(**{f.name: getattr(args, f.name) for f in fields if hasattr(args, f.name)})


def check_options(settings: Any) -> None:
    """Holds every field of a dataclass of settings that is not None to its choices and bounds.

    Raises:
        InputError: one is none of its choices, or out of bounds.
    """
    for field in dataclasses.fields(settings):
        value, about = getattr(settings, field.name), field.metadata.get("option")
        if value is None or about is None:
            continue
        words = value if isinstance(value, tuple) else (value,)
        unknown = [word for word in words if about.choices and word not in about.choices]
        if unknown:
            raise InputError(f"{flag(field.name)} {unknown[0]!r} is not known; there are {', '.join(about.choices)}")
        bound = _missed_bound(value, about)
        if bound is not None:
            raise InputError(f"{flag(field.name)} is {bound}, not {value}")


def _how_to_parse(hint: Any, default: Any) -> dict[str, Any]:
    if hint is bool:
        return {"action": "store_true"}
    (kind,) = [a for a in typing.get_args(hint) if a is not type(None)] if isinstance(hint, types.UnionType) else [hint]
    parsed = {"type": kind if kind in (int, float) else _words if typing.get_origin(kind) is tuple else str}
    return parsed | ({"required": True} if default is dataclasses.MISSING else {"default": default})


def _words(text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _missed_bound(value: Any, about: Option) -> str | None:
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
