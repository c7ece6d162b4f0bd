"""The README of a tuned model: what the Hub reads of it, and what people do."""

import json
from pathlib import Path

import pytest

from lozo_kernels.hf.finetune import finetune
from lozo_kernels.hf.reports.card import write_card
from lozo_kernels.hf.settings import Settings

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")


def header_and_body(path):
    start, header, body = path.read_text(encoding="utf-8").split("---\n", 2)
    assert start == ""
    return yaml.safe_load(header), body


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    """Of a real run of three steps on the embedded model."""
    output = tmp_path_factory.mktemp("run") / "tuned"
    settings = Settings(steps=3, eval_size=8, batch_size=4, compare_steps=0, output=str(output))
    return finetune(settings, command="lozo-kernels finetune --steps 3", quiet=True)


def test_every_saved_model_has_one(summary):
    path = Path(summary["output"]) / "model" / "README.md"
    header, body = header_and_body(path)
    assert header["library_name"] == "transformers" and header["pipeline_tag"] == "text-generation"
    assert "base_model" not in header and "datasets" not in header  # neither is on the Hub
    assert header["tags"] == ["lozo_kernels", "zeroth-order-optimization", "lozo"]
    assert header["metrics"] == ["accuracy"]
    assert "lozo-kernels finetune --steps 3" in body and "ICLR 2025" in body
    assert f"{summary['loss_after']:.4f}" in body and f"{summary['accuracy_after']:.1%}" in body
    for name in ("rank", "interval", "eps", "lr", "seed"):
        assert f"\n| {name} | " in body
    assert f"torch {summary['versions']['torch']}" in body
    assert f"{summary['training_peak_bytes'] / 2**20:,.1f} MiB" in body


def test_what_it_says_of_loading_works(summary):
    path = summary["output"] + "/model"
    _, body = header_and_body(Path(path) / "README.md")
    code = body.split("```python\n")[1].split("```")[0].replace('"tuned"', repr(path))
    found = {}
    exec(code, found)
    assert isinstance(found["model"], transformers.PreTrainedModel)
    assert found["tokenizer"]("a")["input_ids"]


def changed(summary, **settings):
    copy = json.loads(json.dumps(summary))
    copy["settings"] |= settings
    return copy


def test_names_of_the_hub(tmp_path, summary):
    some = changed(summary, model="facebook/opt-125m")
    some["data"]["source"] = "the Hub: stanfordnlp/sst2: 1000 drawn"
    some["objective"], some["test"] = "classification", {"metrics": {"accuracy": 0.9125}, "loss": 0.3, "examples": 8}
    header, body = header_and_body(write_card(tmp_path, some, ("accuracy",)))
    assert header["base_model"] == "facebook/opt-125m" and header["datasets"] == ["stanfordnlp/sst2"]
    assert header["pipeline_tag"] == "text-classification" and "AutoModelForSequenceClassification" in body
    assert "| test accuracy | | 0.9125 |" in body


def test_a_folder_is_named_without_its_path(tmp_path, summary):
    model = tmp_path / "someone" / "mine"
    model.mkdir(parents=True)
    some = changed(summary, model=str(model))
    file = tmp_path / "someone" / "notes.txt"
    file.write_text("x")
    some["data"]["source"] = f"{file}, a tenth of it held out"
    header, body = header_and_body(write_card(tmp_path, some))
    assert "base_model" not in header
    assert "`mine`" in body.lower() and "notes.txt" in body and "someone" not in body


def test_unfinished_and_unknown(tmp_path, summary):
    some = changed(summary) | {"stopped": "interrupted", "loss_after": None, "accuracy_after": None, "step_ms": None}
    header, body = header_and_body(write_card(tmp_path, some, ("accuracy",)))
    assert "metrics" not in header
    assert "stopped early" in body and "interrupted" in body


def test_the_library_of_the_hub_reads_it(summary):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(Path(summary["output"]) / "model" / "README.md")
    assert card.data.library_name == "transformers" and card.text.strip().startswith("# tuned")
