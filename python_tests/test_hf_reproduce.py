"""The papers' tables: the numbers that are published, the settings behind them, and each table at its smallest scale."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from lozo_kernels.cli import command as cli
from lozo_kernels.errors import InputError
from lozo_kernels.hf.methods import METHODS
from lozo_kernels.hf.papers.memory import INFERENCE, judge, measure_inference, measure_method, open_model, token_loss, with_ratios
from lozo_kernels.hf.papers.reproduce import render, reproduce
from lozo_kernels.hf.papers.results import TABLES
from lozo_kernels.hf.papers.scales import SCALES, Request
from lozo_kernels.hf.papers.scores import find_recipe, make_settings, measure_scores
from lozo_kernels.hf.reports.plots import compare_runs, read_run
from lozo_kernels.hf.settings import Settings
from lozo_kernels.hf.tasks import TASKS

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")


def test_published_scores_are_those_of_the_slides():
    """LOZO (ICLR 2025), slides, "Performance Comparison on Large-sized Models"; an independent transcription, row by row."""
    slides = """
        30b zero-shot 56.7 52.0 39.1 38.5 50.2 46.5
        30b icl       81.9 66.8 66.2 56.7 51.3 78.0
        30b mezo      90.7 64.3 68.2 63.5 56.3 86.1
        30b lozo      92.8 65.3 72.3 64.4 57.2 85.6
        66b zero-shot 57.5 67.2 66.8 43.3 50.6 48.1
        66b icl       89.3 65.3 62.8 52.9 54.9 81.3
        66b mezo      92.0 71.5 73.8 64.4 57.8 84.0
        66b lozo      92.5 74.0 74.5 63.5 59.4 85.8
    """
    rows = [line.split() for line in slides.strip().splitlines()]
    found = TABLES["lozo-opt"].published
    assert sum(map(len, found.values())) == len(rows)
    for size, method, *cells in rows:
        row = found[f"facebook/opt-{size}"][method]
        assert list(row) == ["sst2", "rte", "boolq", "wsc", "wic", "squad"]
        assert list(row.values()) == [float(c) for c in cells]


def test_published_memory_is_that_of_the_slides():
    """The same slides, "Memory-efficiency of LOZO and LOZO-M" and "Memory Challenges in LLM Fine-tuning"."""
    rte = {"lozo": 27.0, "lozo-m": 27.4, "mezo": 27.4, "mezo-m": 51.7, "ft-lora": 79.0, "ft": 250.0}
    multirc = {"lozo": 26.9, "lozo-m": 27.3, "mezo": 27.3, "mezo-m": 52.1, "ft-lora": 102.4, "ft": 315.2}
    memory = TABLES["memory"].published["facebook/opt-13b"]
    assert {m: row["rte"] for m, row in memory.items() if "rte" in row} == rte
    assert {m: row["multirc"] for m, row in memory.items() if "multirc" in row} == multirc
    others = {m: row["unnamed task"] for m, row in memory.items() if "rte" not in row}
    assert others == {"forward-grad": 138.0, "ft-sgd": 161.0, "ft-adamw": 257.0}
    assert not TABLES["lozo-roberta"].published and not TABLES["subzero"].published


def test_every_row_of_every_table_can_be_run():
    for table in TABLES.values():
        assert set(table.recipes) <= METHODS.keys()
        assert {m for cells in table.published.values() for m in cells} <= METHODS.keys()
        if table.name != "memory":
            assert set(table.columns) <= TASKS.keys()
        for method, recipe in table.recipes.items():
            Settings(**{**recipe.settings, "method": method, "task": "go-again"}).resolved()


def test_settings_at_the_papers_scale_are_the_papers():
    request = Request("lozo-opt", model="facebook/opt-13b", seed=3)
    assert request.size.name == "paper"
    recipe = request.paper.recipes["lozo"]
    settings = make_settings(request, recipe, "lozo", "rte", CPU, Path("out"), {}).resolved()
    expected = {
        "model": "facebook/opt-13b", "rank": 2, "interval": 50, "eps": 1e-3, "lr": 1e-6, "batch_size": 16, "steps": 20_000,
        "eval_every": 4000, "lr_schedule": "constant", "num_train": 1000, "num_dev": 500, "num_eval": 1000, "seed": 3,
        "scaling": "published",
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in expected} == expected
    other = make_settings(request, recipe, "lozo", "rte", CPU, Path("out"), {"lr": 1e-7, "rank": 1, "interval": 100})
    assert (other.lr, other.rank, other.interval) == (1e-7, 1, 100)
    embedded = make_settings(Request("lozo-opt"), recipe, "lozo", None, CPU, Path("out"), {})
    assert embedded.lr is None and embedded.scaling == "paper"  # which the embedded model's own rate goes with
    request = Request("lozo-roberta", model="FacebookAI/roberta-large")
    settings = make_settings(request, request.paper.recipes["lozo-m"], "lozo-m", "snli", CPU, Path("out"), {}).resolved()
    expected = {"rank": 4, "interval": 50, "lr": 1e-6, "momentum": 0.9, "batch_size": 64, "steps": 100_000, "k_shot": 16}
    expected["scaling"] = "published"  # the learning rates are those of code that leaves 1/r out
    assert {name: getattr(settings, name) for name in expected} == expected
    request = Request("subzero", model="facebook/opt-13b")
    settings = make_settings(request, request.paper.recipes["subzero"], "subzero", "rte", CPU, Path("out"), {}).resolved()
    expected = {"rank": 8, "interval": 1000, "eps": 1e-3, "batch_size": 16, "steps": 20_000, "momentum": 0.0}
    assert {name: getattr(settings, name) for name in expected} == expected


def test_a_method_without_a_row_takes_the_recipe_of_the_closest(tmp_path):
    def settings(table, method):
        request = Request(table, scale="paper", model="facebook/opt-13b")
        recipe = find_recipe(request.paper, method)
        return make_settings(request, recipe, method, "sst2", torch.device("cpu"), tmp_path, {}).resolved()

    for table in ("lozo-opt", "subzero"):
        lozo, momentum = settings(table, "lozo"), settings(table, "lozo-m")
        assert (momentum.rank, momentum.interval, momentum.scaling, momentum.lr) == (2, 50, "published", 1e-6)
        assert momentum.momentum == 0.9
        assert dataclasses.replace(momentum, method="lozo", momentum=0.0) == lozo
    subzero = settings("lozo-roberta", "subzero")
    assert (subzero.rank, subzero.interval, subzero.lr) == (8, 1000, 1e-7)
    assert (subzero.steps, subzero.batch_size, subzero.k_shot) == (100_000, 64, 16)
    tuned = settings("lozo-opt", "ft")
    assert (tuned.lr, tuned.steps) == (1e-5, 20_000)
    shots = settings("lozo-roberta", "icl")
    assert shots.num_eval == 1000 and shots.k_shot is None


def test_dtypes_at_the_papers_scale():
    request, cuda = Request("memory", model="facebook/opt-13b"), torch.device("cuda")
    assert request.chosen_dtype("lozo", cuda) == "float16" and request.chosen_dtype("ft-adamw", cuda) == "float32"
    assert request.chosen_dtype("lozo", CPU) == "float32"
    assert Request("memory", dtype="bfloat16").chosen_dtype("ft", cuda) == "bfloat16"


@pytest.mark.parametrize(
    ("table", "methods"),
    [("lozo-opt", "zero-shot,icl,lozo"), ("lozo-roberta", "lozo-m"), ("subzero", "subzero,forward-grad")],
)
def test_tables_of_scores_at_the_smallest_scale(table, methods, tmp_path, capsys):
    command = ["reproduce", "--table", table, "--scale", "tiny", "--methods", methods, "--threads", "1", "--output", str(tmp_path)]
    assert cli.main([*command, "--quiet"]) == 0
    text = capsys.readouterr().out
    document = json.loads((tmp_path / "results.json").read_text())
    assert document.keys() >= {"commit", "versions", "command", "date", "device", "scale", "published", "rows", "notes", "cpu"}
    assert document["command"].startswith("lozo-kernels reproduce --table")
    assert [row["method"] for row in document["rows"]] == methods.split(",")
    assert all(row["task"] == "go-again" and 0 <= row["score"] <= 100 for row in document["rows"])
    trained = [row for row in document["rows"] if METHODS[row["method"]].trains]
    assert all(row["steps_done"] == SCALES["tiny"].steps and row["training_peak_bytes"] > 0 for row in trained)
    assert (tmp_path / "curves.png").stat().st_size > 5000 and (tmp_path / "costs.png").stat().st_size > 5000
    assert text.strip() == (tmp_path / "table.md").read_text().strip()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    ours = [line for line in lines if line.startswith("| measured here |")]
    assert len(ours) == len(document["rows"])
    assert all("the embedded model" in line and "opt-" not in line and "roberta" not in line for line in ours)
    assert sum(line.startswith("| published |") for line in lines) == sum(map(len, TABLES[table].published.values()))
    assert "mean nothing" in text and "the task is the embedded one" in text


def test_the_memory_table_at_the_smallest_scale(tmp_path, capsys):
    pytest.importorskip("peft")
    command = ["reproduce", "--table", "memory", "--scale", "tiny", "--threads", "1", "--output", str(tmp_path), "--json"]
    assert cli.main([*command, "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "results.json").read_text()) == document
    peaks = {row["method"]: row["peak_bytes"] for row in document["rows"]}
    assert list(peaks) == [INFERENCE, *TABLES["memory"].recipes]
    weights = document["rows"][0]["weights_bytes"]
    assert peaks["lozo"] < 1.02 * peaks[INFERENCE] and peaks["mezo"] < 1.02 * peaks[INFERENCE]
    assert peaks["lozo-m"] < 1.05 * peaks["lozo"]
    assert peaks["mezo-m"] - peaks["mezo"] == pytest.approx(weights, rel=0.05)
    assert peaks["ft-adamw"] - peaks["ft-sgd"] == pytest.approx(2 * weights, rel=0.05)
    assert peaks["ft-sgd"] > 1.3 * peaks["lozo"] and peaks["ft-lora"] > 1.3 * peaks["lozo"]
    assert peaks["forward-grad"] > peaks[INFERENCE] + weights
    text = (tmp_path / "table.md").read_text()
    assert (tmp_path / "memory.png").stat().st_size > 5000
    assert "| published | facebook/opt-13b | LOZO | 27.0 | 26.9 | - |" in text
    assert all("opt-13b" not in line for line in text.splitlines() if line.startswith("| measured here"))
    assert "opt-tiny architecture with random weights" in text


def test_measuring_leaves_the_model_plain_and_adds_up():
    model = open_model("opt-tiny", torch.float32, CPU)
    names = [name for name, _ in model.named_parameters()]
    loss = token_loss(model, 2, 16)
    rows = with_ratios([measure_inference(model, loss), *(measure_method(m, model, loss, {}) for m in ("lozo", "ft-adamw"))])
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == names
    assert rows[0]["over_inference"] == 1.0 and rows[0]["weights_bytes"] == sum(4 * p.numel() for p in model.parameters())
    assert rows[2]["beyond_weights_bytes"] > 3 * rows[2]["weights_bytes"]  # gradients and AdamW's two moments


def test_out_of_memory_is_a_cell_and_not_an_end(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = open_model("opt-tiny", torch.float32, CPU)
    monkeypatch.setattr("lozo_kernels.hf.papers.memory.build_driver", full)
    row = measure_method("lozo", model, token_loss(model, 1, 8), {})
    assert row["out_of_memory"] and row["peak_bytes"] is None
    assert with_ratios([row])[0]["over_weights"] is None and judge(with_ratios([row])) == []


def test_goals_are_judged():
    def row(method, peak):
        return {"method": method, "dtype": "float32", "weights_bytes": 100, "peak_bytes": peak}

    peaks = {INFERENCE: 130, "lozo": 131, "lozo-m": 140, "mezo": 131, "mezo-m": 231, "ft-adamw": 500}
    verdict = {t["name"]: t["met"] for t in judge(list(itertools.starmap(row, peaks.items())))}
    assert list(verdict.values()) == [True, False, True, True, True]


def test_a_cell_that_cannot_be_had_does_not_end_the_others(tmp_path):
    (tmp_path / "data").mkdir()
    row = json.dumps({"sentence": "a fine day", "label": 1}) + "\n" + json.dumps({"sentence": "a bad day", "label": 0}) + "\n"
    for part in ("train", "dev"):
        (tmp_path / "data" / f"sst2.{part}.jsonl").write_text(row * 4)
    request = Request(
        "lozo-opt", scale="tiny", methods=("lozo",), tasks=("sst2", "rte"), data_dir=str(tmp_path / "data"),
        output=str(tmp_path / "out"), quiet=True, threads=1, steps=2,
    )  # fmt: skip
    document, text = reproduce(request, "x")
    good, bad = document["rows"]
    assert good["scored"] == "dev" and good["examples"] == 8
    assert good["score"] is not None and bad["score"] is None and "rte" in bad["error"]
    assert f"not measured: lozo on rte: {bad['error']}" in text
    with pytest.raises(InputError, match="rte"):
        measure_scores(Request(**vars(request) | {"tasks": ("rte",)}), CPU, tmp_path / "other", "x")


def test_small_scales_score_all_methods_on_the_same_examples(tmp_path):
    """Of a task whose answers are written too, where training itself sees a loss only."""
    (tmp_path / "data").mkdir()
    rows = [{"context": "Bern has inhabitants.", "question": f"Which city is {n}?", "answers": ["Bern"]} for n in range(24)]
    for part in ("train", "dev"):
        (tmp_path / "data" / f"squad.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = Request(
        "lozo-opt", scale="tiny", methods=("zero-shot", "lozo"), tasks=("squad",), data_dir=str(tmp_path / "data"),
        output=str(tmp_path / "out"), quiet=True, threads=1, steps=1,
    )  # fmt: skip
    rows = reproduce(request, "x")[0]["rows"]
    assert [(row["metric"], row["examples"]) for row in rows] == [("f1", 16), ("f1", 16)]
    assert all(row["score"] is not None and row["settings"]["num_eval"] == 16 for row in rows)


def test_the_grid_keeps_the_best_run(tmp_path, monkeypatch):
    scores = {(1e-6, 2): 0.5, (1e-7, 2): 0.75, (1e-6, 1): 0.25, (1e-7, 1): 0.5}
    seen = []

    def fake(settings, **_):
        seen.append((settings.lr, settings.rank, settings.interval))
        score = scores[settings.lr, settings.rank] + (0.125 if settings.interval == 2 and settings.rank == 2 else 0)
        keys = ("loss_after", "steps_done", "step_ms", "training_peak_bytes", "training_peak_over_inference", "stopped", "test")
        rest = {"method": "lozo", "task": "t", "settings": {}, "data": {"dev_examples": 4}, "parameters": 10**6}
        return dict.fromkeys(keys) | rest | {"accuracy_after": score}

    monkeypatch.setattr("lozo_kernels.hf.papers.scores.finetune", fake)
    monkeypatch.setattr("lozo_kernels.hf.papers.scores.compare_runs", lambda *_: None)
    request = Request("lozo-opt", scale="tiny", methods=("lozo",), grid=True, quiet=True)
    found = measure_scores(request, CPU, tmp_path, "x")
    assert len(seen) == 8 and found["rows"][0]["grid_points"] == 8
    assert found["rows"][0]["score"] == 87.5 and "lr1e-07-rank2" in found["rows"][0]["folder"]


def test_a_model_of_the_published_name_stands_beside_its_cells():
    document = {
        "table": "lozo-opt", "model": "facebook/opt-30b", "model_label": "facebook/opt-30b, 30000.00M parameters", "scale": "paper",
        "scale_means": "the paper's settings", "device": "g", "cpu": "c", "threads": 1, "versions": {"torch": "2"}, "commit": None,
        "date": "d", "notes": [], "rows": [{"method": "lozo", "task": "rte", "score": 66.0}],
    }  # fmt: skip
    lines = render(document).splitlines()
    assert "| measured here | facebook/opt-30b | LOZO | - | 66.0 | - | - | - | - |" in lines
    assert "| published | facebook/opt-30b | LOZO | 92.8 | 65.3 | 72.3 | 64.4 | 57.2 | 85.6 |" in lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "lozo"}, "--table 'lozo' is not known; there are lozo-opt"),
        ({"table": "memory", "scale": "big"}, "--scale 'big' is not known"),
        ({"table": "lozo-opt", "scale": "paper"}, "--scale paper needs --model"),
        ({"table": "lozo-opt", "methods": ("adam",)}, "--methods 'adam' is not known"),
        ({"table": "lozo-opt", "steps": 0}, "--steps is at least 1"),
        ({"table": "lozo-opt", "methods": ()}, "--methods names none"),
        ({"table": "memory", "scale": "tiny", "steps": 3}, "leave out --tasks, --data-dir, --grid and --steps"),
        ({"table": "memory", "scale": "tiny", "methods": ("zero-shot",)}, "none of them trains"),
        ({"table": "memory", "model": "/nowhere/at/all"}, "no usable causal model"),
    ],
)
def test_requests_that_make_no_sense(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        reproduce(Request(**options, output=str(tmp_path), quiet=True))


def test_compare_reads_runs_and_says_what_is_none(tmp_path, capsys):
    runs = []
    for method in ("lozo", "ft-sgd"):
        runs.append(tmp_path / method)
        command = [
            "finetune",
            "--task",
            "go-again",
            "--method",
            method,
            "--steps",
            "3",
            "--eval-size",
            "8",
            "--output",
            str(runs[-1]),
        ]
        assert cli.main([*command, "--batch-size", "4", "--quiet"]) == 0
    capsys.readouterr()
    assert cli.main(["compare", *map(str, runs), "--output", str(tmp_path / "plots")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].startswith("lozo (lozo)") and table[2].startswith("ft-sgd (ft-sgd)")
    assert (tmp_path / "plots" / "curves.png").is_file() and (tmp_path / "plots" / "costs.png").is_file()
    run = read_run(runs[0])
    assert len(run.seconds) == 3 and run.seconds == sorted(run.seconds)
    with pytest.raises(InputError, match=r"holds no finished run: there is no metrics\.jsonl"):
        compare_runs([tmp_path], tmp_path / "x")
    (tmp_path / "bad").mkdir()
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / "bad" / name).write_text("{")
    with pytest.raises(InputError, match=r"not the files of a run|summary\.json is not a JSON object"):
        read_run(tmp_path / "bad")


def test_finetune_with_a_method_that_trains_nothing_evaluates(capsys):
    assert cli.main(["finetune", "--task", "go-again", "--method", "zero-shot", "--num-eval", "12", "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["method"] == "zero-shot" and result["examples"] == 12 and "accuracy" in result["metrics"]
