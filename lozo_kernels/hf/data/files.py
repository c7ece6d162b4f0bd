"""The rows of a file, in each of the forms in which people keep examples; every row comes with where it stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError, require
from ..tasks import Row

Rows = Iterator[tuple[str, Row]]
"""(file and line, row)."""


def read_rows(path: Path) -> Rows:
    """The rows of a file, by the ending of its name: jsonl, json, csv, tsv or parquet; of any other, each line as ``text``.

    Raises:
        InputError: the file is not what its name says, a row is malformed, or a file of plain text holds JSON or a table.
    """
    try:
        yield from _READERS.get(path.suffix.lower(), _lines)(path)
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e}); files are {', '.join(_READERS)}, or UTF-8 text") from None


def spell(names: tuple[str, ...] | list[str]) -> str:
    """Names of fields, quoted."""
    return " or ".join(map(repr, names))


def _lines(path: Path) -> Rows:
    # utf-8-sig drops the mark that some editors put at the beginning of a file.
    with path.open(encoding="utf-8-sig") as file:
        first = True
        for number, line in enumerate(file, 1):
            text, where = line.strip(), f"{path}, line {number}"
            if not text:
                continue
            if first:
                _check_plain(text, where)
            first = False
            yield where, {"text": text}


def _check_plain(line: str, where: str) -> None:
    """Raises InputError if the first line of a text file shows that it is another form, which would be trained as it stands."""
    if line.startswith("{"):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return
        raise InputError(f"{where}: a JSON object in a file of plain text; name the file .jsonl, so that its fields are read")
    for mark, ending in (("\t", ".tsv"), (",", ".csv"), (";", ".csv")):
        names = {name.strip().strip('"').lower() for name in line.split(mark)}
        if len(names) > 1 and names & {"text", "sentence", "premise", "prompt"} and names & {"label", "hypothesis", "completion"}:
            raise InputError(f"{where}: the header of a table in a file of plain text; name the file {ending}")


def _jsonl(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _object(_parsed(line, where), where)


def _json(path: Path) -> Rows:
    """A list of objects, or an object a line as in jsonl."""
    with path.open(encoding="utf-8-sig") as file:
        start = next((line.lstrip() for line in file if line.strip()), "")
    if not start.startswith("["):
        yield from _jsonl(path)
        return
    for number, row in enumerate(_parsed(path.read_text(encoding="utf-8-sig"), str(path)), 1):
        where = f"{path}, item {number}"
        yield where, _object(row, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not JSON ({e})") from None


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON object is needed, this is {type(row).__name__}")
    return row


def _table(path: Path) -> Rows:
    """Rows of texts under a header. Every value stays as it is written: "NA" is a text, and 1 a name."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        mark = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
        limit = csv.field_size_limit(2**31 - 1)
        try:
            reader = csv.reader(file, delimiter=mark, strict=True)
            header = [name.strip() for name in next(reader, [])]
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"{path}, line 1: two columns have the name {twice!r}")
            for cells in reader:
                where = f"{path}, line {reader.line_num}"
                if len(cells) > 1 or "".join(cells).strip():
                    if len(cells) != len(header):
                        raise InputError(f"{where}: {len(cells)} columns, and the header has {len(header)}; are quotes missing?")
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as e:
            raise InputError(f"{path}, line {reader.line_num}: not a table of values divided by {mark!r} ({e})") from None
        finally:
            csv.field_size_limit(limit)


def _parquet(path: Path) -> Rows:
    """Rows of a parquet file, as ``datasets`` writes them too: a column that names its classes gives the names."""
    datasets, parquet = (require(name) for name in ("datasets", "pyarrow.parquet"))
    try:
        table = parquet.read_table(str(path))
        features = datasets.Features.from_arrow_schema(table.schema)
        rows = table.to_pylist()
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f"{path}: not a parquet file ({' '.join(str(e).split())})") from None
    named = {column: feature.names for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    for number, row in enumerate(rows):
        for column, names in named.items():
            if isinstance(row[column], int) and 0 <= row[column] < len(names):
                row[column] = names[row[column]]
        yield f"{path}, row {number}", row


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
