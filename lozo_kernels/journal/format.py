"""The bytes of a journal: a header that describes the run, then a checksummed record for each step and each pass outside of one.

All numbers are little endian. See ``docs/journal.md`` for the layout.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import JournalError
from ..kernels.checks import LARGEST, check_range
from ..kernels.noise import MAX_DRAW
from ..model.config import PatchConfig
from ..optim.normalise import NORMALISE
from ..optim.steps import EVALUATIONS

MAGIC = b"LOZOJRNL"
VERSION = 1
PREFIX = struct.Struct("<8sII")
"""Magic, format version, and the number of bytes of the header's JSON."""
CRC = struct.Struct("<I")
HEAD = struct.Struct("<BII")
"""The head of a long record: kind, number of bytes, and a checksum of both, so that a damaged number is noticed."""
WINDOW = struct.Struct("<Q")
INDEX = struct.Struct("<I")
MOVES = struct.Struct("<BI")
DETOUR_MOVES = struct.Struct("<Bi")
DIGEST_BYTES = 32

SETTLED, FLUSHED, DETOUR, SIDES, END, MEASURED, GUIDES = range(1, 8)
LONG = (SIDES, GUIDES)
"""Those with a head, :data:`HEAD`."""
STEP = 0x80
"""The first byte of a step has this bit and those of its flags."""
LR, LR_EACH, DECAY, DECAY_EACH, SKIPPED, RETURNED, AT_REST = (1 << bit for bit in range(7))

_MOST_DIRECTIONS = 1 << 20


class StepTaken(NamedTuple):
    """A step.

    Attributes:
        c: projected gradients, one for each direction; zeros if it was skipped.
        lr, weight_decay: of each parameter group.
        skipped: a loss was not finite and the update was by zero.
        at_rest: the update was made to unperturbed weights (``drive="backward"``); ``returned``: before it they went through all
            points of the step and back. Otherwise it was made at the last point.
    """

    c: tuple[float, ...]
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    skipped: bool = False
    at_rest: bool = False
    returned: bool = False


class Settled(NamedTuple):
    """A probe merged what it had learned although V did not change, because of ``state_dict()`` or ``merge()``."""


class Flushed(NamedTuple):
    """A pending update (``fuse_steps``) was made in a pass of its own, because of an evaluation or ``flush()``."""


class Detour(NamedTuple):
    """Weights went through the first ``moves`` points of the next step and back, and the step was not taken then. ``measuring``:
    they were the points of a step that measures for ``lr="auto"``, where they are not the same."""

    moves: int
    measuring: bool = False


class Sides(NamedTuple):
    """How a probe treats each parameter, as :func:`lozo_kernels.model.probe.sides.describe_sides` returns it."""

    described: dict[str, Any]


class Measurement(NamedTuple):
    """What the directions of the next step showed ``lr="auto"``: F(0), c^2, c c' and the curvature of each."""

    rows: tuple[tuple[float, ...], ...]


class Guides(NamedTuple):
    """The V that AGZO made for a window from inputs. ``vs``: the index of each parameter, in ascending order, and V transposed,
    (rank, columns) fp16."""

    window: int
    vs: tuple[tuple[int, bytes], ...]


class End(NamedTuple):
    """The end of the run. ``fingerprint`` is that of the weights, in hexadecimal."""

    fingerprint: str


Record = StepTaken | Settled | Flushed | Detour | Sides | End | Measurement | Guides


@dataclasses.dataclass(frozen=True)
class RecordedParameter:
    """A trained parameter: its name, tensor id, kind ("lowrank" or "dense"), and the fingerprint of its first weight."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    tensor_id: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Header:
    """What a run started from.

    Attributes:
        config, settings: of the handle and of the optimiser (``state_dict()["settings"]``).
        parameters: in canonical order, which is that of ``Handle.names``.
        groups: positions of the parameters of each group.
        noise_version: of the contract on bits (:func:`lozo_kernels.model.contract.version_of`).
        first_step: index of the first step.
        made_with: versions and backends, from which a replay knows what is promised.
        about: notes of the program that trains, plain JSON.
    """

    config: PatchConfig
    settings: dict[str, Any]
    parameters: tuple[RecordedParameter, ...]
    groups: tuple[tuple[int, ...], ...]
    noise_version: int
    first_step: int
    made_with: dict[str, Any]
    about: dict[str, Any]

    def to_json(self) -> str:
        """The header as one JSON object."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        rows = [dataclasses.astuple(p) for p in self.parameters]
        return json.dumps(values | {"config": self.config.to_dict(), "parameters": rows}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Header:
        """The inverse of :meth:`to_json`. Raises JournalError for anything that :meth:`to_json` does not write."""
        try:
            values = json.loads(text)
            return _checked_header(**values)
        except (TypeError, ValueError, KeyError, RecursionError, OverflowError) as e:
            raise JournalError(f"the header is not that of a journal: {str(e)[:200]}") from None


def encode_header(header: Header) -> bytes:
    """Returns the bytes before the first record."""
    text = header.to_json().encode()
    data = PREFIX.pack(MAGIC, VERSION, len(text)) + text
    return data + CRC.pack(zlib.crc32(data))


def encode_record(record: Record, before: StepTaken | None) -> bytes:
    """Returns a record without its checksum. ``before`` is the last step, whose lr and weight decay are not repeated."""
    match record:
        case StepTaken():
            return _encode_step(record, before)
        case Settled():
            return bytes([SETTLED])
        case Flushed():
            return bytes([FLUSHED])
        case Detour():
            return DETOUR_MOVES.pack(DETOUR, -record.moves if record.measuring else record.moves)
        case Sides():
            return bytes([SIDES]) + json.dumps(record.described, separators=(",", ":")).encode()
        case Measurement():
            numbers = [number for row in record.rows for number in row]
            return MOVES.pack(MEASURED, len(record.rows)) + struct.pack(f"<{len(numbers)}d", *numbers)
        case Guides():
            return b"".join((bytes([GUIDES]), WINDOW.pack(record.window), *(INDEX.pack(i) + v for i, v in record.vs)))
        case End():
            return bytes([END]) + bytes.fromhex(record.fingerprint)


def frame(body: bytes, crc: int) -> tuple[bytes, int]:
    """Returns a record as it is written, and its checksum, which covers all earlier records too: none can be moved or left out."""
    if body[0] in LONG:
        length = CRC.pack(len(body) - 1)
        crc = zlib.crc32(body[:1] + length, crc)
        body = body[:1] + length + CRC.pack(crc) + body[1:]
        crc = zlib.crc32(body[HEAD.size :], crc)
    else:
        crc = zlib.crc32(body, crc)
    return body + CRC.pack(crc), crc


def _encode_step(step: StepTaken, before: StepTaken | None) -> bytes:
    flags = STEP | SKIPPED * step.skipped | AT_REST * step.at_rest | RETURNED * step.returned
    numbers: list[float] = []
    for given, each, name in ((LR, LR_EACH, "lr"), (DECAY, DECAY_EACH, "weight_decay")):
        values: Sequence[float] = getattr(step, name)
        if before is None or values != getattr(before, name):
            same = all(v == values[0] for v in values)
            flags |= given if same else given | each
            numbers += values[:1] if same else values
    if not step.skipped:
        numbers += step.c
    return struct.pack(f"<B{len(numbers)}d", flags, *numbers)


def _checked_header(
    config: Any, settings: Any, parameters: Any, groups: Any, noise_version: Any, first_step: Any, made_with: Any, about: Any
) -> Header:
    for name, value, kind in (
        *(("config", config, dict), ("settings", settings, dict), ("parameters", parameters, list), ("groups", groups, list)),
        *(("noise_version", noise_version, int), ("first_step", first_step, int)),
        *(("made_with", made_with, dict), ("about", about, dict)),
    ):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} is {type(value).__name__}")
    found = tuple(_checked_parameter(*row) for row in parameters)
    members = tuple(tuple(group) for group in groups)
    positions = [i for group in members for i in group]
    each_once = all(type(i) is int for i in positions) and sorted(positions) == list(range(len(found)))
    if not each_once or not all(members) or not members:
        raise ValueError("the groups are not those of the parameters")
    check_range("first_step", first_step, MAX_DRAW)
    _check_made_with(**made_with)
    return Header(PatchConfig(**config), _checked_settings(**settings), found, members, noise_version, first_step, made_with, about)


def _check_made_with(torch: Any = "", backends: Any = (), **_: Any) -> None:
    if not isinstance(torch, str) or not isinstance(backends, (list, tuple)) or not all(isinstance(name, str) for name in backends):
        raise TypeError("made_with does not name torch's version and the backends")


def _checked_parameter(name: Any, shape: Any, dtype: Any, kind: Any, tensor_id: Any, fingerprint: Any) -> RecordedParameter:
    if not all(isinstance(v, str) for v in (name, dtype, kind, fingerprint)) or kind not in ("lowrank", "dense"):
        raise TypeError("a parameter is not described as one")
    name.encode()  # a lone surrogate is in no name
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
        raise TypeError(f"the shape of {name[:80]!r} is no shape")
    check_range("tensor_id", tensor_id, 1 << 32)
    return RecordedParameter(name, tuple(shape), dtype, kind, tensor_id, fingerprint)


def _checked_settings(
    eps: Any, momentum: Any, directions: Any, two_sided: Any, fuse_steps: Any, evaluation: Any, normalise: Any = None
) -> dict[str, Any]:
    if type(eps) not in (int, float) or not 0 < eps <= LARGEST or type(momentum) not in (int, float) or not 0 <= momentum <= 1:
        raise ValueError("eps or momentum is out of range")
    if type(directions) is not int or not 1 <= directions <= _MOST_DIRECTIONS:
        raise ValueError("directions is out of range")
    if type(two_sided) is not bool or type(fuse_steps) is not bool or evaluation not in EVALUATIONS:
        raise ValueError("two_sided, fuse_steps or evaluation is not known")
    if normalise not in (None, *NORMALISE):
        raise ValueError("normalise is not known")
    found = {
        "eps": eps,
        "momentum": momentum,
        "directions": directions,
        "two_sided": two_sided,
        "fuse_steps": fuse_steps,
        "evaluation": evaluation,
    }
    return found if normalise is None else found | {"normalise": normalise}
