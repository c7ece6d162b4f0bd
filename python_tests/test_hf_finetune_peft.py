"""Runs that train adapters, on plain and on quantised models, and models that go to the Hub."""

import json

import pytest
import torch

from lozo_kernels.cli import command as cli
from lozo_kernels.errors import InputError
from lozo_kernels.hf import finetune as module
from lozo_kernels.hf.demo import MODEL
from lozo_kernels.hf.evaluate import evaluate
from lozo_kernels.hf.finetune import finetune
from lozo_kernels.hf.settings import Settings

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

GIVEN = {"steps": 4, "eval_every": 2, "eval_size": 8, "batch_size": 4, "compare_steps": 0, "threads": 1, "lr": 1e-2, "num_eval": 8}


def run(folder, **more):
    return finetune(Settings(**{**GIVEN, **more, "output": str(folder)}), quiet=True)


def adapter_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "adapter_model.safetensors")


@pytest.mark.parametrize(("method", "keep"), [("lozo", "best"), ("mezo", "last"), ("ft", "best")])
def test_adapters_are_what_is_trained_and_saved(tmp_path, method, keep):
    pytest.importorskip("peft")
    summary = run(tmp_path, peft=True, lora_rank=4, method=method, keep=keep)
    saved = adapter_of(tmp_path)
    assert sum(t.numel() for t in saved.values()) == summary["trained_parameters"] < 0.05 * summary["parameters"]
    assert all(t.shape[0] == 4 for name, t in saved.items() if "lora_A" in name)
    assert any(t.any() for name, t in saved.items() if "lora_B" in name)  # it is zero where nothing was learned
    assert "an adapter, for which peft has to be installed" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    scored = evaluate(Settings(method="zero-shot", num_eval=8), checkpoint=str(tmp_path), quiet=True)
    assert scored["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)
    if method != "ft":
        assert cli.main(["verify", "--journal", str(tmp_path), "--checkpoint", str(tmp_path)]) == 0


def test_a_run_with_adapters_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    run(tmp_path / "whole", peft=True)
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", peft=True)
    assert cli.main(["finetune", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    a, b = (adapter_of(tmp_path / name) for name in ("run", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_adapters_on_a_quantised_model(tmp_path, bits, placement):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    summary = run(tmp_path, peft=True, placement=placement, interval=2, keep="best", **{bits: True})
    assert summary["stopped"] is None and summary["weight_bytes"] < 4 * summary["parameters"]
    assert any(t.any() for name, t in adapter_of(tmp_path).items() if "lora_B" in name)
    assert cli.main(["verify", "--journal", str(tmp_path), "--checkpoint", str(tmp_path)]) == 0
    scored = evaluate(Settings(method="zero-shot", num_eval=8, **{bits: True}), checkpoint=str(tmp_path), quiet=True)
    assert scored["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"load_in_8bit": True}, "need --peft"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "not both"),
        ({"peft": True, "method": "ft-lora"}, "--method ft-lora merges its adapters"),
        ({"peft": True, "compare_steps": 4}, "the published code has no --peft"),
        ({"push_to_hub": "no such name"}, "--push-to-hub is OWNER/NAME"),
    ],
)
def test_what_does_not_go_together(more, words):
    with pytest.raises(InputError, match=words):
        Settings(**more).resolved()


class Hub:
    """What the client of the Hub is asked."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def __call__(self):
        return self

    def whoami(self):
        if self.error == "whoami":
            raise OSError("no token")

    def create_repo(self, name, **_):
        self.calls.append(name)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.error == "upload":
            raise OSError("no space")
        self.calls.append((repo_id, folder_path, commit_message))


def test_a_tuned_model_goes_to_the_hub(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    run(tmp_path / "run", push_to_hub="me/tuned")
    assert hub.calls == ["me/tuned", ("me/tuned", str(tmp_path / "run" / "model"), "Tuned with lozo_kernels")]


def test_what_the_hub_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub("whoami"))
    with pytest.raises(InputError, match="--push-to-hub: no token; `hf auth login`"):
        run(tmp_path / "run", push_to_hub="me/tuned")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("huggingface_hub.HfApi", Hub("upload"))
    with pytest.raises(InputError, match="was not pushed: no space; `hf upload me/tuned"):
        run(tmp_path / "run", push_to_hub="me/tuned")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] is None


def test_the_embedded_model_is_the_base_of_its_adapter(tmp_path):
    pytest.importorskip("peft")
    run(tmp_path, peft=True, steps=1, eval_every=1)
    base = json.loads((tmp_path / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(MODEL)
