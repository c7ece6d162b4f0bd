"""What docs/serving.md and its example say runs."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from vllm import LLM

from lozo_kernels.hf.demo import MODEL

from .engines import COMMON, reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A model of reviews, as the example makes it, trained a little."""
    folder = tmp_path_factory.mktemp("writer")
    return runpy.run_path(str(ROOT / "examples" / "serving" / "rewards.py"))["write_model"](str(folder), 20)


def test_the_page(writer, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    block = page.split("```python\n")[1].split("```")[0]
    assert block.startswith("from vllm import")

    def small(model, **options):
        return LLM(writer, dtype="float32", enforce_eager=True, max_model_len=64, **options)

    monkeypatch.setattr("vllm.LLM", small)
    monkeypatch.chdir(tmp_path)
    names = {
        "texts": ["My visit to the old cafe on Monday.", "The soup was fresh."],
        "pairs": [("The soup was", " fresh.")],
        "prompts": ["The clerk was", "The room was"],
        "score": lambda prompt, completion: float("kind" in completion),
    }
    exec(compile(block.replace("max_tokens=256", "max_tokens=4").replace("interval=50", "interval=2"), "serving.md", "exec"), names)
    assert "model.embed_tokens.weight" in capsys.readouterr().out
    tuned, base = reference(str(tmp_path / "tuned")), reference(writer)
    assert any(float((p - q).abs().max()) > 0 for p, q in zip(tuned.parameters(), base.parameters(), strict=True))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned").vocab_size == 640
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert COMMON["vocab_size"] < 640 and MODEL.exists()


def test_the_example_runs(writer):
    """How much it learns is in bench/results/serving_rewards_cpu.json."""
    path = ROOT / "examples" / "serving" / "rewards.py"
    code = (
        f"import runpy; seen = runpy.run_path({str(path)!r})['main']({writer!r}, steps=3); print(len(seen), min(seen), max(seen))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    count, least, most = done.stdout.splitlines()[-1].split()
    assert count == "3" and -1 <= float(least) <= float(most) <= 1
