"""Every command and every block of Python in README.md runs, at a size at which it takes no time."""

import re
import shlex

import pytest
import torch
from hf_helpers import REPO, write_jsonl
from hf_tiny import tiny_llama, tiny_roberta
from miniatures import MezoLarge, TinyLM
from task_rows import HUB_ROWS
from torch import distributed

import lozo_kernels
from lozo_kernels.cli import command as cli
from lozo_kernels.cli import doctor

transformers = pytest.importorskip("transformers")

README = (REPO / "README.md").read_text(encoding="utf-8")
INDENTED = re.findall(r"^    (\S.*?)(?:  +#.*)?$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
COMMANDS = [line for line in INDENTED if line.startswith("lozo-kernels ")]
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHORT = "--compare-steps 0 --steps 2 --eval-size 4 --threads 1 --quiet --output {out}"

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
    "lozo-kernels bench perturb": "--shapes 64x64 --rank 2 --dtype float32 --repeats 1 --peer-repeats 1 --threads 1",
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
    for task in ("sst2", "snli", "squad"):
        rows = [row for row in HUB_ROWS[task] if row.get("label") != -1]
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
    monkeypatch.setattr(doctor, "self_test", lambda: [])  # of half a minute, which the tests of the command line run
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


def loop(monkeypatch, model, tokenizer):
    for cls, made in ((transformers.AutoModelForCausalLM, model), (transformers.AutoTokenizer, tokenizer)):
        monkeypatch.setattr(cls, "from_pretrained", lambda name, made=made, **options: made)
    return {"batches": [["a line", "a longer line of text"], ["another one"]]}


def probe(monkeypatch, model, tokenizer):
    return {"LOZO": lozo_kernels.LOZO, "model": model}


def trainer(monkeypatch, model, tokenizer):
    pytest.importorskip("accelerate")
    full = transformers.TrainingArguments

    def few_steps(folder, max_steps):
        return full(folder, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2)

    monkeypatch.setattr(transformers, "TrainingArguments", few_steps)
    ids = torch.arange(3, 9)
    return {"model": model, "data": [{"input_ids": ids + i, "labels": ids + i} for i in range(8)]}


def adapter(monkeypatch, model, tokenizer):
    return {"trainer": MezoLarge(TinyLM(), [0.0] * 9)}


def handle(monkeypatch, model, tokenizer):
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    return {"model": model, "step": 0, "eps": 1e-3, "lr": 1e-6, "loss": torch.no_grad()(lambda: model(**batch).loss)}


def alone(monkeypatch, model, tokenizer):
    """One process, with the group that torchrun's environment would give it."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch.distributed or its gloo backend is missing")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return {"LOZO": lozo_kernels.LOZO, "model": model}


STAND_INS = {
    "AutoModelForCausalLM": loop,
    'placement="probe"': probe,
    "TrainingArguments": trainer,
    'parallel="examples"': alone,
    "accelerate_trainer": adapter,
    "lozo_kernels.patch(": handle,
    "capture_step": None,  # needs a GPU: it is only compiled
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0])
def test_blocks(block, places, tmp_path, monkeypatch, capsys):
    """What the text takes for granted is stood in for by small things."""
    (found,) = [word for word in STAND_INS if word in block]
    code, stand_in = compile(block, "README.md", "exec"), STAND_INS[found]
    if stand_in is None:
        return
    monkeypatch.chdir(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(places["llama"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(places["llama"])
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    names = stand_in(monkeypatch, model, tokenizer)
    try:
        exec(code, names)
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    moved = not torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert moved == (stand_in in (loop, trainer, handle))
    assert stand_in is not loop or (tmp_path / "tuned" / "config.json").is_file()


def test_every_block_has_a_stand_in():
    assert all(sum(word in block for word in STAND_INS) == 1 for block in BLOCKS)
    assert all(any(word in block for block in BLOCKS) for word in STAND_INS)
