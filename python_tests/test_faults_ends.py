"""The ends of runs and commands: out of threads, out of disk. What was learned is saved, and one line says what is missing."""

import concurrent.futures
import contextlib
import errno
import json
import os
import shutil
import threading

import pytest
import torch

from lozo_kernels import LOZO
from lozo_kernels.bench import tune
from lozo_kernels.cli import command as cli
from lozo_kernels.journal import Journal, read_journal, verify
from lozo_kernels.model import files
from python_tests.finetune_helpers import model_of
from python_tests.journal_helpers import recorded, zoo

pytest.importorskip("transformers")
resource = pytest.importorskip("resource")

OPTIONS = ["--steps", "3", "--batch-size", "2", "--eval-size", "2", "--compare-steps", "0", "--num-eval", "2", "--quiet"]


def run(*argv):
    try:
        return cli.main([str(word) for word in argv])
    except SystemExit as e:
        return e.code


@contextlib.contextmanager
def full_disk(limit):
    """No file gets longer than so many bytes, which is an error of the system like a full disk or a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def no_threads(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends") / "calm"
    assert run("finetune", *OPTIONS, "--output", folder) == 0
    return folder


# -- no more threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_a_journal_is_whole_without_threads(tmp_path, no_threads, placement):
    base, trained = recorded(tmp_path / "run.journal", zoo(), placement=placement)
    assert verify(base, tmp_path / "run.journal", trained).good


def test_threads_that_are_gone_at_the_end(tmp_path, monkeypatch, calm):
    """As under a limit of the system that other processes have reached meanwhile."""
    from lozo_kernels.journal import writer

    real = writer.fingerprint

    def late(handle):
        with monkeypatch.context() as patched:
            patched.setattr(concurrent.futures.ThreadPoolExecutor, "submit", refuse)
            return real(handle)

    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(writer, "fingerprint", late)
    out = tmp_path / "run"
    assert run("finetune", *OPTIONS, "--output", out) == 0
    assert model_of(out) == model_of(calm)
    assert read_journal(out / "run.journal").fingerprint == read_journal(calm / "run.journal").fingerprint


def test_an_error_of_hashing_is_not_hidden(tmp_path, monkeypatch):
    from lozo_kernels.journal import fingerprint

    optimizer = LOZO(zoo())

    def fails(*_):
        raise RuntimeError("no such memory")

    monkeypatch.setattr(fingerprint, "_of_parameter", fails)
    with pytest.raises(RuntimeError, match="no such memory"):
        Journal.create(tmp_path / "run.journal", optimizer)


# -- the model before the journal's end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["inplace", "probe"])
@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), OSError(errno.EIO, "Input/output error"), MemoryError()], ids=repr
)
def test_the_model_is_saved_before_the_journal_ends(tmp_path, monkeypatch, capsys, placement, error):
    from lozo_kernels.journal import writer

    out, whole = tmp_path / "run", tmp_path / "whole"
    options = [*OPTIONS, "--placement", placement]
    assert run("finetune", *options, "--output", whole) == 0
    capsys.readouterr()

    def fails(_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(writer, "fingerprint", fails)
        assert run("finetune", *options, "--output", out) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the model is saved in" in said and f"--resume {out}" in said, said
    assert model_of(out) == model_of(whole)
    assert run("finetune", "--resume", out, "--quiet") == 0
    assert model_of(out) == model_of(whole)
    assert read_journal(out / "run.journal").fingerprint == read_journal(whole / "run.journal").fingerprint
    assert run("verify", "--journal", out, "--checkpoint", out) == 0


# -- full disks ----------------------------------------------------------------------------------------------------------------


def one_line(capsys, code, *words):
    err = capsys.readouterr().err
    assert code in (1, 2) and err.count("\n") == 1 and err.startswith("lozo-kernels "), err
    assert all(word in err for word in words), err


@pytest.mark.parametrize("command", ["replay", "revert"])
@pytest.mark.parametrize("room", [0, 50_000])
def test_replay(tmp_path, capsys, calm, command, room):
    steps = ["--step", "2"] if command == "revert" else []
    with full_disk(room):
        code = run(command, "--journal", calm, "--output", tmp_path / "out", *steps)
    one_line(capsys, code, "File too large")
    assert run(command, "--journal", calm, "--output", tmp_path / "out", *steps) == 0


@pytest.mark.parametrize("room", [0, 1000])
def test_reproduce(tmp_path, capsys, room):
    with full_disk(room):
        code = run(
            "reproduce", "--table", "memory", "--scale", "tiny", "--methods", "lozo", "--quiet", "--output", tmp_path / "out"
        )
    one_line(capsys, code, "File too large")


def test_compare(tmp_path, capsys, calm):
    with full_disk(1000):
        code = run("compare", calm, "--output", tmp_path / "out")
    one_line(capsys, code, "File too large")


def test_tune(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(tune.TritonBackend, "unavailable", lambda *_: None)
    monkeypatch.setattr(tune, "environment", lambda *_: {})
    monkeypatch.setattr(tune, "tune", lambda *_, **__: [])
    output = tmp_path / "tiles.json"
    output.write_text("old")
    with full_disk(10):
        code = run("tune", "--output", output)
    one_line(capsys, code, "File too large")
    assert output.read_text() == "old"


def test_bench(tmp_path, capsys, monkeypatch):
    from lozo_kernels.bench import MEASUREMENTS

    module = MEASUREMENTS["correctness"][0]
    monkeypatch.setattr(module, "measure", lambda options, document: {"rows": []})
    monkeypatch.setattr(module, "render", lambda document: "")
    monkeypatch.setattr(module, "failed", lambda document: False)
    output = tmp_path / "found.json"
    output.write_text("old")
    with full_disk(10):
        code = run("bench", "correctness", "--output", output)
    one_line(capsys, code, "File too large")
    assert output.read_text() == "old"
    assert run("bench", "correctness", "--output", output) == 0
    assert json.loads(output.read_text())["rows"] == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("argv", [["plan", "--model", "MODEL", "--device-bandwidth", "10"], ["diff", "RUN", "RUN"]])
def test_a_full_standard_output(calm, argv, monkeypatch, capsys):
    words = [{"MODEL": str(calm / "model"), "RUN": str(calm)}.get(word, word) for word in argv]
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", full)
        code = run(*words)
        patched.undo()
        one_line(capsys, code, "No space left on device")
        with contextlib.suppress(OSError):
            full.close()


def test_devices_are_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    files.write_whole(pipe, "text")
    reader.join()
    assert read == ["text"] and not pipe.is_file()
    shutil.rmtree(tmp_path)
