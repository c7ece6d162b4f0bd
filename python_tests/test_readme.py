"""Every command and every block of Python in README.md runs, at a size at which it takes no time."""

import re
import shlex

import pytest
import torch
from hf_helpers import REPO, write_jsonl
from hf_tiny import tiny_llama, tiny_roberta
from task_rows import HUB_ROWS

from lozo_kernels import cli

transformers = pytest.importorskip("transformers")

README = (REPO / "README.md").read_text(encoding="utf-8")
INDENTED = re.findall(r"^    (\S.*?)(?:  +#.*)?$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
COMMANDS = [line for line in INDENTED if line.startswith("lozo-kernels ")]
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHORT = "--steps 2 --eval-size 4 --threads 1 --quiet --output {out}"

# What follows the command of the README, whose settings stay unless they are replaced here; {llama} and so on are folders.
SMALL = {
    "lozo-kernels finetune": SHORT,
    "lozo-kernels finetune --model facebook/opt-125m --task sst2": f"--model {{llama}} --data-dir {{data}} {SHORT}",
    "lozo-kernels finetune --model ./my-model": f"--model {{llama}} --train-file {{notes}} {SHORT}",
    "lozo-kernels finetune --model FacebookAI/roberta-large": (
        f"--model {{roberta}} --data-dir {{data}} --k-shot 1 --num-eval 4 --batch-size 2 {SHORT}"
    ),
    "lozo-kernels evaluate": "--model {llama} --data-dir {data} --num-eval 2 --max-new-tokens 2 --threads 1 --quiet",
    "lozo-kernels compare": "--output {out}",
    "lozo-kernels reproduce": (
        "--model {llama} --scale tiny --tasks sst2 --methods zero-shot,lozo --data-dir {data} --threads 1 --quiet --output {out}"
    ),
    "lozo-kernels plan": "--model {llama} --batch-size 2 --sequence-length 8 --device-bandwidth 100",
    "lozo-kernels bench perturb": "--shapes 64x64 --rank 2 --dtype float32 --repeats 1 --peer-repeats 1 --threads 1 --compile-rank 3",
    "lozo-kernels tune": "",
    "lozo-kernels doctor": "",
}
WITHOUT_GPU = {"lozo-kernels tune": "GPU"}


def entry(command):
    """The longest beginning of a command that the table has."""
    return max((start for start in SMALL if command.startswith(start)), key=len, default=None)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "data").mkdir()
    for task, rows in HUB_ROWS.items():
        for split in ("train", "dev"):
            write_jsonl(folder / "data" / f"{task}.{split}.jsonl", rows * 4)
    (folder / "notes.txt").write_text("".join(f"line {i} of some notes\n" for i in range(20)), encoding="utf-8")
    return {
        "llama": tiny_llama(folder / "llama"),
        "roberta": tiny_roberta(folder / "roberta"),
        "data": folder / "data",
        "notes": folder / "notes.txt",
    }


def test_the_table_has_every_command_and_no_other():
    assert len(COMMANDS) > 8 and len(BLOCKS) > 5
    assert [command for command in COMMANDS if entry(command) is None] == []
    assert {entry(command) for command in COMMANDS} == SMALL.keys()
    # The rest sets up environments or measures for minutes; CI and the demo's own tests run them.
    assert all(line.startswith(("lozo-kernels ", "make ")) for line in INDENTED), INDENTED


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = entry(command)
    words = shlex.split(command)[1:]
    if start.endswith("compare"):
        for run in words[1:]:
            made = ["finetune", *SHORT.format(out=run).split()]
            assert cli.main(made) == 0
    code = cli.main([*words, *SMALL[start].format(out="out", **places).split()])
    printed = capsys.readouterr()
    if start in WITHOUT_GPU and not torch.cuda.is_available():
        assert code == cli.EXIT_BAD_INPUT and WITHOUT_GPU[start] in printed.err and printed.err.count("\n") == 1
    else:
        assert code == 0 and printed.out.strip()
    if "{out}" in SMALL[start]:
        assert any((tmp_path / "out").iterdir())
