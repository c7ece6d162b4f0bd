"""The journal's parser under atheris, whose inputs follow the branches that they reach. Needs ``pip install atheris``.

``python -m bench.journal --atheris 300000`` runs this file in a process of its own. What libFuzzer makes up is read twice: as the
whole file, and as header and records below checksums that are right, which no mutation would hit.
"""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from bench.evidence import REPO
from lozo_kernels.journal import Guides, JournalError, RecordedRun, Sides
from lozo_kernels.journal.format import CRC, HEAD, MAGIC, PREFIX, VERSION
from python_tests.fuzz.journal_mutations import assemble, bodies, encode, sample

SEEDS = 20
LIMITS = ("-max_len=8192", "-timeout=10", "-rss_limit_mb=4096")
_LENGTH = struct.Struct("<H")


def run(inputs: int, seed: int) -> dict[str, Any]:
    """Reads so many inputs.

    Returns:
        How many there were, and how many branches of the parser ("edges") they reached.

    Raises:
        RuntimeError: one crashed the reader, took ten seconds or 4 GiB; its bytes are in the message.
    """
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        rng = random.Random(seed)
        for i in range(SEEDS):
            header, records = sample(rng, rng.randrange(0, 12), rng.randrange(1, 3))
            (corpus / f"file{i}").write_bytes(encode(header, records))
            text = header.to_json().encode()
            parts = b"".join(_LENGTH.pack(len(body)) + body for body in bodies(records))
            (corpus / f"parts{i}").write_bytes(_LENGTH.pack(len(text)) + text + parts)
        command = [sys.executable, "-m", __spec__.name, str(corpus), f"-runs={inputs}", f"-seed={seed % (1 << 31) or 1}", *LIMITS]
        start = time.perf_counter()
        here = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=name, env=here)
        seconds = time.perf_counter() - start
        reached = re.findall(r"cov: (\d+)", done.stderr)
        if done.returncode or not reached:
            found = [p.read_bytes().hex() for p in Path(name).glob("*-*")]
            raise RuntimeError(f"{done.stderr[-3000:]}\n{' '.join(found)}")
    return {"inputs": inputs, "seed": seed, "edges": int(reached[-1]), "edges_of_the_seeds": int(reached[0]), "seconds": seconds}


def sealed(data: bytes) -> bytes:
    """A journal of a header and records that the data holds, each after its length, with checksums that are right."""
    parts, at = [], 0
    while at + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        parts.append(data[at : at + length])
        at += length
    text = parts[0] if parts else b""
    head = PREFIX.pack(MAGIC, VERSION, len(text)) + text
    return assemble(head + CRC.pack(zlib.crc32(head)), [part for part in parts[1:] if part])


def check(journal: bytes, found: RecordedRun) -> None:
    """Every record that was read ends in the checksum of all before it."""
    start, crc = found.start
    assert CRC.unpack_from(journal, start - CRC.size)[0] == crc == zlib.crc32(journal[: start - CRC.size])
    for record, (end, claimed) in zip(found.records, found.ends, strict=True):
        head = start + HEAD.size if isinstance(record, (Sides, Guides)) else start  # which has a checksum of its own in between
        crc = zlib.crc32(journal[head : end - CRC.size], zlib.crc32(journal[start : max(start, head - CRC.size)], crc))
        assert CRC.unpack_from(journal, end - CRC.size)[0] == crc == claimed, f"the checksum before byte {end} is wrong"
        start = end


def main() -> None:
    """Called by :func:`run`, and by libFuzzer's own options."""
    import atheris

    with atheris.instrument_imports(include=["lozo_kernels.journal.reader"]):
        sys.modules.pop("lozo_kernels.journal.reader")
        from lozo_kernels.journal.reader import read_journal

    def read(data: bytes) -> None:
        for journal in (data, sealed(data)):
            try:
                found = read_journal(journal)
            except JournalError as error:
                assert str(error)
                continue
            check(journal, found)
            assert len(journal) == found.torn + (found.ends[-1] if found.ends else found.start)[0]
            again = read_journal(assemble(journal[: found.start[0]], bodies(found.records)))
            assert (again.records, again.torn) == (found.records, 0), "what was read is not what it is when it is written"

    atheris.Setup(sys.argv, read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
