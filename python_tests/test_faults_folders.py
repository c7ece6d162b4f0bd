"""One folder belongs to one run, and what a run made is not lost: second runs, second processes, kills while saving, Ctrl-C."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

for package in ("transformers", "tokenizers", "tqdm", "matplotlib"):
    pytest.importorskip(package)

from lozo_kernels.cli import command as cli  # noqa: E402
from lozo_kernels.errors import InputError  # noqa: E402
from lozo_kernels.hf import finetune as module  # noqa: E402
from lozo_kernels.hf import run as run_module  # noqa: E402
from lozo_kernels.hf.finetune import finetune  # noqa: E402
from lozo_kernels.hf.loop import train as train_module  # noqa: E402
from lozo_kernels.hf.loop.scoring import evaluate  # noqa: E402
from lozo_kernels.hf.settings import Settings  # noqa: E402
from lozo_kernels.journal import read_journal  # noqa: E402
from python_tests.finetune_helpers import meaning, metrics, model_of  # noqa: E402
from python_tests.hf_helpers import write_jsonl  # noqa: E402
from python_tests.hf_tiny import tiny_llama  # noqa: E402
from python_tests.processes import forked  # noqa: E402

STEPS = 4
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed that were forked")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tiny model and a file of texts with labels, whose runs take no time."""
    folder = tmp_path_factory.mktemp("own")
    rows = [{"text": f"a {'good' if i % 2 else 'bad'} day {i}", "label": i % 2} for i in range(12)]
    for name in ("train", "dev"):
        write_jsonl(folder / f"{name}.jsonl", rows)
    return tiny_llama(folder / "llama"), folder


def arguments(own, *more):
    llama, folder = own
    given = ["--model", llama, "--train-file", folder / "train.jsonl", "--dev-file", folder / "dev.jsonl", "--objective", "lm"]
    given += ["--steps", STEPS, "--batch-size", 4, "--eval-every", 2, "--quiet", "--threads", 1]
    return ["finetune", *map(str, given), *map(str, more)]


def start(own, *more):
    return cli.main(arguments(own, *more))


def refused(capsys, words, *argv):
    capsys.readouterr()
    assert cli.main(list(map(str, argv))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said, said


def contents(folder):
    """Every file in a folder but its lock, with what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, own):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert start(own, "--output", folder) == 0
    return folder


@pytest.fixture
def run(tmp_path, finished):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_second_run_in_a_used_folder(capsys, own, run):
    """It is refused before anything is touched; whoever means it says so."""
    before = contents(run)
    refused(capsys, "holds a finished run", *arguments(own, "--output", run, "--seed", 1))
    assert contents(run) == before
    assert start(own, "--output", run, "--seed", 1, "--overwrite") == 0
    assert json.loads((run / "summary.json").read_text())["seed"] == 1


@pytest.mark.parametrize("left", ["run.journal", "metrics.jsonl", "model"])
def test_each_thing_that_a_run_leaves_is_kept(capsys, own, run, left):
    """A journal of a killed run (``--resume`` was forgotten), metrics of a method without a journal, a model."""
    for path in run.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(run)
    words = {"run.journal": f"holds a run of {STEPS} steps, which lozo-kernels finetune --resume", "metrics.jsonl": "metrics"}
    refused(capsys, words.get(left, "holds a model"), *arguments(own, "--output", run))
    assert contents(run) == before


def test_without_a_name_a_run_takes_the_next_free_one(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [start(own, "--seed", seed) for seed in range(3)] == [0, 0, 0]
    found = sorted(Path("runs").iterdir())
    assert [p.name for p in found] == ["train-lozo", "train-lozo-2", "train-lozo-3"]
    assert [json.loads((p / "summary.json").read_text())["settings"]["output"] for p in found] == [str(p) for p in found]
    assert [read_journal(p / "run.journal").header.about["settings"]["seed"] for p in found] == [0, 1, 2]


@needs_fork
@pytest.mark.parametrize("stage", ["model", "card", "plot", "summary"])
def test_killed_while_saving_over_an_older_run(own, run, finished, monkeypatch, stage):
    """The second run in a folder is killed while it saves; it goes on, and ends as if nothing had been there."""
    names = {"model": "write_card", "card": "plot_losses", "plot": "write_whole", "summary": "write_whole"}
    (run / "summary.json").write_text((run / "summary.json").read_text().replace('"seed": 0', '"seed": 7'))

    def save_and_die():
        monkeypatch.setattr(module, names[stage], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        start(own, "--output", run, "--overwrite")

    child = os.fork()
    if child == 0:
        try:
            save_and_die()
        finally:
            os._exit(9)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (run / "summary.json").exists()
    assert cli.main(["finetune", "--resume", str(run), "--quiet"]) == 0
    assert model_of(run) == model_of(finished) and meaning(run) == meaning(finished)
    assert json.loads((run / "summary.json").read_text())["seed"] == 0
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in finished.iterdir())


@needs_fork
@pytest.mark.parametrize("method", ["lozo", "ft-sgd"])
@pytest.mark.parametrize("second", ["a run", "a run that replaces", "a run that goes on", "a replay"])
def test_a_second_process_touches_nothing(capsys, own, tmp_path, finished, method, second):
    """While a run goes on, with a journal or without one."""
    folder, go = tmp_path / "run", tmp_path / "go"
    seen = {}

    def held(*_, **__):
        (tmp_path / "there").touch()
        while not go.exists():
            threading.Event().wait(0.01)

    def first():
        import lozo_kernels.hf.loop.trainer as loop

        real = loop.RunTrainer.take

        def take(self, batches):
            real(self, batches)
            if self.driver.steps_done == 2:
                held()

        loop.RunTrainer.take = take
        assert start(own, "--output", folder, "--method", method) == 0

    def other():
        before = contents(folder)
        argv = {
            "a run": arguments(own, "--output", folder),
            "a run that replaces": arguments(own, "--output", folder, "--overwrite"),
            "a run that goes on": ["finetune", "--resume", folder, "--quiet"],
            "a replay": ["replay", "--journal", finished, "--output", folder, "--overwrite"],
        }[second]
        if second == "a run that goes on" and method != "lozo":
            refused(capsys, "there is no run.journal", *argv)
        else:
            refused(capsys, "another process is writing there", *argv)
        seen["same"] = contents(folder) == before
        go.touch()

    def enough():
        if (tmp_path / "there").exists() and not seen:
            other()
        return False

    assert forked(first, enough)
    assert seen == {"same": True}
    assert len([line for line in metrics(folder) if line["kind"] == "step"]) == STEPS


def test_a_lock_of_a_process_that_is_gone_holds_nobody(own, run):
    assert (run / ".lock").exists()
    assert start(own, "--output", run, "--overwrite") == 0


@pytest.mark.parametrize("how", ["plain", "overwrite", "symlink", "resumed"])
def test_the_base_is_never_the_target(capsys, own, run, tmp_path, how):
    before = contents(run / "model")
    if how == "symlink":
        (tmp_path / "linked").symlink_to(run)
    if how == "resumed":  # of a run that was begun before this was refused
        with pytest.raises(InputError, match="would be replaced while it is read"):
            finetune(settings(own, run, model=str(run / "model")), quiet=True, resume=True)
    else:
        folder = tmp_path / "linked" if how == "symlink" else run
        more = ["--overwrite"] if how != "plain" else []
        words = "holds a finished run" if how == "plain" else "would be replaced while it is read"
        refused(capsys, words, *arguments(own, "--model", run / "model", "--output", folder, *more))
    assert contents(run / "model") == before


def test_data_are_never_the_target_either(capsys, own, run):
    refused(
        capsys,
        "would be replaced while it is read",
        *arguments(own, "--train-file", run / "metrics.jsonl", "--output", run, "--overwrite"),
    )


def test_a_run_from_the_model_of_a_run_has_a_folder_of_its_own(own, tmp_path, monkeypatch):
    """The default output of both is the same."""
    monkeypatch.chdir(tmp_path)
    assert start(own) == 0
    before = contents(Path("runs/train-lozo"))
    assert start(own, "--model", "runs/train-lozo/model") == 0
    assert contents(Path("runs/train-lozo")) == before
    assert Path("runs/train-lozo-2/summary.json").exists()


@pytest.mark.parametrize("command", ["replay", "revert"])
def test_replays_do_not_replace_a_run(capsys, run, tmp_path, command):
    """Least of all the journal that they read: reverting into its own folder cut it."""
    before = contents(run)
    step = ["--step", "2"]
    refused(capsys, "holds a finished run", command, "--journal", run, "--output", run, *step)
    refused(capsys, "would be replaced while it is read", command, "--journal", run, "--output", run, "--overwrite", *step)
    assert contents(run) == before
    out = tmp_path / "out"
    assert cli.main([command, "--journal", str(run), "--output", str(out), *step]) == 0
    refused(capsys, "holds a ", command, "--journal", run, "--output", out, *step)
    assert cli.main([command, "--journal", str(run), "--output", str(out), "--overwrite", *step]) == 0


def test_reproduce_does_not_replace_results(capsys, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    refused(capsys, "holds the results of a reproduction", "reproduce", "--table", "lozo-opt", "--output", tmp_path, "--quiet")
    assert contents(tmp_path) == {"results.json": b"{}"}


def test_bad_input_leaves_no_folder(capsys, own, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    refused(capsys, "not JSON", *arguments(own, "--train-file", tmp_path / "bad.jsonl", "--output", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_every_result_has_another_name_until_it_is_whole(own, tmp_path, monkeypatch):
    """What fails while it is written leaves what was there."""
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    for owner, name, path in ((PreTrainedModel, "save_pretrained", "model"), (Figure, "savefig", "loss.png")):
        real, run = getattr(owner, name), tmp_path / name

        def half(self, target, *more, real=real, **named):
            real(self, target, *more, **named)
            raise RuntimeError("the power failed")

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, half)
            with pytest.raises(RuntimeError, match="the power failed"):
                start(own, "--output", run)
        assert not (run / path).exists() and not list(run.glob(".*part*"))


@needs_fork
@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch.distributed is missing"
)
def test_all_of_several_processes_are_refused(capfd, own, run):
    """The first one looks at the folder, and none of the others waits for it."""
    from python_tests.test_hardening_cli import ended, free_port, ranks

    before = contents(run)
    assert ended(ranks(2, lambda rank: start(own, "--output", run), free_port())) == [2, 2]
    assert capfd.readouterr().err.count("holds a finished run") == 2 and contents(run) == before
    assert ended(ranks(2, lambda rank: start(own, "--output", run, "--overwrite"), free_port())) == [0, 0]
    assert json.loads((run / "summary.json").read_text())["settings"]["parallel"] == "examples"


# --- what was kept of the best evaluation, edited data, and Ctrl-C


def settings(own, output, **more):
    llama, folder = own
    files = {"train_file": str(folder / "train.jsonl"), "dev_file": str(folder / "dev.jsonl")}
    given = {"model": str(llama), **files, "objective": "lm", "steps": STEPS, "batch_size": 4, "eval_every": 2, "threads": 1}
    return Settings(**{**given, "output": str(output), **more})


def killed(*_):
    raise RuntimeError("killed")


def nan_from(monkeypatch, call, value=float("nan")):
    """Dev losses from a call on are not numbers."""
    real, calls = evaluate, []

    def spied(*arguments, **named):
        record = real(*arguments, **named)
        calls.append(record)
        return record if len(calls) < call else type(record)(record.step, value, None, record.examples, record.seconds)

    monkeypatch.setattr("lozo_kernels.hf.run.evaluate", spied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_stale_best(own, tmp_path, monkeypatch, value):
    """A file of an earlier run that was killed is not what a run ends with whose dev losses are all NaN."""
    run, plain = tmp_path / "run", tmp_path / "plain"
    finetune(settings(own, plain), quiet=True)
    run.mkdir()
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(plain / "model").state_dict()
    save_file({name: torch.full_like(p, 7.0) for name, p in state.items()}, run / "best.safetensors")
    nan_from(monkeypatch, 1, value)
    summary = finetune(settings(own, run, keep="best"), quiet=True)
    assert model_of(run) == model_of(plain)
    assert summary["kept_step"] == STEPS and "no dev loss was a finite number" in " ".join(summary["notes"])
    assert not (run / "best.safetensors").exists()


def test_a_nan_in_the_log_is_read_back(own, tmp_path, monkeypatch):
    """JSON has null for it: a run that goes on compared losses with None, or drew them."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    nan_from(monkeypatch, 2)
    first = finetune(settings(own, whole, keep="best", eval_every=1), quiet=True)
    assert first["kept_step"] == STEPS
    with monkeypatch.context() as patched:
        patched.setattr(module, "plot_losses", killed)
        nan_from(patched, 2)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(settings(own, run, keep="best", eval_every=1), quiet=True)
    nan_from(monkeypatch, 1)
    assert cli.main(["finetune", "--resume", str(run), "--quiet"]) == 0
    assert model_of(run) == model_of(whole)


def interrupted_at(monkeypatch, name, call=1, place=module):
    """Ctrl-C at the n-th call of a function of the run, by the name that it has in a module."""
    real, calls = getattr(place, name), []

    def function(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **named)

    monkeypatch.setattr(place, name, function)


PLACES = {"evaluate": (3, run_module), "score": (1, train_module)}
"""What comes after the last step: the third evaluation, and the scores."""


@pytest.mark.parametrize("method", ["lozo", "ft-sgd"])
@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("where", ["evaluate", "score", "write_card", "plot_losses", "write_whole"])
def test_ctrl_c_after_the_last_step(capsys, own, tmp_path, monkeypatch, where, method, keep):
    """Everything is saved, and the last line says so."""
    if where == "score" and method == "ft-sgd":
        pytest.skip("as with lozo")
    run = tmp_path / "run"
    more = ["--num-eval", 4] if where == "score" else []
    with monkeypatch.context() as patched:
        interrupted_at(patched, where, *PLACES.get(where, ()))
        assert start(own, "--output", run, "--method", method, "--keep", keep, *more) == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nothing was saved" not in said and str(run) in said
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps_done"] == STEPS and (run / "model" / "model.safetensors").exists() and (run / "loss.png").exists()
    if method == "lozo" and summary["stopped"]:
        assert cli.main(["finetune", "--resume", str(run), "--quiet"]) == 0
        assert start(own, "--output", tmp_path / "calm", "--method", method, "--keep", keep, *more) == 0
        assert model_of(run) == model_of(tmp_path / "calm") and meaning(run) == meaning(tmp_path / "calm")


def test_an_interrupted_run_keeps_its_best(own, tmp_path, monkeypatch):
    """Of a run that got worse: Ctrl-C in the middle dropped the best weights, and the run that went on ended with its last ones."""
    whole, run, more = tmp_path / "whole", tmp_path / "run", {"keep": "best", "lr": 0.05, "steps": 8}
    best = finetune(settings(own, whole, **more), quiet=True)["kept_step"]
    assert best < 8
    from lozo_kernels.hf.loop import trainer as loop

    real = loop.RunTrainer.take

    def take(self, batches):
        real(self, batches)
        if self.driver.steps_done == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop.RunTrainer, "take", take)
        summary = finetune(settings(own, run, **more), quiet=True)
    assert summary["stopped"] == "interrupted" and summary["kept_step"] == 7  # what was saved is the last step
    assert cli.main(["finetune", "--resume", str(run), "--quiet"]) == 0
    assert model_of(run) == model_of(whole) and json.loads((run / "summary.json").read_text())["kept_step"] == best


@pytest.mark.parametrize("file", ["gone", "of another step", "of another run"])
def test_best_weights_are_made_again(own, tmp_path, monkeypatch, file):
    """The file and the log part when numbers of the last steps were lost, or somebody changed the file."""
    whole, run, more = tmp_path / "whole", tmp_path / "run", {"keep": "best", "lr": 0.05, "steps": 8}
    best = finetune(settings(own, whole, **more), quiet=True)["kept_step"]
    with monkeypatch.context() as patched:
        patched.setattr(module, "plot_losses", killed)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(settings(own, run, **more), quiet=True)
    from safetensors.torch import load_file, save_file

    kept = run / "best.safetensors"
    changed = {name: torch.full_like(p, 7.0) for name, p in load_file(kept).items()}
    if file == "gone":
        kept.unlink()
    else:
        save_file(changed, kept, metadata={"step": "7"} if file == "of another step" else None)
    assert cli.main(["finetune", "--resume", str(run), "--quiet"]) == 0
    assert best < 8 and json.loads((run / "summary.json").read_text())["kept_step"] == best
    assert model_of(run) == model_of(whole)


def test_ctrl_c_before_anything_new(capsys, own, run, monkeypatch):
    """While a run is brought to where it was, it stays as it is, and the line says how to go on."""
    (run / "summary.json").unlink()
    interrupted_at(monkeypatch, "load_model")
    assert cli.main(["finetune", "--resume", str(run), "--quiet"]) == 130
    said = capsys.readouterr().err
    assert f"holds a run of {STEPS} steps, which lozo-kernels finetune --resume {run} goes on with" in said


@pytest.mark.parametrize("edited", ["dev", "test", "train", "none"])
def test_edited_files_are_noticed_when_a_run_goes_on(capsys, own, tmp_path, edited):
    llama, source = own
    for name in ("train", "dev"):
        shutil.copy(source / f"{name}.jsonl", tmp_path)
    run, place = tmp_path / "run", (llama, tmp_path)
    # Only some of the dev file are looked at in training: the rest are test examples.
    assert start(place, "--output", run, "--eval-size", 3, "--num-eval", 12) == 0
    (run / "summary.json").unlink()
    file = tmp_path / f"{'train' if edited == 'train' else 'dev'}.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    if edited == "test":
        import random

        order = list(range(12))
        random.Random(0).shuffle(order)
        lines[order[-1]] = lines[order[-1]].replace("day", "night")
    elif edited != "none":
        lines = [line.replace("day", "night") for line in lines]
    file.write_text("".join(lines))
    if edited == "none":
        assert cli.main(["finetune", "--resume", str(run), "--quiet"]) == 0
    else:
        words = "the train examples are not" if edited == "train" else "the dev or test examples are not"
        refused(capsys, words, "finetune", "--resume", run, "--quiet")
