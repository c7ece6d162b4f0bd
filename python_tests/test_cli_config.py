"""Settings from files of YAML, from HfArgumentParser, and what the help of the commands shows."""

import json
import shlex

import pytest
from hf_helpers import REPO

from lozo_kernels.cli import command as cli
from lozo_kernels.errors import InputError
from lozo_kernels.hf.command_line import read_config
from lozo_kernels.hf.methods import METHODS
from lozo_kernels.hf.objectives import OBJECTIVES
from lozo_kernels.hf.planning.workload import Workload
from lozo_kernels.hf.settings import SCHEDULES, Settings
from lozo_kernels.hf.tasks import TASKS

transformers = pytest.importorskip("transformers")


def parsed(monkeypatch, *argv):
    """The settings with which ``finetune`` would begin."""
    seen = []
    monkeypatch.setattr("lozo_kernels.hf.finetune.finetune", lambda settings, **_: seen.append(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["finetune", *map(str, argv)])
    return seen[0]


def config(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_of_settings_and_a_line_that_goes_before_it(tmp_path, monkeypatch):
    path = config(
        tmp_path,
        "method: mezo\nlr: 1e-6\nlearning-rate: 2e-6\nmax_steps: 7\ndtype: bf16\none_sided: true\nreport_to: [wandb, mlflow]\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\n",
    )
    found = parsed(monkeypatch, path, "--steps", 9)
    assert (found.method, found.lr, found.steps, found.dtype, found.one_sided) == ("mezo", 2e-6, 9, "bfloat16", True)
    assert found.reports == ["wandb", "mlflow"] and found.schedule_options == {"num_cycles": 2}
    assert parsed(monkeypatch, "--lr", "1e-3", path).lr == 1e-3
    assert parsed(monkeypatch) == Settings()  # nothing of the file stays behind


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_sise: 1", "'batch_sise' is no setting; did you mean batch_size?"),
        ("- lr", "a file of settings has a line NAME: VALUE"),
        ("lr: [", "not YAML"),
        ("lr: much", "argument --lr/--learning-rate: invalid float value: 'much'"),
        ("trust_remote_code: perhaps", "--trust-remote-code is True or False"),
        ("method: adam", "--method 'adam' is not known"),
        ("lr: -1", "--lr is a finite number of at least 0"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, capsys, text, words):
    try:
        code = cli.main(["finetune", str(config(tmp_path, text))])
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and words in said, said


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_config(Settings, tmp_path / "none.yaml")


def test_hf_argument_parser_reads_the_same_settings(tmp_path):
    parser = transformers.HfArgumentParser(Settings)
    given = "--lr 1e-5 --method zo-muon --dtype fp16 --num_train_epochs 2 --peft --report_to wandb"
    (found,) = parser.parse_args_into_dataclasses(shlex.split(given), look_for_args_file=False)
    assert found == Settings(lr=1e-5, method="zo-muon", dtype="float16", num_train_epochs=2.0, peft=True, report_to="wandb")
    (found,) = transformers.HfArgumentParser(Settings).parse_yaml_file(str(config(tmp_path, "method: mezo\nsteps: 3\n")))
    assert found == Settings(method="mezo", steps=3)


def test_every_schedule_of_transformers():
    """Those that follow evaluations apart, which a run that goes on by its journal would not make again."""
    names = {kind.value for kind in transformers.SchedulerType}
    assert names - set(SCHEDULES) <= {"reduce_lr_on_plateau", "greedy"} and {"linear", "warmup_stable_decay"} < set(SCHEDULES)


def test_short_names_of_dtypes():
    for short, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("bfloat16", "bfloat16")):
        assert Settings(dtype=short).dtype == Workload(dtype=short).dtype == name
    with pytest.raises(InputError, match="--dtype 'bf17' is not known"):
        Settings(dtype="bf17").resolved()


def test_all_tasks_methods_and_objectives_are_listed(capsys):
    assert cli.main(["tasks"]) == 0
    said = capsys.readouterr().out
    for name in (*TASKS, *METHODS, *OBJECTIVES):
        assert any(line.split()[:1] == [name] for line in said.splitlines()), name
    assert cli.main(["tasks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [list(found[kind]) for kind in ("tasks", "methods", "objectives")] == [list(TASKS), list(METHODS), list(OBJECTIVES)]
    assert found["tasks"]["squad"]["metrics"] == ["f1", "exact_match"]


@pytest.mark.parametrize("command", cli.EXAMPLES)
def test_examples_of_the_help_parse(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert shown and len(shown) == len(cli.EXAMPLES[command])
    for line in shown:
        words = shlex.split(line)
        assert words[0] == "lozo-kernels" and cli.make_parser().parse_args(words[1:]).subcommand == command


def test_the_file_of_the_docs(tmp_path, monkeypatch):
    page = (REPO / "docs" / "command.md").read_text(encoding="utf-8")
    found = parsed(monkeypatch, config(tmp_path, page.split("```yaml\n")[1].split("```")[0]), "--lr", "1e-5")
    assert (found.model, found.lr, found.warmup_steps, found.num_train_epochs) == ("./my-model", 1e-5, 0.1, 3)
    assert found.reports == ["tensorboard", "wandb"] and found.schedule_options == {"num_cycles": 2}
