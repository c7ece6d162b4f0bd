"""Opens the shared libraries that were built with this package, if they are whole."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

_ELF = b"\x7fELF\x02\x01"  # 64 bits, little endian: all machines that this package is built for
_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")


def open_library(path: Path, name: str, version: int, missing: str) -> ctypes.CDLL:
    """Loads a library.

    Args:
        name: of the function that returns its ABI version; ``version``: the one that this package needs.
        missing: what to say where there is none.

    Raises:
        RuntimeError: it was not built, is cut off, or has another ABI version.
        OSError: the system cannot load it.
    """
    if not path.exists():
        raise RuntimeError(missing)
    needed, size = _needed_bytes(path), path.stat().st_size
    if size < needed:  # the system maps it all the same, and the process dies where a part is missing
        raise RuntimeError(f"{path} is cut off: it has {size} of {needed} bytes; reinstall lozo_kernels")
    library = ctypes.CDLL(str(path))
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    found = function()
    if found != version:
        raise RuntimeError(f"{path} has ABI version {found}, this package needs {version}; rebuild it")
    return library


def _needed_bytes(path: Path) -> int:
    """Bytes that an ELF file has to have by what its header says; 0 for a file of another kind, which the system refuses."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        if not head.startswith(_ELF):
            return 0
        if len(head) < _HEADER.size:
            return _HEADER.size
        _, _, _, _, segments_at, sections_at, _, _, segment_size, segments, section_size, sections, _ = _HEADER.unpack(head)
        ends = [_HEADER.size, segments_at + segment_size * segments, sections_at + section_size * sections]
        file.seek(segments_at)
        table = file.read(segment_size * segments)
        for i in range(len(table) // segment_size if segment_size >= _SEGMENT.size else 0):
            _, _, offset, _, _, in_file, _, _ = _SEGMENT.unpack_from(table, i * segment_size)
            ends.append(offset + in_file)
    return max(ends)
