"""The command: what it prints, how it ends, and what it says to bad input."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from hf_helpers import REPO, write_jsonl
from machine import stretched, wait_until

import lozo_kernels
from lozo_kernels.cli import command as cli
from lozo_kernels.cli import doctor
from lozo_kernels.hf.settings import Settings

GOOD_ROWS = [{"text": f"sentence number {i}", "label": i % 2} for i in range(8)]


def run(*argv):
    """Exit code of the command, also when argparse ends it."""
    try:
        return cli.main(list(argv))
    except SystemExit as e:
        return e.code


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--method adam", "--method 'adam' is not known; there are lozo, lozo-m, mezo, mezo-m"),
        ("--task sst3", "--task 'sst3' is not known; there are go-again, sst2, sst5, trec, rte, "),
        ("--dtype int8", "--dtype 'int8' is not known; there are float32, bfloat16, float16"),
        ("--scaling both", "--scaling 'both' is not known; there are paper, card, published"),
        ("--method mezo --directions-law normals", "--directions-law 'normals' is not known; there are normal, rademacher"),
        ("--method ft --directions-law rademacher", "--directions-law means nothing to --method ft"),
        ("--objective rl", "--objective 'rl' is not known"),
        ("--lr-schedule step", "--lr-schedule 'step' is not known"),
        ("--rank 0", "--rank is at least 1, not 0"),
        ("--rank 65", "--rank is at most 64, not 65"),
        ("--rank two", "argument --rank: invalid int value: 'two'"),
        ("--interval 0", "--interval is at least 1"),
        ("--eps 0", "--eps is above 0"),
        ("--eps nan", "--eps is a finite number of at least 0, not nan"),
        ("--lr nan", "--lr is a finite number of at least 0, not nan"),
        ("--lr inf", "--lr is a finite number"),
        ("--lr=-1e-6", "--lr is a finite number of at least 0, not -1e-06"),
        ("--weight-decay -1", "--weight-decay is a finite number of at least 0"),
        ("--method lozo-m --momentum 1.0", "--momentum is below 1"),
        ("--momentum 0.9", "--method lozo with --momentum 0.9 is --method lozo-m"),
        ("--method mezo-m --momentum 0", "--method mezo-m with --momentum 0 is --method mezo"),
        ("--method mezo --rank 4", "--rank means nothing to --method mezo: leave it out"),
        ("--method mezo-m --interval 10", "--interval means nothing to --method mezo-m"),
        ("--method mezo --scaling published", "--scaling means nothing to --method mezo"),
        ("--method subzero --scaling published", "--scaling means nothing to --method subzero"),
        ("--num-shots 4", "--num-shots means nothing to --method lozo"),
        ("--method zero-shot --num-shots 4", "--num-shots means nothing to --method zero-shot"),
        ("--method zero-shot --steps 10", "--steps means nothing to --method zero-shot"),
        ("--method icl --k-shot 16", "--k-shot means nothing to --method icl"),
        ("--method icl --lr 1e-3", "--lr means nothing to --method icl"),
        ("--steps 0", "--steps is at least 1"),
        ("--batch-size 0", "--batch-size is at least 1"),
        ("--directions 0", "--directions is at least 1"),
        ("--directions 2 --compare-steps 5", "the published code has no --directions"),
        ("--eval-every 0", "--eval-every is at least 1"),
        ("--threads 0", "--threads is at least 1"),
        ("--seed -1", "--seed is at least 0"),
        ("--device tpu9", "--device tpu9: "),
        ("--backend fast --steps 1", "no backend 'fast'; there are "),
        ("--model ./nowhere --task sst2", "--model: there is no folder ./nowhere"),
        ("--model empty --task sst2", "--model: the folder empty has no config.json"),
        ("--model empty", "--model needs something to learn: --task"),
        ("--train-file missing.jsonl", "--train-file: there is no file missing.jsonl"),
        ("--train-file good.jsonl --dev-file missing.jsonl", "--dev-file: there is no file missing.jsonl"),
        ("--dev-file good.jsonl", "--dev-file goes with --train-file"),
        ("--task sst2 --data-dir nowhere", "--data-dir: there is no folder nowhere"),
        ("--task sst2 --data-dir empty", "--data-dir empty: no sst2.train.jsonl"),
        ("--data-dir empty", "--data-dir goes with --task"),
        ("--task text", "--task text needs --train-file or --data-dir"),
        ("--train-file broken.jsonl", "broken.jsonl, line 3: not JSON"),
        ("--train-file list.jsonl", "list.jsonl, line 1: a JSON object is needed, this is list"),
        ("--task sst2 --train-file good.jsonl --dev-file out.jsonl", "out.jsonl, line 2: label 7 is none of the 2 classes of sst2"),
        ("--train-file good.jsonl --dev-file out.jsonl", "out.jsonl, line 2: label 7 is none of the 2 classes of good: 0, 1"),
        ("--train-file blank.jsonl", "blank.jsonl: no examples"),
        ("--train-file good.jsonl --task rte", "good.jsonl, line 1: no field 'premise' or 'text_a' or 'sentence1'"),
        ("--train-file number.jsonl", "number.jsonl, line 1: 'text' is 5, a text is needed"),
        ("--train-file gap.jsonl", "labels are either all names or the numbers 0, 1, 2, ... without a gap"),
        ("--train-file latin.txt", "latin.txt: not UTF-8 text"),
        ("--output file.txt", "--output: file.txt is a file"),
        ("--output file.txt/deeper", "--output: file.txt is a file"),
        ("--bogus 1", "unrecognized arguments: --bogus"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(in_tmp, capsys, argv, message):
    (in_tmp / "empty").mkdir()
    (in_tmp / "file.txt").write_text("x")
    (in_tmp / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (in_tmp / "blank.jsonl").write_text("\n\n")
    (in_tmp / "broken.jsonl").write_text('{"text": "a", "label": 0}\n\n{"text": \n')
    (in_tmp / "list.jsonl").write_text("[1]\n")
    write_jsonl(in_tmp / "good.jsonl", GOOD_ROWS)
    write_jsonl(in_tmp / "out.jsonl", [GOOD_ROWS[0], {"text": "b", "label": 7}])
    write_jsonl(in_tmp / "number.jsonl", [{"text": 5}])
    write_jsonl(in_tmp / "gap.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 2}])
    code = run("finetune", *argv.split())
    out, err = capsys.readouterr()
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith(("lozo-kernels finetune: error: ", "lozo-kernels: error: "))
    assert out == ""
    assert not (in_tmp / "runs").exists()


def test_no_subcommand_and_an_unknown_one(capsys):
    assert run() == 2
    assert run("train") == 2
    assert "finetune" in capsys.readouterr().err


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("package", ["transformers", "tqdm", "matplotlib"])
def test_a_missing_package_is_named_with_the_way_to_get_it(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert run("finetune", "--steps", "1") == 2
    err = capsys.readouterr().err
    (line,) = err.splitlines()
    assert line.startswith(f"lozo-kernels finetune: error: this needs the package '{package}': pip install '{package}")


@pytest.mark.usefixtures("in_tmp")
def test_hub_data_needs_datasets(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run("finetune", "--task", "sst2") == 2
    assert "pip install 'datasets" in capsys.readouterr().err


def test_starts_without_optional_packages():
    blocked = "import sys; sys.modules.update({m: None for m in ('transformers', 'tqdm', 'matplotlib', 'tokenizers', 'datasets')})"
    script = f"{blocked}; from lozo_kernels.cli.command import main; sys.exit(main(['finetune', '--help']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert "--train-file" in done.stdout


def test_every_setting_is_an_option():
    """Settings and command line stay in step."""
    args = vars(cli.make_parser().parse_args(["finetune"]))
    assert set(Settings.__dataclass_fields__) <= args.keys()
    assert Settings(**{f: args[f] for f in Settings.__dataclass_fields__}) == Settings()


def test_bench_gets_its_arguments_untouched(monkeypatch):
    import lozo_kernels.bench

    seen = []
    monkeypatch.setattr(lozo_kernels.bench, "main", lambda argv: seen.append(argv) or 3)
    assert run("bench", "perturb", "--help", "--json") == 3
    assert seen == [["perturb", "--help", "--json"]]


def test_version(capsys):
    assert run("--version") == 0
    assert lozo_kernels.__version__ in capsys.readouterr().out


def test_doctor_reports_and_passes(capsys, monkeypatch):
    real = doctor._test_backend
    # The interpreter takes a minute for what test_triton.py tests.
    monkeypatch.setattr(doctor, "_test_backend", lambda name, device: None if name == "triton" else real(name, device))
    assert run("doctor") == 0
    out = capsys.readouterr().out
    for expected in ("torch", torch.__version__, "backends for cpu", "eager", "native library", "self-test", "noise contract"):
        assert expected in out
    assert "FAILED" not in out


def test_doctor_json(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "self_test", list)
    assert run("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert found["versions"]["lozo_kernels"] == lozo_kernels.__version__
    assert found["backends"]["cpu"].keys() >= {"eager", "native"}
    assert found["devices"]["cpu"]


def test_doctor_fails_when_the_self_test_does(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_NOISE_DIGEST", "0")
    monkeypatch.setattr(doctor, "_test_step", lambda _: 1 / 0)
    monkeypatch.setattr(doctor, "_test_backend", lambda *_: None)
    assert run("doctor") == 1
    out = capsys.readouterr().out
    assert "FAILED  noise contract" in out
    assert "ZeroDivisionError" in out


def test_doctor_says_why_the_native_library_is_out(capsys, monkeypatch):
    def broken():
        raise OSError("no such library")

    monkeypatch.setattr(doctor.native, "isa", broken)
    monkeypatch.setattr(doctor, "self_test", list)
    assert run("doctor") == 0
    assert "no such library" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="SIGINT")
def test_ctrl_c_saves_what_there_is(tmp_path):
    command = [sys.executable, "-m", "lozo_kernels", "finetune", "--steps", "100000", "--output", str(tmp_path / "out"), "--json"]
    process = subprocess.Popen(
        [*command, "--compare-steps", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    began = wait_until(lambda: process.poll() is not None or (metrics.exists() and '"step": 5,' in metrics.read_text()))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=stretched(60))
    assert began, err
    assert process.returncode == 130, err
    summary = json.loads(out)
    assert summary["stopped"] == "interrupted"
    assert 0 < summary["steps_done"] < 100000
    assert "stopped after" in err and "was saved in" in err
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(summary["steps_done"]))
    for name in ("summary.json", "loss.png", "model/model.safetensors"):
        assert (tmp_path / "out" / name).stat().st_size
