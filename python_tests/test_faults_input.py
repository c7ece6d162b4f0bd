"""What people type and what their machines hold: mistyped options, paths that none can be, damaged files, half a library."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lozo_kernels import PatchConfig
from lozo_kernels.bench.arguments import Parser
from lozo_kernels.cli import command as cli
from lozo_kernels.errors import InputError
from lozo_kernels.kernels.backends import native
from lozo_kernels.kernels.backends.cuda import CudaBackend
from lozo_kernels.kernels.backends.native import NativeBackend
from lozo_kernels.kernels.registry import choose_backend

pytest.importorskip("transformers")

from lozo_kernels.hf.command_line import check_options, read_options
from lozo_kernels.hf.loop.records import EvalRecord, MetricsLog, StepRecord, read_metrics
from lozo_kernels.hf.planning import machine
from lozo_kernels.hf.settings import Settings

ROOT = Path(cli.__file__).resolve().parents[2]
CPU = torch.device("cpu")


def run(*argv):
    try:
        return cli.main([str(word) for word in argv])
    except SystemExit as e:
        return e.code


def one_line(capsys, code, *words):
    err = capsys.readouterr().err
    assert code in (1, 2) and err.count("\n") == 1 and err.startswith("lozo-kernels"), err
    assert len(err) < 2000 and err[:-1].isprintable() and all(word in err for word in words), err


# -- words that were meant otherwise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("finetune --rnak 3", "--rank"),
        ("finetune --learning_rate 1", "--lr"),
        ("finetune --batch_size=4", "--batch-size"),
        ("finetune --evalevery 4", "--eval-every"),
        ("finetune --methd lozo --rank 3", "--method"),
        ("fintune", "finetune"),
        ("reprduce", "reproduce"),
        ("finetune --method loz", "lozo"),
        ("finetune --task sst-2", "sst2"),
        ("finetune --task SST-2", "sst2"),
        ("finetune --dtype bfloat", "bfloat16"),
        ("finetune --placement porbe", "probe"),
        ("evaluate --chekpoint x", "--checkpoint"),
        ("plan --modle x", "--model"),
        ("plan --model x --device-bandwith 5", "--device-bandwidth"),
        ("reproduce --table memry", "memory"),
        ("replay --jurnal x", "--journal"),
        ("verify --journal x --chekpoint y", "--checkpoint"),
        ("compare --outptu x y", "--output"),
        ("doctor --jsn", "--json"),
        ("tune --second 4", None),
        ("bench pertrub", "perturb"),
        ("bench perturb --thread 4 --outptu x", "--output"),
        ("bench step --model opt-125", "opt-125m"),
    ],
)
def test_a_mistyped_word_is_named(capsys, line, meant):
    if meant is None:  # an abbreviation is no mistake: only the machine is in the way
        assert run(*line.split()) in (0, 2)
        return
    if meant == "--lr":  # nothing is like it, and then nothing is guessed
        one_line(capsys, run(*line.split()), "unrecognized arguments: --learning_rate")
        return
    one_line(capsys, run(*line.split()), f"did you mean {meant}?")


def test_what_is_like_nothing_gets_no_guess(capsys):
    one_line(capsys, run("finetune", "--qqqq", "5"), "unrecognized arguments: --qqqq")
    assert "did you mean" not in capsys.readouterr().err


def test_a_value_may_look_like_an_option():
    parser = Parser(prog="x")
    parser.add_argument("--rank", type=int)
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--rank=-3", "--", "--rnak"]).words == ["--rnak"]
    with pytest.raises(InputError, match="did you mean --rank"):
        parser.parse_args(["--rnak", "3"])


COMMANDS = ("finetune", "evaluate", "plan", "reproduce", "replay", "verify", "revert", "compare", "diff")


def documented():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in page.read_text(encoding="utf-8").splitlines():
            found = re.match(
                r"    (?:.*-m lozo_kernels|lozo-kernels) ((?:finetune|evaluate|plan|reproduce|replay|verify|revert)\b.*)", line
            )
            if found:
                yield page.name, found[1].split("#")[0].strip().removesuffix(" ...")


@pytest.mark.parametrize(("page", "line"), list(documented()))
def test_commands_of_the_documents_are_commands(page, line):
    """Those that a test cannot run, such as several processes with a model of the Hub, have options and words that there are."""
    args = cli.make_parser().parse_args(shlex.split(line))
    if args.subcommand in ("finetune", "evaluate"):
        check_options(read_options(Settings, args))


# -- paths ---------------------------------------------------------------------------------------------------------------------

NO_PATHS = {"NUL": "a\0b", "a lone surrogate": "a\udcffb", "a long name": "x" * 300, "a long path": "/".join(["x" * 100] * 50)}
TAKING_PATHS = [
    "finetune --model PATH --task sst2",
    "finetune --train-file PATH",
    "finetune --train-file FILE --dev-file PATH",
    "finetune --task sst2 --data-dir PATH",
    "finetune --output PATH",
    "finetune --resume PATH",
    "evaluate --model PATH --task sst2",
    "evaluate --checkpoint PATH",
    "plan --model PATH",
    "reproduce --table memory --output PATH",
    "reproduce --table memory --model PATH",
    "compare PATH",
    "compare FILE --output PATH",
    "replay --journal PATH --output FILE",
    "replay --journal FILE --output PATH",
    "replay --journal FILE --output FILE --model PATH",
    "verify --journal FILE --checkpoint PATH",
    "revert --journal PATH --output FILE --step 1",
    "diff FILE PATH",
    "tune --output PATH",
    "bench perturb --output PATH",
]


@pytest.mark.parametrize("line", TAKING_PATHS)
@pytest.mark.parametrize("name", NO_PATHS)
def test_a_path_that_none_can_be(tmp_path, capsys, name, line):
    file = tmp_path / "file.txt"
    file.write_text("a\nb\n")
    words = [{"PATH": NO_PATHS[name], "FILE": str(file)}.get(word, word) for word in line.split()]
    one_line(capsys, run(*words))


@pytest.mark.parametrize("word", ["9" * 5000, "1" + "0" * 400, "-1", "1e3", "nan", "x" * 5000])
@pytest.mark.parametrize("option", ["--steps", "--rank", "--seed", "--threads", "--batch-size", "--num-train", "--max-length"])
def test_a_number_that_is_none(capsys, option, word):
    one_line(capsys, run("finetune", option, word))


@pytest.mark.parametrize("word", ["9" * 5000, "1" + "0" * 400, "1000000000000", "-1", "x" * 5000], ids=lambda word: word[:13])
@pytest.mark.parametrize("option", ["--threads", "--repeats"])
def test_a_number_of_a_benchmark_that_is_none(capsys, option, word):
    one_line(capsys, run("bench", "perturb", option, word))


@pytest.mark.parametrize(
    "field", [{"rank": 2.5}, {"rank": True}, {"lr": "x"}, {"model": 5}, {"eps": 10**400}, {"steps": "4"}], ids=str
)
def test_settings_are_of_their_types(field):
    with pytest.raises(InputError, match=f"--{next(iter(field))}"):
        Settings(**field).resolved()


# -- damaged files of runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--steps", "3", "--batch-size", "2", "--eval-size", "2", "--compare-steps", "0", "--num-eval", "2", "--quiet"]
    assert run("finetune", *options, "--output", folder) == 0
    return folder


DEEP = '{"kind":' * 100_000


def step(**odd):
    values = {"kind": "step", "step": 0, "loss": 1.0, "c": [1.0], "lr": 1.0, "step_ms": 1.0, "forwards_ms": 1.0, "skipped": False}
    return json.dumps(values | odd)


LINES = [
    *("{", "[]", "5", "null", DEEP, "\0\0\0\0", "\ufffd", '{"kind": "step"}', '{"kind": []}', '{"kind": "odd"}'),
    *(
        step(step="x"),
        step(step=-1),
        step(step=True),
        step(loss="x"),
        step(loss=10**400),
        step(c=1.0),
        step(c=["x"]),
        step(skipped=0),
    ),
    json.dumps({"kind": "eval", "step": 0, "loss": 1.0, "accuracy": "x", "examples": 1, "seconds": 1.0}),
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: ascii(line)[:40])
def test_a_damaged_line_of_metrics(tmp_path, capsys, finished, line):
    folder = shutil.copytree(finished, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    one_line(capsys, run("compare", folder, "--output", tmp_path / "out"), "metrics.jsonl, line 3")
    (folder / "summary.json").unlink()
    one_line(capsys, run("finetune", "--resume", folder, "--quiet"), "metrics.jsonl, line 3")
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], line]))  # as a kill leaves the last one
    assert run("finetune", "--resume", folder, "--quiet") == 0
    assert (folder / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[[]]", "5", DEEP, "{}", '{"method": 5}', '{"task": []}', "\0"], ids=lambda c: c[:20]
)
def test_a_damaged_summary(tmp_path, capsys, finished, content):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "summary.json").write_text(content)
    one_line(capsys, run("compare", folder, "--output", tmp_path / "out"), "summary.json")
    one_line(capsys, run("evaluate", "--checkpoint", folder, "--quiet"))


@pytest.mark.parametrize("field", ["step_ms", "training_peak_bytes", "weight_bytes", "steps_done", "loss_before", "accuracy_after"])
@pytest.mark.parametrize("odd", ["x", [], 10**400, True])
def test_a_summary_of_other_types(tmp_path, capsys, finished, field, odd):
    folder = shutil.copytree(finished, tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text()) | {field: odd}
    (folder / "summary.json").write_text(json.dumps(summary))
    one_line(capsys, run("compare", folder, "--output", tmp_path / "out"), f"does not say {field}")


def test_numbers_that_were_not_finite_are_read_back(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    nan = float("nan")
    log.add_step(StepRecord(0, nan, [nan], 1e-3, 1.0, 0.5, True))
    log.add_evaluation(EvalRecord(1, nan, None, 2, 0.1))
    log.close()
    (_, step), (_, evaluation) = read_metrics(tmp_path / "metrics.jsonl")
    assert step.loss != step.loss and step.c[0] != step.c[0] and step.skipped
    assert evaluation.loss != evaluation.loss and evaluation.accuracy is None


@pytest.mark.parametrize("text", ["", "{", "[]", DEEP, '{"rank": ' + "9" * 5000 + "}"], ids=lambda text: text[:20])
def test_a_config_that_is_no_json(text):
    with pytest.raises((TypeError, ValueError)):
        PatchConfig.from_json(text)


# -- the compiled library and the environment ----------------------------------------------------------------------------------

compiled = pytest.mark.skipif(not native.library_path().exists(), reason="the native library is not built")

USE = """
import sys, warnings
from pathlib import Path
import torch
from lozo_kernels.kernels.backends import native
native.library_path = lambda: Path(sys.argv[1])
from lozo_kernels import LOZO
model = torch.nn.Linear(8, 8)
LOZO(model).step(lambda: model(torch.ones(1, 8)).sum())
print("done")
"""


@compiled
@pytest.mark.parametrize("share", [0.0, 0.00001, 0.2, 0.5, 0.9, 0.99999])
def test_half_a_library(tmp_path, share):
    """As a full disk or a broken download leaves it. The system maps it, and the process would die at its first missing page."""
    whole, cut = native.library_path().read_bytes(), tmp_path / "liblozo_cpu.so"
    cut.write_bytes(whole[: int(len(whole) * share)])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", USE, str(cut)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "done\n", (done.returncode, done.stderr[-500:])
    assert "compiled CPU kernels are not used" in done.stderr


@compiled
def test_half_a_library_says_so(tmp_path, monkeypatch):
    whole = native.library_path().read_bytes()
    cut = tmp_path / "liblozo_cpu.so"
    cut.write_bytes(whole[: len(whole) // 2])
    assert f"has {len(whole) // 2} of {len(whole)} bytes" in str(CudaBackend(cut, device_type="cpu").unavailable(CPU))
    monkeypatch.setattr(native, "library_path", lambda: cut)
    native._load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="compiled CPU kernels are not used"):
            assert "is cut off" in NativeBackend().unavailable(CPU)
    finally:
        native._load.cache_clear()


@compiled
@pytest.mark.parametrize("variable", ["LOZO_KERNELS_ISA", "LOZO_KERNELS_BACKEND"])
def test_a_variable_that_names_nothing(capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "avx9")
    monkeypatch.setattr(native, "_isa_is_chosen", False)
    with pytest.raises(ValueError, match="'avx9'"):
        choose_backend("cpu")
    one_line(capsys, run("plan", "--model", "x"), "'avx9'")
    one_line(capsys, run("finetune"), "'avx9'")
    one_line(capsys, run("bench", "perturb"), "'avx9'")
    monkeypatch.setenv(variable, "portable" if variable.endswith("ISA") else "eager")
    choose_backend("cpu")
    monkeypatch.delenv(variable)
    native.set_isa(None)


# -- a plan ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "largest"), [(1e6, 256), (1e9, 512), (1e13, 4096)])
def test_a_slow_product_is_measured_on_a_small_matrix(rate, largest):
    """A product in half precision has a thousandth of the usual speed on many CPUs, and of a large one would take minutes."""
    tried = []

    def seconds_of(side):
        tried.append(side)
        return 2 * 128 * side**2 / rate

    side, seconds = machine._long_enough(seconds_of)
    assert side == largest == max(tried) and seconds == 2 * 128 * side**2 / rate


def test_a_plan_says_that_it_measures(tmp_path, capsys, monkeypatch, finished):
    monkeypatch.setattr(machine, "_SIDE", 256)
    assert run("plan", "--model", finished / "model", "--sequence-length", "16") == 0
    assert "--device-bandwidth" in capsys.readouterr().err
    assert run("plan", "--model", finished / "model", "--sequence-length", "16", "--device-bandwidth", "10") == 0
    assert capsys.readouterr().err == ""
