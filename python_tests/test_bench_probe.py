"""The measurements of probing in their smallest form: what is in them, and that what they report as wrong would be seen."""

from __future__ import annotations

import json

import pytest
import torch

from bench import coverage, goals, plots, probe_drift
from bench.evidence import RESULTS
from lozo_kernels import bench
from lozo_kernels.bench import models
from lozo_kernels.bench.batches import CausalBatch
from lozo_kernels.bench.entrants import METHODS, PLACEMENTS, entrants

CPU = torch.device("cpu")


def test_methods_come_in_the_placements_that_make_sense():
    found = [str(e) for e in entrants([*METHODS, "published lozo"], list(PLACEMENTS))]
    probes = ["probe", "probe-activation", "probe-scratch", "batched"]
    expected = ["lozo", *(f"lozo {p}" for p in probes), "lozo-fused", "lozo-m", *(f"lozo-m {p}" for p in probes)]
    assert found == [*expected, "mezo", "mezo probe", "published lozo"]


@pytest.mark.parametrize(
    ("tokens", "sequences", "shape"),
    [(16, 2, (2, 8)), (64, 2, (2, 32)), (512, 2, (4, 128)), (7, 2, (1, 7)), (16, 1, (1, 16)), (1, 1, (1, 1)), (300, 1, (3, 100))],
)
def test_tokens_become_sequences(tokens, sequences, shape):
    assert CausalBatch(tokens, CPU, 2048, sequences=sequences).ids.shape == shape


def test_the_losses_of_sequences_are_the_models_own():
    torch.manual_seed(0)
    model = models.build_model("opt-tiny", torch.float32, CPU)
    batch = CausalBatch(48, CPU, 128, sequences=4)
    with torch.no_grad():
        losses = batch.losses(model, batch.ids)
        assert losses.shape == (4,)
        torch.testing.assert_close(losses.mean(), batch(model))


def test_steps_of_every_placement(capsys, tmp_path):
    path = tmp_path / "step.json"
    words = ["step", "--model", "opt-tiny", "--dtype", "bfloat16", "--methods", "lozo,mezo", "--tokens", "16", "--repeats", "2"]
    assert bench.main([*words, "--peer-repeats", "1", "--placement", ",".join(PLACEMENTS), "--output", str(path)]) == 0
    assert "batched" in capsys.readouterr().out
    document = json.loads(path.read_text())
    details = {(d["method"], d["placement"]): d for d in document["details"]}
    assert list(details) == [("lozo", p) for p in PLACEMENTS] + [("mezo", "inplace"), ("mezo", "probe")]
    assert len({row["two_forwards_ms"] for row in document["rows"]}) == 1
    for (_, placement), detail in details.items():
        assert detail["sequences"] == [2, 8] and detail["times_two_forwards"] > 0
        assert detail["forwards"].startswith("two forwards") and detail["forwards_each_to_own"] > 0
        assert ("merge_ms" in detail) == ("sides" in detail) == (placement != "inplace")
    assert "activation" in details["lozo", "probe-activation"]["sides"]
    assert "activation" not in details["lozo", "probe-scratch"]["sides"]
    assert list(plots.figures(document)) == ["-bfloat16"]


def test_older_results_can_still_be_drawn():
    for name in ("step_cpu", "memory_cpu"):
        document = json.loads((RESULTS / f"{name}.json").read_text())
        for figure in plots.figures(document).values():
            plots.plt.close(figure)


def test_ratios_are_judged():
    details = [
        {
            "method": "lozo",
            "placement": placement,
            "dtype": "float32",
            "tokens": tokens,
            "times_two_forwards": ratio,
            "overhead": 0.01,
        }
        for placement, tokens, ratio in (("probe", 512, 1.05), ("probe", 128, 1.2), ("batched", 16, 0.7), ("inplace", 512, 3.0))
    ]
    judged = goals.judge_ratios(details, "cpu", "opt-125m")
    assert [(t["placement"], t["tokens"], t["met"]) for t in judged] == [
        ("probe", 512, True),
        ("probe", 128, False),
        ("batched", 16, True),
    ]
    assert sum(goals.describe(t).startswith("missed") for t in judged) == 1
    assert not goals.judge_ratios(details, "cpu", "opt-1.3b")
    older = {"method": "lozo", "dtype": "bfloat16", "tokens": 512, "overhead": 0.03}
    assert [t["met"] for t in goals.judge_step([older, older | {"placement": "probe"}], "cpu", "opt-125m")] == [True]


def test_memory_of_every_placement(capsys, tmp_path):
    path = tmp_path / "memory.json"
    words = ["memory", "--model", "opt-tiny", "--dtype", "float32", "--methods", "lozo", "--tokens", "16"]
    assert bench.main([*words, "--placement", ",".join(PLACEMENTS), "--output", str(path)]) == 0
    assert "first step" in capsys.readouterr().out
    document = json.loads(path.read_text())
    rows = {row["placement"]: row for row in document["rows"]}
    assert list(rows) == list(PLACEMENTS)
    inplace = rows.pop("inplace")
    assert inplace["first_step_bytes"] is inplace["factor_bytes"] is inplace["scratch_bytes"] is None
    for row in rows.values():
        held = row["factor_bytes"] + row["scratch_bytes"] + row["copy_bytes"]
        assert 0 < held <= row["persistent_bytes"] <= row["extra_bytes"]
        assert row["first_step_bytes"] > 0
    largest = max(torch.Size(shape).numel() for _, shape in models.parameter_shapes("opt-tiny")) * 4
    assert rows["probe-scratch"]["scratch_bytes"] >= largest > rows["probe-activation"]["scratch_bytes"]
    judged = [t for t in goals.judge(document) if "target_bytes" in t]
    assert [t["placement"] for t in judged] == ["probe", "probe-activation", "probe-scratch"]
    assert all(t["met"] == (t["measured_bytes"] <= t["target_bytes"]) for t in judged)


def test_architectures(tmp_path, capsys):
    output, page = tmp_path / "coverage.json", tmp_path / "coverage.md"
    assert coverage.main(["--only", "llama,resnet", "--output", str(output), "--page", str(page)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(r["name"], r["side"]) for r in rows] == [(n, s) for n in ("llama", "resnet") for s in coverage.SIDES]
    assert all(r["untouched"] and "error" not in r for r in rows)
    assert "| llama | decoder | " in page.read_text() and "2 architectures" in capsys.readouterr().out


def test_an_architecture_that_fails_is_a_result(tmp_path, monkeypatch):
    def fails(name, side, seed):
        raise RuntimeError("no such layer\nand more")

    monkeypatch.setattr(coverage, "check", fails)
    page = tmp_path / "coverage.md"
    assert coverage.main(["--only", "llama", "--output", str(tmp_path / "coverage.json"), "--page", str(page)]) == 1
    assert "RuntimeError: no such layer |" in page.read_text()


def test_drift_of_a_real_model(tmp_path, capsys):
    output = tmp_path / "probe_drift.json"
    words = ["--probes", "6", "--steps", "3", "--eval-every", "2", "--eval-size", "8", "--only", "bfloat16"]
    assert probe_drift.main([*words, "--output", str(output)]) == 0
    document = json.loads(output.read_text())
    for row in document["drift"]:
        last = row["points"][-1]
        assert last["probes"] == 6 and last["bits_equal"] == row["placement"].startswith("probe")
        assert (last["relative_distance"] > 0) != last["bits_equal"] and row["restored"]["bits_equal"] == last["bits_equal"]
    assert [c["steps"] for c in document["curves"]] == [[0, 2, 3]] * len(document["curves"])
    assert {(c["dtype"], c["placement"]) for c in document["curves"]} >= {("float32", "in place"), ("bfloat16", "probe, scratch")}
    assert all(t["met"] for t in document["targets"] if "bit-identical" in t["goal"])
    assert output.with_suffix(".png").stat().st_size > 0
    assert "bit-identical" in capsys.readouterr().out


def test_a_run_is_held_to_the_one_without_rounding():
    curves = [
        {"placement": "in place", "dtype": "float32", "dev_loss": [4.0, 3.5, 3.0], "c": [3.0, -4.0]},
        {"placement": "probe", "dtype": "bfloat16", "dev_loss": [4.1, 3.4, 3.11], "c": [3.0, -4.5]},
        {"placement": "probe", "dtype": "float16", "dev_loss": [4.0, 3.6], "c": [3.0]},
        {"placement": "published", "dtype": "bfloat16", "dev_loss": [4.0, 3.0, 3.0]},
    ]
    probe_drift.follow(curves)
    assert [c.get("off_at_end") for c in curves] == [0.0, pytest.approx(0.01), pytest.approx(0.2), None]
    assert curves[1]["off_at_most"] == pytest.approx(0.2)
    assert [c.get("c_off") for c in curves] == [0.0, pytest.approx(0.1), 0.0, None]
