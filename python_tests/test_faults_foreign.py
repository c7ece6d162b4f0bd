"""Folders and files of strangers: their code does not run, and what is odd in them is one line, never a traceback."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from lozo_kernels.cli import command as cli  # noqa: E402
from python_tests.hf_tiny import tiny_llama, tiny_roberta  # noqa: E402

TRAIN = ["--steps", "2", "--batch-size", "2", "--eval-size", "2", "--max-length", "16", "--compare-steps", "0", "--quiet"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"), context=64)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return tiny_roberta(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text("".join(f"good description number {i}\n" for i in range(20)))
    return file


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    file = tmp_path_factory.mktemp("labelled") / "train.jsonl"
    file.write_text("".join(json.dumps({"text": f"good {i}", "label": i % 2}) + "\n" for i in range(20)))
    return file


def copied(folder, target, **changes):
    """A copy of a model's folder with other values in its configuration; None takes a field away."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None or k not in changes}))
    return target


def run(*argv):
    try:
        return cli.main([str(word) for word in argv])
    except SystemExit as e:  # argparse ends the process itself
        return e.code


def one_line(capsys, code, *words):
    """Checks that a command was refused in one line that has these words."""
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and err.startswith("lozo-kernels "), err
    assert all(word in err for word in words), err
    assert err.isprintable() or err[:-1].isprintable()


# -- the code of a folder ------------------------------------------------------------------------------------------------------


CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OddConfig(LlamaConfig):
    model_type = "odd-llama"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(tmp_path, llama):
    """A model that needs Python code of its folder, as many on the Hub do, and the file that its code writes when it runs."""
    mark = tmp_path / "mark"
    names = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    folder = copied(llama, tmp_path / "odd", model_type="odd-llama", architectures=["OddForCausalLM"], auto_map=names)
    (folder / "odd.py").write_text(CODE.format(mark=str(mark)))
    return folder, mark


def commands(folder, text, out):
    return {
        "plan": ["plan", "--model", folder, "--device-bandwidth", "10", "--sequence-length", "16"],
        "finetune": ["finetune", "--model", folder, "--train-file", text, "--output", out, *TRAIN],
        "evaluate": ["evaluate", "--model", folder, "--train-file", text, "--num-eval", "2", "--quiet"],
        "checkpoint": ["evaluate", "--checkpoint", folder, "--train-file", text, "--num-eval", "2", "--quiet"],
        "reproduce": ["reproduce", "--table", "memory", "--scale", "tiny", "--model", folder, "--output", out, "--methods", "lozo"],
    }


@pytest.mark.parametrize("command", commands("", "", ""))
def test_code_of_a_folder_does_not_run(tmp_path, capsys, monkeypatch, with_code, text, command):
    folder, mark = with_code
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # as ``echo y |`` in front of the command
    code = run(*commands(folder, text, tmp_path / "out")[command], *(["--quiet"] if command == "reproduce" else []))
    assert not mark.exists()
    one_line(capsys, code, "--trust-remote-code")


def test_a_pipe_of_yes_does_not_run_it(with_code):
    folder, mark = with_code
    command = [sys.executable, "-m", "lozo_kernels", "plan", "--model", str(folder), "--device-bandwidth", "10"]
    root = str(Path(cli.__file__).resolve().parents[2])
    done = subprocess.run(command, input="y\n", capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root})
    assert done.returncode == 2 and not mark.exists(), done.stderr


@pytest.mark.parametrize("command", ["plan", "finetune", "evaluate"])
def test_code_runs_for_who_wants_it(tmp_path, capsys, with_code, text, command):
    folder, mark = with_code
    assert run(*commands(folder, text, tmp_path / "out")[command], "--trust-remote-code") == 0, capsys.readouterr().err
    assert mark.exists()


def test_code_of_a_tokenizer_does_not_run(tmp_path, capsys, monkeypatch, llama, text):
    mark, folder = tmp_path / "mark", copied(llama, tmp_path / "odd")
    (folder / "odd.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": ["odd.OddTokenizer", "odd.OddTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    run(*commands(folder, text, tmp_path / "out")["finetune"])
    assert not mark.exists()


def test_code_that_generates_does_not_run(tmp_path, monkeypatch, llama, text):
    mark, folder = tmp_path / "mark", copied(llama, tmp_path / "odd")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(mark)!r}, 'w')\ndef generate(model, **_): ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert run(*commands(folder, text, tmp_path / "out")["finetune"]) == 0
    assert not mark.exists()


def test_a_journal_cannot_say_that_code_is_trusted(tmp_path, capsys, monkeypatch, with_code, text):
    folder, mark = with_code
    out = tmp_path / "out"
    assert run(*commands(folder, text, out)["finetune"], "--trust-remote-code") == 0
    capsys.readouterr()
    mark.unlink()
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for argv in (["replay", "--output", tmp_path / "again"], ["verify"], ["revert", "--step", "1", "--output", tmp_path / "back"]):
        one_line(capsys, run(*argv, "--journal", out), "--trust-remote-code")
        assert not mark.exists()
    (out / "summary.json").unlink()
    one_line(capsys, run("finetune", "--resume", out, "--quiet"), "--trust-remote-code")
    assert not mark.exists()
    assert run("verify", "--journal", out, "--trust-remote-code") == 0


def test_every_call_says_whether_code_is_trusted():
    """transformers asks on the terminal where nothing is said."""
    silent = []
    for file in Path(cli.__file__).resolve().parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") not in ("from_pretrained", "from_config"):
                continue
            if not any(keyword.arg == "trust_remote_code" for keyword in node.keywords):
                silent.append(ast.unparse(node.func))
    assert silent == ["peft.PeftModel.from_pretrained"]  # which loads no code


# -- odd configurations --------------------------------------------------------------------------------------------------------


HUGE = 10**400
ODD = [
    {"model_type": 5},
    {"model_type": ["llama"]},
    {"model_type": "no such type"},
    {"model_type": "\ud800"},
    {"architectures": "LlamaForCausalLM"},
    {"architectures": 5},
    {"architectures": [5]},
    {"architectures": {"a": 1}},
    {"architectures": ["\ud800ForCausalLM"]},
    {"hidden_size": 0},
    {"hidden_size": -8},
    {"hidden_size": "x"},
    {"hidden_size": HUGE},
    {"hidden_size": 1.5},
    {"hidden_size": []},
    {"num_attention_heads": 0},
    {"num_attention_heads": 3},
    {"num_key_value_heads": 0},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": "two"},
    {"vocab_size": -1},
    {"vocab_size": 3},
    {"vocab_size": "many"},
    {"vocab_size": HUGE},
    {"max_position_embeddings": "many"},
    {"max_position_embeddings": []},
    {"max_position_embeddings": 0},
    {"max_position_embeddings": HUGE},
    {"pad_token_id": "x"},
    {"pad_token_id": 10**6},
    {"pad_token_id": HUGE},
    {"hidden_act": "no such"},
    {"hidden_act": 5},
    {"rope_parameters": 5},
    {"rope_parameters": {"rope_type": "no such"}},
    {"rope_scaling": []},
    {"dtype": "no such"},
    {"dtype": 5},
    {"quantization_config": 5},
    {"quantization_config": {"quant_method": "no such"}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"auto_map": 5},
    {"auto_map": {"AutoConfig": 5}},
    {"attn_implementation": "somebody/kernel"},
    {"initializer_range": "big"},
    {"rms_norm_eps": "small"},
    {"tie_word_embeddings": "yes"},
    {"id2label": 5},
    {"num_labels": "x"},
    {"head_dim": 0},
    {"mlp_bias": 7},
    {"transformers_version": 5},
]


@pytest.mark.parametrize("changes", ODD, ids=lambda changes: ascii(changes)[:60])
@pytest.mark.parametrize("command", ["plan", "finetune"])
def test_an_odd_configuration_works_or_is_one_line(tmp_path, capsys, llama, text, changes, command):
    folder = copied(llama, tmp_path / "odd", **changes)
    code = run(*commands(folder, text, tmp_path / "out")[command])
    if code != 0:
        one_line(capsys, code)


@pytest.mark.parametrize("content", [b"[]", b"5", b'"llama"', b"null", b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_file_of_a_model(tmp_path, capsys, llama, text, file, content):
    folder = copied(llama, tmp_path / "odd")
    (folder / file).write_bytes(content)
    for command in ("plan", "finetune") if file == "config.json" else ("finetune",):
        code = run(*commands(folder, text, tmp_path / "out")[command])
        if code != 0:
            one_line(capsys, code)
        capsys.readouterr()


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:-50], lambda b: b"\xff" * 8 + b[8:]])
def test_damaged_weights(tmp_path, capsys, llama, text, damage):
    folder = copied(llama, tmp_path / "odd")
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    one_line(capsys, run(*commands(folder, text, tmp_path / "out")["finetune"]), str(folder))


# -- checkpoints that lack weights ---------------------------------------------------------------------------------------------


def without(folder, target, *patterns, **others):
    """A copy of a model's folder whose checkpoint lacks some weights, or has them in another shape."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    kept = {k: v for k, v in load_file(target / "model.safetensors").items() if not any(p in k for p in patterns)}
    save_file({k: others.get(k.replace(".", "_"), v) for k, v in kept.items()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("lost", "named"),
    [("mlp.down_proj", "mlp.down_proj"), ("layers.0", "layers.0"), ("input_layernorm", "norm"), ("embed_tokens", "lm_head")],
)
def test_a_decoder_that_lacks_weights(tmp_path, capsys, llama, text, lost, named):
    folder = without(llama, tmp_path / "odd", lost)
    for command in ("finetune", "evaluate"):
        argv = commands(folder, text, tmp_path / "out")[command]
        one_line(capsys, run(*argv), "lacks", named, "--allow-missing-weights")
        assert not (tmp_path / "out" / "run.journal").exists()
    assert run(*commands(folder, text, tmp_path / "out")["finetune"], "--allow-missing-weights") == 0
    assert run("verify", "--journal", tmp_path / "out") == 0


@pytest.mark.parametrize("lost", ["attention.self.query", "intermediate", "word_embeddings"])
def test_an_encoder_may_lack_its_head_only(tmp_path, capsys, roberta, labelled, lost):
    train = ["finetune", "--train-file", labelled, "--output", tmp_path / "out", "--overwrite", *TRAIN, "--model"]
    assert run(*train, roberta) == 0  # a classification head is new to a masked language model
    capsys.readouterr()
    odd = without(roberta, tmp_path / "odd", lost)
    one_line(capsys, run(*train, odd), "lacks", lost, "--allow-missing-weights")
    assert run(*train, odd, "--allow-missing-weights") == 0


def test_weights_of_another_shape_are_lacking(tmp_path, capsys, roberta, labelled):
    odd = without(roberta, tmp_path / "odd", roberta_encoder_layer_0_intermediate_dense_bias=torch.zeros(5))
    code = run("finetune", "--train-file", labelled, "--output", tmp_path / "out", *TRAIN, "--model", odd)
    one_line(capsys, code, "another shape", "intermediate.dense.bias")


def test_layers_that_are_not_used_are_noted(tmp_path, capsys, llama, text):
    folder = copied(llama, tmp_path / "odd", num_hidden_layers=0)
    assert run("evaluate", "--model", folder, "--train-file", text, "--num-eval", "2", "--quiet") == 0
    assert "not in the model" in capsys.readouterr().out
