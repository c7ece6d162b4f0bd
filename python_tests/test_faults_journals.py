"""Journals of strangers: their settings and headers are types and ranges before anything is done by their word."""

import copy
import json
import zlib

import pytest
import torch

from lozo_kernels import LOZO
from lozo_kernels.errors import JournalError
from lozo_kernels.journal import Journal, read_journal, replay, revert, verify
from lozo_kernels.journal.format import CRC, MAGIC, PREFIX, VERSION
from python_tests.fuzz.journal_mutations import assemble, bodies
from python_tests.journal_helpers import recorded, zoo

pytest.importorskip("transformers")

from lozo_kernels.cli import command as cli

HUGE = 10**400


def run(*argv):
    try:
        return cli.main([str(word) for word in argv])
    except SystemExit as e:
        return e.code


def forged(path, change):
    """The bytes of a journal whose header was changed, with checksums that are right."""
    journal = read_journal(path)
    values = json.loads(journal.header.to_json())
    change(values)
    text = json.dumps(values).encode()
    head = PREFIX.pack(MAGIC, VERSION, len(text)) + text
    return assemble(head + CRC.pack(zlib.crc32(head)), bodies(journal.records))


# -- settings of finetune ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--steps", "2", "--batch-size", "2", "--eval-size", "2", "--compare-steps", "0", "--num-eval", "2", "--quiet"]
    assert run("finetune", *options, "--output", folder) == 0
    (folder / "summary.json").unlink()  # a run that was killed, so that it may go on
    return folder


SETTINGS = [
    ("threads", 10**6),
    ("threads", 10**30),
    ("threads", -1),
    ("threads", "2"),
    ("threads", 1.5),
    ("threads", True),
    ("batch_size", 10**30),
    ("batch_size", "x"),
    ("batch_size", []),
    ("batch_size", None),
    ("max_length", 10**18),
    ("eval_size", {}),
    ("steps", -5),
    ("steps", HUGE),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", "0"),
    ("data_seed", -3),
    ("eps", "x"),
    ("eps", 0),
    ("eps", HUGE),
    ("lr", "fast"),
    ("lr", []),
    ("momentum", "much"),
    ("rank", 0),
    ("rank", 10**9),
    ("rank", [2]),
    ("interval", 0),
    ("interval", HUGE),
    ("dtype", "float64"),
    ("dtype", "uint8"),
    ("dtype", 5),
    ("device", 5),
    ("device", "cuda:999"),
    ("device", "\ud800"),
    ("device", "meta"),
    ("backend", 5),
    ("backend", "no such"),
    ("model", 5),
    ("model", ["a"]),
    ("model", "a\0b"),
    ("model", "\ud800"),
    ("model", "x" * 5000),
    ("model", "/" + "x" * 300),
    ("model", "no/such/folder/anywhere"),
    ("task", "no such"),
    ("task", []),
    ("train_file", 5),
    ("train_file", "a\0b"),
    ("data_dir", "\udcff"),
    ("method", 5),
    ("method", "zero-shot"),
    ("placement", "everywhere"),
    ("keep", {}),
    ("objective", []),
    ("parallel", 1),
    ("no_such_setting", 1),
    ("trust_remote_code", "yes"),
]


@pytest.mark.parametrize(("name", "value"), SETTINGS, ids=lambda value: ascii(value)[:30])
def test_a_setting_of_a_journal_is_a_type_and_a_range(tmp_path, capsys, finished, name, value):
    def change(values):
        values["about"]["settings"][name] = value

    (tmp_path / "run.journal").write_bytes(forged(finished / "run.journal", change))
    (tmp_path / "metrics.jsonl").write_bytes((finished / "metrics.jsonl").read_bytes())
    for command in (["finetune", "--resume", tmp_path, "--quiet"], ["verify", "--journal", tmp_path]):
        code = run(*command)
        err = capsys.readouterr().err
        assert code in (0, 1, 2) and err.count("\n") <= 1, err
        assert (code == 2) == err.startswith("lozo-kernels "), err
        assert torch.get_num_threads() < 1000


@pytest.mark.parametrize("about", [None, 5, [], {}, {"settings": None}, {"settings": []}, {"settings": {}}, {"settings": {"x": 1}}])
def test_notes_that_are_none(tmp_path, capsys, finished, about):
    (tmp_path / "run.journal").write_bytes(forged(finished / "run.journal", lambda values: values.update(about=about)))
    assert run("verify", "--journal", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("lozo-kernels verify: error: "), err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objective", []),
        ("objective", "no such"),
        ("task", None),
        ("task", []),
        ("task", {"name": "x"}),
        ("task", {"name": 5, "kind": "classification", "labels": ["a"]}),
        ("task", {"name": "x", "kind": "classification", "labels": "ab"}),
        ("task", {"name": "x", "kind": "classification", "labels": [[]]}),
        ("task", {"name": "x", "kind": "classification", "labels": 5}),
    ],
    ids=str,
)
def test_a_task_that_is_none(tmp_path, capsys, finished, field, value):
    data = forged(finished / "run.journal", lambda values: values["about"].update({field: value}))
    (tmp_path / "run.journal").write_bytes(data)
    assert run("verify", "--journal", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "does not say which model it is of" in err, err


# -- headers and records -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["inplace", "probe"])
def kept(request, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("journals") / "run.journal"
    return path, recorded(path, zoo(torch.float32), placement=request.param)[0]


ODD = (None, -1, 0, 0.5, HUGE, -HUGE, 2**63, 2**28, 2**32, 1e308, "", "x", "\ud800", [], [[]], [0.0], {}, {"a": 1}, True)


def headers(values):
    """Ways to every place of a header that holds a value."""

    def walk(value, way):
        yield way
        if isinstance(value, dict):
            for key in value:
                yield from walk(value[key], (*way, key))
        elif isinstance(value, list):
            for i in range(min(len(value), 2)):
                yield from walk(value[i], (*way, i))

    return [way for way in walk(values, ()) if way]


def test_an_odd_header_is_refused_or_replayed(rng, kept):
    path, base = kept
    ways = headers(json.loads(read_journal(path).header.to_json()))
    for way in rng.sample(ways, len(ways)):
        odd = rng.choice(ODD)

        def change(values, way=way, odd=odd):
            for key in way[:-1]:
                values = values[key]
            values[way[-1]] = odd

        data = forged(path, change)
        try:
            str(replay(copy.deepcopy(base), read_journal(data)))
        except JournalError as e:
            assert "\n" not in str(e) and len(str(e)) < 2000, (way, odd)
        except Exception as e:
            raise AssertionError(f"{way} = {odd!a}: {type(e).__name__}: {e}") from e


@pytest.mark.parametrize(
    ("way", "odd"),
    [
        (("settings", "eps"), HUGE),
        (("groups",), [[0.0]]),
        (("groups", 0, 0), 0.0),
        (("first_step",), HUGE),
        (("first_step",), 2**28),
        (("parameters", 0, 0), "\ud800"),
        (("parameters", 0, 4), 2**32),
        (("parameters", 0, 1, 0), HUGE),
        (("made_with", "backends"), 5),
        (("made_with", "backends"), [5]),
        (("made_with", "torch"), []),
    ],
    ids=str,
)
def test_what_no_header_holds(kept, way, odd):
    path, _ = kept

    def change(values):
        for key in way[:-1]:
            values = values[key]
        values[way[-1]] = odd

    with pytest.raises(JournalError, match="the header is not that of a journal"):
        read_journal(forged(path, change))


def test_sides_that_do_not_fit(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "run.journal"
    base, _ = recorded(path, zoo(torch.float32), placement="probe")
    journal = read_journal(path)
    sides = next(r for r in journal.records if hasattr(r, "described"))
    head = path.read_bytes()[: journal.start[0]]
    odd = copy.deepcopy(sides)
    odd.described["sides"][0][0] = "nowhere"
    model = copy.deepcopy(base)
    with pytest.raises(JournalError, match="cannot be on the side"):
        replay(model, read_journal(assemble(head, bodies([odd]))))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))
    with pytest.raises(JournalError, match="the sides are there already"):
        read_journal(assemble(head, bodies([sides, sides])))


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "/".join(["x" * 200] * 30)], ids=ascii)
@pytest.mark.parametrize(
    "call", [read_journal, lambda p: replay(zoo(), p), lambda p: revert(zoo(), p, 0), lambda p: verify(zoo(), p)]
)
def test_a_path_that_none_can_be(name, call):
    with pytest.raises(JournalError, match="cannot read the journal"):
        call(name)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "/".join(["x" * 200] * 30)], ids=ascii)
def test_a_journal_at_a_path_that_none_can_be(name):
    optimizer = LOZO(zoo())
    for make in (Journal.create, Journal.resume):
        with pytest.raises(JournalError):
            make(name, optimizer)
    assert optimizer.journal is None
