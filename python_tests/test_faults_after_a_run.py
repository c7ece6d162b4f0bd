"""What a finished run is good for: it scores new files, and it can be made longer."""

import json
import os
import shutil
from pathlib import Path

import pytest

for package in ("transformers", "tokenizers", "tqdm", "matplotlib"):
    pytest.importorskip(package)

from lozo_kernels.cli import command as cli  # noqa: E402
from lozo_kernels.journal import diff, read_journal  # noqa: E402
from python_tests.finetune_helpers import meaning, model_of  # noqa: E402
from python_tests.hf_helpers import write_jsonl  # noqa: E402
from python_tests.hf_tiny import tiny_llama, tiny_roberta  # noqa: E402
from python_tests.processes import forked  # noqa: E402


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("after")
    rows = [{"text": f"a {'good' if i % 3 else 'bad'} day {i}", "label": ("awful", "fine", "good")[i % 3]} for i in range(30)]
    write_jsonl(folder / "train.jsonl", rows)
    (folder / "lines.txt").write_text("".join(f"line {i} of some notes\n" for i in range(20)), encoding="utf-8")
    write_jsonl(folder / "asked.jsonl", [{"prompt": f"Q {i}?", "completion": f" {i}"} for i in range(20)])
    return {"folder": folder, "llama": tiny_llama(folder / "llama"), "roberta": tiny_roberta(folder / "roberta")}


def finetune(places, model, file, output, *more, steps=4):
    given = ["--model", places[model], "--train-file", places["folder"] / file, "--steps", steps, "--batch-size", 2]
    return cli.main(
        ["finetune", *map(str, given), "--eval-every", "2", "--threads", "1", "--output", str(output), "--quiet", *map(str, more)]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, places):
    """One run of each kind on own files."""
    folder = tmp_path_factory.mktemp("runs")
    assert finetune(places, "roberta", "train.jsonl", folder / "classes", "--lr", "1e-3") == 0
    assert finetune(places, "llama", "lines.txt", folder / "lm") == 0
    assert finetune(places, "llama", "train.jsonl", folder / "labels-lm", "--objective", "lm") == 0
    finetune(places, "llama", "asked.jsonl", folder / "answers")
    return folder


def scored(capsys, *argv):
    capsys.readouterr()
    code = cli.main(["evaluate", "--json", "--quiet", "--threads", "1", *map(str, argv)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


@pytest.mark.parametrize("kind", ["classes", "lm", "answers", "labels-lm"])
def test_a_run_on_own_files_is_scored_again(capsys, runs, kind):
    """Without a file: on what was held out then, with the result of then."""
    summary = json.loads((runs / kind / "summary.json").read_text())
    for more in ([], ["--max-length", "256"]):
        result = scored(capsys, "--checkpoint", runs / kind, *more)
        assert result["loss"] == pytest.approx(summary["loss_after"], rel=1e-5)
        assert result["objective"] == summary["objective"] and result["examples"] == summary["data"]["dev_examples"]


def test_a_run_scores_a_new_file(capsys, runs, tmp_path):
    """The classes are those of the model, in its order, also where the file has fewer of them."""
    rows = [{"text": f"a day {i}", "label": "good" if i % 2 else "fine"} for i in range(8)]
    whole = scored(capsys, "--checkpoint", runs / "classes", "--dev-file", write_jsonl(tmp_path / "new.jsonl", rows))
    assert whole["objective"] == "classification" and whole["examples"] == 8 and whole["task"] == "new"
    table = tmp_path / "new.csv"
    table.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    assert scored(capsys, "--checkpoint", runs / "classes" / "model", "--dev-file", table)["loss"] == whole["loss"]
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = runs / "classes" / "model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    losses = []
    for row in rows:
        logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([model.config.label2id[row["label"]]]))))
    assert whole["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("kind", ["lm", "answers", "labels-lm"])
def test_texts_and_answers_of_a_new_file(capsys, runs, tmp_path, kind):
    rows = [{"prompt": f"Q {i}?", "completion": " no"} if kind == "answers" else {"text": f"new {i}", "label": i} for i in range(6)]
    if kind == "lm":
        rows = [{"text": row["text"]} for row in rows]
    result = scored(capsys, "--checkpoint", runs / kind, "--dev-file", write_jsonl(tmp_path / "new.jsonl", rows))
    assert result["objective"] == ("answer" if kind == "answers" else "lm") and result["examples"] == 6


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "label": "bad"}, "line 1: label 'bad' is none of the 3 classes of new: 0 awful, 1 fine, 2 good"),
        ({"text": "a"}, "the model tells 3 classes apart, and the file has no field 'label'"),
    ],
)
def test_a_file_that_does_not_fit_the_model(capsys, runs, tmp_path, row, words):
    path = write_jsonl(tmp_path / "new.jsonl", [row] * 3)
    assert cli.main(["evaluate", "--checkpoint", str(runs / "classes"), "--dev-file", str(path), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_run_that_has_not_ended_is_not_scored(capsys, runs, tmp_path):
    """Its model is that of an earlier stop."""
    run = Path(shutil.copytree(runs / "lm", tmp_path / "run"))
    (run / "summary.json").unlink()
    assert cli.main(["evaluate", "--checkpoint", str(run), "--task", "text", "--quiet"]) == 2
    assert "its run has not ended; lozo-kernels finetune --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", [(), ("--placement", "probe"), ("--method", "lozo-m"), ("--keep", "best", "--lr", "0.05")], ids=str
)
def test_a_finished_run_is_extended_to_the_bits_of_a_longer_one(places, tmp_path, capsys, more):
    """Its journal, model and metrics are those of the run that was longer from the start."""
    long, run = tmp_path / "long", tmp_path / "run"
    assert finetune(places, "llama", "lines.txt", long, *more, steps=9) == 0
    assert finetune(places, "llama", "lines.txt", run, *more, steps=4) == 0
    assert cli.main(["finetune", "--resume", str(run), "--quiet"]) == 2
    assert "has taken all of its 4 steps; --steps N goes on to N steps" in capsys.readouterr().err
    assert cli.main(["finetune", "--resume", str(run), "--steps", "9", "--quiet"]) == 0
    assert model_of(run) == model_of(long) and meaning(run) == meaning(long)
    assert diff(read_journal(run / "run.journal"), read_journal(long / "run.journal")) is None
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps_done"] == summary["settings"]["steps"] == 9
    assert cli.main(["verify", "--journal", str(run), "--checkpoint", str(run)]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed that were forked")
def test_an_extended_run_that_is_killed_goes_on_to_its_new_end(places, tmp_path):
    long, run = tmp_path / "long", tmp_path / "run"
    assert finetune(places, "llama", "lines.txt", long, steps=40) == 0
    assert finetune(places, "llama", "lines.txt", run, steps=4) == 0
    log = run / "metrics.jsonl"
    assert not forked(
        lambda: cli.main(["finetune", "--resume", str(run), "--steps", "40", "--quiet"]),
        lambda: log.read_text().count('"kind": "step"') > 9,
    )
    assert not (run / "summary.json").exists()
    assert cli.main(["finetune", "--resume", str(run), "--quiet"]) == 0
    assert model_of(run) == model_of(long) and meaning(run) == meaning(long)


@pytest.mark.parametrize(
    ("first", "steps", "words"),
    [
        (("--lr-schedule", "linear"), 9, "the linear schedule of the run ends after 4 steps"),
        ((), 2, "the run has taken 4 steps; lozo-kernels revert goes back"),
        ((), 4, "the run has taken all of its 4 steps"),
    ],
)
def test_extensions_that_cannot_be(places, tmp_path, capsys, first, steps, words):
    run = tmp_path / "run"
    assert finetune(places, "llama", "lines.txt", run, *first) == 0
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert cli.main(["finetune", "--resume", str(run), "--steps", str(steps), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_other_settings_stay_those_of_the_run(places, tmp_path, capsys):
    assert cli.main(["finetune", "--resume", str(tmp_path), "--steps", "9", "--lr", "1"]) == 2
    assert "takes all settings from the run: leave the others out, but --steps" in capsys.readouterr().err


def test_a_run_goes_on_from_where_it_was_reverted_to(places, tmp_path):
    """Without the metrics of the steps that were kept, it began at step 0 again."""
    long, run, back = tmp_path / "long", tmp_path / "run", tmp_path / "back"
    assert finetune(places, "llama", "lines.txt", long, steps=6) == 0
    assert finetune(places, "llama", "lines.txt", run, steps=6) == 0
    assert cli.main(["revert", "--journal", str(run), "--step", "3", "--output", str(back)]) == 0
    assert [line["step"] for line in meaning(back) if line["kind"] == "step"] == [0, 1, 2]
    assert cli.main(["finetune", "--resume", str(back), "--quiet"]) == 0
    assert model_of(back) == model_of(long) and meaning(back) == meaning(long)


def test_a_journal_alone_is_enough_to_go_on(places, tmp_path, monkeypatch):
    """None of the steps in it is taken again, whatever became of the metrics."""
    from lozo_kernels.hf.loop import trainer

    run = tmp_path / "run"
    assert finetune(places, "llama", "lines.txt", run, steps=5) == 0
    whole = model_of(run)
    (run / "metrics.jsonl").unlink()
    (run / "summary.json").unlink()
    monkeypatch.setattr(trainer.RunTrainer, "take", None)
    assert cli.main(["finetune", "--resume", str(run), "--quiet"]) == 0
    assert model_of(run) == whole and read_journal(run / "run.journal").steps == 5


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max-new-tokens", "600"], "--max-new-tokens 600 leaves no room for a prompt"),
        (["--max-new-tokens", "2", "--max-length", "40"], "an answer of"),
    ],
)
def test_what_cannot_be_scored_is_said_before_training(places, tmp_path, capsys, monkeypatch, more, words):
    """It was said after the last step, and a run without a journal was lost."""
    from lozo_kernels.hf import finetune as module

    monkeypatch.setattr(module, "load_model", None)
    rows = [{"prompt": f"Q {i}?", "completion": " no" if i < 10 else " 1 2 3" * 40} for i in range(11)]
    dev = write_jsonl(tmp_path / "dev.jsonl", rows)
    given = ["--dev-file", dev, "--eval-size", 1, "--num-eval", 11, *more]
    assert finetune(places, "llama", "asked.jsonl", tmp_path / "run", "--method", "ft-sgd", *given) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "run").exists()
