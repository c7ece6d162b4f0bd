"""``lozo-kernels finetune`` on full disks and unfit folders, under SIGTERM and strange clocks, and with a rank that dies."""

import errno
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

for package in ("transformers", "tokenizers", "tqdm", "matplotlib"):
    pytest.importorskip(package)

from lozo_kernels.cli import command as cli  # noqa: E402
from lozo_kernels.hf.loop import records  # noqa: E402
from lozo_kernels.journal import StepTaken, read_journal  # noqa: E402
from lozo_kernels.journal import file as file_module  # noqa: E402
from python_tests.finetune_helpers import meaning, metrics, model_of  # noqa: E402
from python_tests.machine import wait_until  # noqa: E402

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are ended that were forked")
STEPS = 8


def finetune(folder, *more, steps=STEPS):
    arguments = ["--steps", str(steps), "--interval", "3", "--eval-every", "4", "--compare-steps", "0", "--eval-size", "6"]
    return cli.main(["finetune", *arguments, "--device", "cpu", "--output", str(folder), "--quiet", *more])


def resume(folder):
    return cli.main(["finetune", "--resume", str(folder), "--quiet"])


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hardening") / "calm"
    assert finetune(folder) == 0
    return folder


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fails_at(number, real):
    """The function, whose n-th call finds a full disk."""
    calls = []

    def call(*arguments, **named):
        calls.append(1)
        return no_space() if len(calls) == number else real(*arguments, **named)

    return call


WRITES = {  # where: what is replaced, and the call that fails
    "the header": (file_module.JournalFile, "create", 1),
    "a step": (file_module.os, "pwrite", 5),
    "the end of the journal": (file_module.os, "pwrite", STEPS + 1),
    "metrics": (records.MetricsLog, "_write", 7),
    "the model": (None, "save_pretrained", 1),
    "the card": (None, "write_card", 1),
    "the plot": (None, "plot_losses", 1),
    "the summary": (None, "write_whole", 1),
}


@pytest.mark.parametrize("where", WRITES)
def test_a_full_disk(tmp_path, monkeypatch, capsys, calm, where):
    """One message that says how to go on; and then the run ends as one that had space, nothing half written."""
    from transformers import PreTrainedModel

    from lozo_kernels.hf import finetune as module

    owner, name, number = WRITES[where]
    owner = owner or (PreTrainedModel if name == "save_pretrained" else module)
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        if where == "the header":
            patched.setattr(file_module.os, "replace", no_space)
        else:
            patched.setattr(owner, name, fails_at(number, getattr(owner, name)))
        assert finetune(run) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said and "Traceback" not in said
    assert not (run / "summary.json").exists()
    if where == "the header":
        assert not (run / "run.journal").exists() and finetune(run) == 0
    else:
        assert f"--resume {run}" in said and resume(run) == 0
    assert model_of(run) == model_of(calm) and meaning(run) == meaning(calm)
    assert json.loads((run / "summary.json").read_text())["steps_done"] == STEPS
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in calm.iterdir())


def test_the_kept_weights_outlive_a_kill_at_the_end(tmp_path, monkeypatch, capsys):
    """With ``--keep best`` they are there until the summary is."""
    from lozo_kernels.hf import finetune as module

    whole, run = tmp_path / "whole", tmp_path / "run"
    assert finetune(whole, "--keep", "best", "--lr", "1") == 0
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_whole", no_space)
        assert finetune(run, "--keep", "best", "--lr", "1") == 2
    assert resume(run) == 0 and model_of(run) == model_of(whole)
    kept = [json.loads((folder / "summary.json").read_text())["kept_step"] for folder in (run, whole)]
    assert kept[0] == kept[1] != STEPS  # of a run that got worse
    assert not (run / "best.safetensors").exists()


def file_in_place(folder):
    folder.write_text("")


def model_is_a_file(folder):
    folder.mkdir()
    (folder / "model").write_text("")


def journal_is_a_folder(folder):
    (folder / "run.journal").mkdir(parents=True)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (file_in_place, "is a file"),
        (model_is_a_file, "model is in the way, where a folder"),
        (journal_is_a_folder, "run.journal is in the way, where a file"),
    ],
)
def test_folders_that_cannot_be_written(tmp_path, monkeypatch, capsys, prepare, words):
    """One message, before the model is even loaded."""
    from lozo_kernels.hf import finetune as module

    prepare(tmp_path / "run")
    monkeypatch.setattr(module, "load_model", None)
    assert finetune(tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said and "--output" in said


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a place that nobody can write to")
@pytest.mark.parametrize("command", ["finetune", "replay", "compare"])
def test_a_place_that_nobody_can_write_to(calm, capsys, monkeypatch, command):
    nowhere = "/proc/self/run"
    if command == "finetune":
        code = finetune(nowhere)
    elif command == "replay":
        code = cli.main(["replay", "--journal", str(calm), "--output", nowhere])
    else:
        code = cli.main(["compare", str(calm), "--output", nowhere])
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and nowhere in said


@needs_fork
def test_sigterm_leaves_a_run_that_goes_on(tmp_path, calm, capfd):
    run = tmp_path / "run"
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        finetune(run)
        os._exit(0)
    log = run / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count('"step"') > 3, poll=0.001)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert resume(run) == 0 and model_of(run) == model_of(calm) and meaning(run) == meaning(calm)


def test_clocks_that_jump(tmp_path, rng, monkeypatch, calm):
    """The results are the same, and no duration is negative."""
    with monkeypatch.context() as patched:
        for name in ("time", "monotonic", "perf_counter"):
            patched.setattr(time, name, lambda: rng.uniform(-1e9, 3e9))
        assert finetune(tmp_path / "run") == 0
    assert model_of(tmp_path / "run") == model_of(calm) and meaning(tmp_path / "run") == meaning(calm)
    lines = metrics(tmp_path / "run")
    assert all(line[key] >= 0 for line in lines for key in ("step_ms", "forwards_ms", "seconds") if key in line)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train_seconds"] >= 0


def ranks(size, work, port):
    """Processes as torchrun starts them, without its imports."""
    started = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 99
            try:
                code = work(rank)
            finally:
                sys.stderr.flush()
                os._exit(code)
        started.append(child)
    return started


def ended(processes):
    """Their exit codes, minus the signal of those that were ended by one, "hangs" of those that did not end."""
    codes = {}

    def all_ended():
        for child in processes:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        return len(codes) == len(processes)

    try:
        wait_until(all_ended)
    finally:
        for child in processes:
            if child not in codes:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    return [codes.get(child, "hangs") for child in processes]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def scalars(journal):
    return [record.c[0] for record in read_journal(journal).records if isinstance(record, StepTaken)]


@needs_fork
@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch.distributed is missing"
)
def test_four_ranks_lose_one_and_three_go_on(tmp_path, capfd):
    """What is compared: the steps until then are kept in every bit, those after it are those of one process up to the rounding of
    losses in other batches, and the model is what the journal says."""
    alone, run, steps = tmp_path / "alone", tmp_path / "run", 24
    more = ("--batch-size", "6", "--lr", "1e-5", "--eval-every", "20", "--method", "lozo-m")
    assert finetune(alone, *more, steps=steps) == 0
    log = run / "metrics.jsonl"
    processes = ranks(4, lambda rank: finetune(run, *more, steps=steps), free_port())
    wait_until(lambda: log.exists() and log.read_text().count('"kind": "step"') > 5, poll=0.001)
    os.kill(processes[2], signal.SIGKILL)
    capfd.readouterr()
    assert ended(processes) == [1, 1, -signal.SIGKILL, 1]
    said = capfd.readouterr().err
    assert "rank 2 is gone" in said and "The last complete step is" in said and "Traceback" not in said
    kept = scalars(run / "run.journal")
    assert 5 < len(kept) < steps
    assert ended(ranks(3, lambda rank: resume(run), free_port())) == [0, 0, 0]
    found = scalars(run / "run.journal")
    assert len(found) == steps and found[: len(kept)] == kept
    assert found == pytest.approx(scalars(alone / "run.journal"), abs=0.05)
    logged = [line["step"] for line in meaning(run) if line["kind"] == "step"]
    assert logged == list(range(steps))
    assert cli.main(["verify", "--journal", str(run), "--checkpoint", str(run)]) == 0
