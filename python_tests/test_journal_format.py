"""The bytes of a journal: what was written is read, what a kill leaves is cut, and anything else is an error that says where."""

import itertools
import json
import struct
import zlib

import pytest

from lozo_kernels.journal import End, JournalError, Sides, StepTaken, diff, read_journal
from lozo_kernels.journal.format import CRC, MAGIC, PREFIX, Header, encode_header
from python_tests.fuzz.journal_mutations import assemble, bodies, encode, fuzz, sample


def test_what_was_written_is_read(rng):
    for _ in range(20):
        header, records = sample(rng, rng.randrange(0, 40), rng.randrange(1, 5))
        run = read_journal(encode(header, records))
        assert run.header == header and run.records == records and run.torn == 0
        assert run.steps == sum(isinstance(r, StepTaken) for r in records)
        assert run.fingerprint == records[-1].fingerprint
        assert diff(run, run) is None


def test_every_cut_leaves_whole_records(rng):
    header, records = sample(rng, 12)
    data = encode(header, records)
    run = read_journal(data)
    ends = [run.start[0], *(end for end, _ in run.ends)]
    for length in range(run.start[0], len(data)):
        cut = read_journal(data[:length])
        whole = sum(end <= length for end in ends) - 1
        assert cut.records == records[:whole] and cut.torn == length - ends[whole]
    for length in range(run.start[0]):
        with pytest.raises(JournalError, match=r"header is cut off|not a journal"):
            read_journal(data[:length])


def test_damage_is_named(rng):
    header, records = sample(rng, 12)
    data = encode(header, records)
    run = read_journal(data)
    for i in range(len(records) - 1):  # the last ends the file: cut short it looks unfinished
        start = (run.start, *run.ends)[i][0]
        for bit in (0, 5):
            damaged = bytearray(data)
            damaged[rng.randrange(start + 1, run.ends[i][0])] ^= 1 << bit
            with pytest.raises(JournalError, match=rf"record {i} \(at byte {start}, before or of step \d+\) is damaged"):
                read_journal(bytes(damaged))


def test_records_cannot_be_moved_or_left_out(rng):
    header, records = sample(rng, 12)
    data = encode(header, records)
    run = read_journal(data)
    bounds = [run.start[0], *(end for end, _ in run.ends)]
    parts = [data[a:b] for a, b in itertools.pairwise(bounds)]
    head = data[: run.start[0]]
    for changed in (
        [*parts[:3], *parts[4:]],
        [*parts[:3], parts[4], parts[3], *parts[5:]],
        [*parts[:4], parts[3], *parts[4:]],
        parts[1:],
    ):
        with pytest.raises(JournalError, match="damaged"):
            read_journal(head + b"".join(changed))


def test_nothing_follows_the_end(rng):
    header, records = sample(rng, 3)
    with pytest.raises(JournalError, match="after the end of the run"):
        read_journal(encode(header, [*records, records[-1]]))


@pytest.mark.parametrize("length", [1 << 20, 0xFFFFFFFF])
def test_hostile_lengths_allocate_nothing(rng, length):
    """A length beyond the file is refused before anything of that size is made."""
    header, records = sample(rng, 3)
    data = bytearray(encode(header, records))
    data[12:16] = length.to_bytes(4, "little")
    with pytest.raises(JournalError, match="header is cut off"):
        read_journal(bytes(data))
    head = encode_header(header)
    claimed = head + bytes([4]) + struct.pack("<II", length, 0) + b"x" * 50
    with pytest.raises(JournalError, match="checksum of its length"):
        read_journal(claimed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"rank": 2, "placement": "nowhere"}}, "placement"),
        ({"settings": {}}, "header is not"),
        ({"groups": [[0, 1], [1, 2, 3]]}, "groups"),
        ({"parameters": [["w", [-1], "float32", "dense", 1, ""]]}, "shape"),
        ({"first_step": -1}, "first_step"),
        ({"noise_version": "1"}, "noise_version"),
        ({"made_with": None}, "made_with"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_headers_are_checked(rng, change, message):
    """Also under a checksum that is right."""
    header, records = sample(rng, 3)
    text = json.dumps(json.loads(header.to_json()) | change).encode()
    head = PREFIX.pack(MAGIC, 1, len(text)) + text
    with pytest.raises(JournalError, match=message):
        read_journal(assemble(head + CRC.pack(zlib.crc32(head)), bodies(records)))


def test_tampered_header(rng):
    header, records = sample(rng, 3)
    data = bytearray(encode(header, records))
    data[PREFIX.size + 20] ^= 1
    with pytest.raises(JournalError, match="header is damaged"):
        read_journal(bytes(data))
    data[8] = 9
    with pytest.raises(JournalError, match=r"format 9; this version of lozo_kernels reads 1"):
        read_journal(bytes(data))
    assert Header.from_json(header.to_json()) == header


def test_bad_sides_and_numbers(rng):
    header, records = sample(rng, 3)
    for rows in ([], [["scratch", None, 99]] * len(header.parameters), [["scratch", "x", None]] * len(header.parameters), 3):
        with pytest.raises(JournalError, match="sides"):
            read_journal(encode(header, [Sides({"sides": rows, "precision": "float32"})]))
    step = next(r for r in records if isinstance(r, StepTaken))
    with pytest.raises(JournalError, match="not finite"):
        read_journal(encode(header, [step._replace(lr=(float("inf"),) * len(step.lr))]))
    with pytest.raises(JournalError, match="contradict"):
        read_journal(encode(header, [step._replace(returned=True, at_rest=False)]))
    with pytest.raises(JournalError, match="no learning rate"):
        read_journal(assemble(encode_header(header), [bytes([0x80 | 16])]))


def test_a_missing_file(tmp_path):
    with pytest.raises(JournalError, match=r"cannot read the journal .*: No such file"):
        read_journal(tmp_path / "none")
    (tmp_path / "text").write_text("something else")
    with pytest.raises(JournalError, match="is not a journal"):
        read_journal(tmp_path / "text")


def test_a_long_run_stays_small(rng):
    """20,000 steps whose learning rate always changes: 21 bytes each."""
    header, _ = sample(rng, 0, 1, "lowrank")
    header = Header(**{**vars(header), "settings": header.settings | {"directions": 1}})
    records = [StepTaken((rng.gauss(0, 1),), (rng.random(),), (0.0,)) for _ in range(20_000)]
    data = encode(header, [*records, End("0" * 64)])
    assert len(data) < 21 * 20_000 + 2000
    assert read_journal(data).records[:-1] == records


def test_two_runs_part(rng):
    header, records = sample(rng, 12)
    first = encode(header, records)
    i = next(i for i, r in enumerate(records) if isinstance(r, StepTaken) and not r.skipped)
    other = [*records[:i], records[i]._replace(c=tuple(x + 1 for x in records[i].c)), *records[i + 1 :]]
    found = diff(first, encode(header, other))
    assert (found.record, found.field, found.first, found.second) == (i, "c", records[i].c, other[i].c)
    assert str(found).startswith(f"record {i} (after")
    found = diff(first, encode(header, records[:-1]))
    assert (found.record, found.field, found.first, found.second) == (len(records) - 1, "record", "End", None)
    moved = Header(**{**vars(header), "settings": header.settings | {"eps": 0.5}})
    assert diff(first, encode(moved, records)).field == "settings.eps"


def test_mutations(rng):
    found = fuzz(2000, rng.getrandbits(32))
    assert found["refused"] + found["cut"] + found["resealed_and_read"] == 2000 and found["refused"] > 1500
    assert found["longest_s"] < 5
