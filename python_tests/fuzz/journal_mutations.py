"""Mutated journals: whatever a file holds, reading it ends in an error or in what was written."""

import json
import random
import time
import zlib
from collections.abc import Callable

from lozo_kernels import PatchConfig
from lozo_kernels.journal import Detour, End, Flushed, Guides, Header, JournalError, Record, Settled, Sides, StepTaken, read_journal
from lozo_kernels.journal.format import CRC, MAGIC, PREFIX, VERSION, RecordedParameter, encode_header, encode_record, frame

HOSTILE = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def sample(rng: random.Random, steps: int = 24, groups: int = 2, estimator: str | None = None) -> tuple[Header, list[Record]]:
    """A journal of every kind of record; those with V are of AGZO, which half of the journals are of."""
    parameters = tuple(
        RecordedParameter(f"layers.{i}.weight", (rng.randrange(1, 99), 7), "bfloat16", "lowrank", i, f"{rng.getrandbits(128):032x}")
        for i in range(2 * groups)
    )
    settings = {
        "eps": 1e-3,
        "momentum": 0.9,
        "directions": rng.randrange(1, 4),
        "two_sided": True,
        "fuse_steps": False,
        "evaluation": "sequential",
    }
    members = tuple(tuple(range(g, 2 * groups, groups)) for g in range(groups))
    estimator = estimator or rng.choice(("lowrank", "guided"))
    config = PatchConfig(placement="probe", seed=rng.getrandbits(63), estimator=estimator, interval=rng.randrange(1, 50))
    header = Header(config, settings, parameters, members, 1, 0, {"torch": "x", "backends": ["native"]}, {"by": "the fuzzer"})
    records: list[Record] = [Sides({"sides": [["scratch", None, None] for _ in parameters], "precision": "float32"})]
    lr, decay = (1e-3,) * groups, (0.0,) * groups
    for i in range(steps):
        if estimator == "guided" and i % config.interval == 0:
            some = sorted(rng.sample(range(2 * groups), groups))
            records.append(Guides(i // config.interval, tuple((p, rng.randbytes(2 * config.rank * 7)) for p in some)))
        if rng.random() < 0.5:
            lr = tuple(rng.random() for _ in range(groups)) if rng.random() < 0.3 else (rng.random(),) * groups
        skipped = rng.random() < 0.2
        c = tuple(0.0 if skipped else rng.gauss(0, 1) for _ in range(settings["directions"]))
        at_rest = rng.random() < 0.2
        records.append(StepTaken(c, lr, decay, skipped, at_rest, at_rest and rng.random() < 0.5))
        records += [r for r in (Settled(), Flushed(), Detour(1)) if i % 5 == 0 and rng.random() < 0.5]
    records.append(End(f"{rng.getrandbits(256):064x}"))
    return header, records


def encode(header: Header, records: list[Record]) -> bytes:
    """The file."""
    return assemble(encode_header(header), bodies(records))


def bodies(records: list[Record]) -> list[bytes]:
    """Records without checksums."""
    found, last = [], None
    for record in records:
        found.append(encode_record(record, last))
        last = record if isinstance(record, StepTaken) else last
    return found


def assemble(head: bytes, parts: list[bytes]) -> bytes:
    """A file of these records, with checksums that are right."""
    crc, out = CRC.unpack_from(head, len(head) - CRC.size)[0], [head]
    for body in parts:
        data, crc = frame(body, crc)
        out.append(data)
    return b"".join(out)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, moved, added or lost."""
    out = bytearray(data)
    for _ in range(1 if rng.random() < 0.6 else rng.randrange(2, 5)):
        if not out:
            break
        a = rng.randrange(len(out))
        b = min(len(out), a + rng.choice((1, 2, 4, 13, 25, 64)))
        match rng.randrange(7):
            case 0:
                out[a] ^= 1 << rng.randrange(8)
            case 1:
                out[a:b] = rng.randbytes(b - a)
            case 2:
                out[a : a + 4] = rng.choice(HOSTILE).to_bytes(4, "little")
            case 3:
                del out[a:b]
            case 4:
                out[a:a] = rng.choice((rng.randbytes(b - a), bytes(out[a:b])))
            case 5:
                c = rng.randrange(len(out))
                out[a:b], out[c : c + b - a] = out[c : c + b - a], out[a:b]
            case _:
                del out[a:]
    return bytes(out)


def resealed(rng: random.Random, header: Header, records: list[Record]) -> bytes:
    """Damage below checksums that are right, as only somebody who means it would make."""
    head, parts = encode_header(header), bodies(records)
    if rng.random() < 0.3:
        text = mutate(rng, header.to_json().encode()) if rng.random() < 0.7 else _odd_header(rng, header)
        head = PREFIX.pack(MAGIC, VERSION, len(text)) + text
        head += CRC.pack(zlib.crc32(head))
    else:
        i = rng.randrange(len(parts))
        parts[i] = mutate(rng, parts[i]) or b"\0"
        if rng.random() < 0.3:
            rng.shuffle(parts)
    return assemble(head, parts)


def _odd_header(rng: random.Random, header: Header) -> bytes:
    values = json.loads(header.to_json())
    odd = rng.choice((None, -1, 1e308, "", [], {}, [[]], True, 10**400, [0] * 1000, {"rank": 1 << 70}))
    key = rng.choice(list(values))
    if isinstance(values[key], dict) and values[key] and rng.random() < 0.7:
        values[key][rng.choice(list(values[key]))] = odd
    else:
        values[key] = odd
    return json.dumps(values).encode() if rng.random() < 0.9 else b"[" * 100_000


def fuzz(count: int, seed: int, progress: Callable[[int], None] = lambda _: None) -> dict[str, float]:
    """Reads so many mutated journals.

    Returns:
        How many were refused, how many were read as what was written before the damage, how many of those with checksums that were
        made right again were read, and the longest time of one.

    Raises:
        AssertionError: damage was taken for data; any other error: the reader crashed.
    """
    rng = random.Random(seed)
    counts = {"inputs": count, "refused": 0, "cut": 0, "resealed_and_read": 0, "longest_s": 0.0}
    for i in range(count):
        if i % 1000 == 0:
            header, records = sample(rng, rng.randrange(1, 30), rng.randrange(1, 4))
            written = encode(header, records)
            assert read_journal(written).records == records
            progress(i)
        seal = rng.random() < 0.3
        data = resealed(rng, header, records) if seal else mutate(rng, written)
        start = time.perf_counter()
        try:
            run = read_journal(data)
        except JournalError:
            counts["refused"] += 1
        else:
            if seal:
                counts["resealed_and_read"] += 1
            else:
                assert run.header == header and run.records == records[: len(run.records)], f"accepted: {data.hex()}"
                assert run.torn or len(data) == (run.ends[-1] if run.ends else run.start)[0]
                counts["cut"] += 1
        counts["longest_s"] = max(counts["longest_s"], time.perf_counter() - start)
    return counts
