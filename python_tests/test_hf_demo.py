"""The demo: two screens, what they say, and a picture."""

import json

import pytest

from lozo_kernels.cli import command as cli

for package in ("transformers", "accelerate", "matplotlib", "rich"):
    pytest.importorskip(package)

SMALL = ["demo", "--steps", "4", "--architecture", "opt-tiny", "--output"]


def test_two_screens_and_a_picture(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert cli.main([*SMALL, str(folder)]) == 0
    said = capsys.readouterr()
    learning, costs = said.out.split("\n2. What a step costs")
    assert "the embedded model of 0.3M parameters" in learning and "Go again?" in learning
    before, after = (line.split() for line in learning.splitlines() if line.startswith(("its answer", "right answers")))
    assert before[3] in ("no", "yes") and before[5] in ("no", "yes") and after[-1].endswith("%")
    for name in ("two forward passes", "in place", "probe", "batched probe", "published way"):
        assert any(line.split("   ")[0].endswith(name) for line in costs.splitlines()), name
    assert said.out.rstrip().endswith(f"a picture of both: {folder / 'demo.png'}")
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert max(len(part.splitlines()) for part in (learning, costs)) <= 24  # a screen each


def test_the_demo_as_json_and_again_in_its_folder(tmp_path, capsys):
    folder = tmp_path / "demo"
    for seed in (0, 0):
        assert cli.main([*SMALL, str(folder), "--seed", str(seed), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
    assert found["learning"]["steps_done"] == 4 and found["learning"]["stopped"] is None
    assert found["costs"]["tokens"] == 32 and len(found["costs"]["rows"]) == 5
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in found["costs"]["rows"])
    example = found["example"]
    assert example["before"]["answer"] != example["right"] and example["asked"].endswith(" Go again?")
    assert 0.5 <= example["before"]["probability"] <= 1
    assert found["learning"]["evaluations"][0]["accuracy"] == found["learning"]["accuracy_before"]


def test_the_demo_replaces_nothing_of_somebody_else(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main([*SMALL, str(tmp_path)]) == 2
    assert "it holds other things than an earlier demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
