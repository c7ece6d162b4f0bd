"""Every command and every block of Python in README.md and docs/ runs, at a size at which it takes no time."""

import copy
import re
import shlex
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hf_helpers import REPO, write_jsonl
from hf_tiny import tiny_llama, tiny_roberta
from miniatures import MezoLarge, TinyLM
from pages import PAGES, SCRIPTS, blocks, indented
from task_rows import HUB_ROWS
from torch import distributed

import lozo_kernels
from lozo_kernels.cli import command as cli
from lozo_kernels.cli import doctor

transformers = pytest.importorskip("transformers")

INDENTED = indented("README.md") + indented("docs/command.md")
COMMANDS = list(dict.fromkeys(line for line in INDENTED + indented("docs/quickstart.md") if line.startswith("lozo-kernels ")))
PROGRAMS = {*SCRIPTS, "docs/serving.md"}
"""Pages whose Python other tests run: test_tutorials.py and serving/test_page.py."""
BLOCKS = [(page, block) for page in PAGES if page not in PROGRAMS for block in blocks(page)]
SHORT = "--compare-steps 0 --steps 2 --eval-size 4 --threads 1 --quiet --output {out}"

# What follows the command of the page, whose settings stay unless they are replaced here; {llama} and so on are folders.
SMALL = {
    "lozo-kernels finetune": SHORT,
    "lozo-kernels finetune --model facebook/opt-125m --task sst2": f"--model {{llama}} --data-dir {{data}} {SHORT}",
    "lozo-kernels finetune --model ./my-model": f"--model {{llama}} --train-file {{notes}} {SHORT}",
    "lozo-kernels finetune --model FacebookAI/roberta-large": (
        f"--model {{roberta}} --data-dir {{data}} --k-shot 1 --num-eval 4 --batch-size 2 {SHORT}"
    ),
    "lozo-kernels demo": "--steps 2 --architecture opt-tiny --output {out}",
    "lozo-kernels tasks": "",
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


def test_the_readme_is_one_page():
    text = PAGES["README.md"]
    assert text.count("\n") <= 150
    assert "![" in text and {"make demo", "make test"} <= set(indented("README.md"))
    assert [block.count("\n") for block in blocks("README.md")] == [14, 6]


def test_the_table_has_every_command_and_no_other():
    assert len(COMMANDS) > 8 and len(BLOCKS) > 5
    assert [command for command in COMMANDS if entry(command) is None] == []
    assert {entry(command) for command in COMMANDS} == SMALL.keys()
    # The rest sets up environments or measures for minutes; CI and the demo's own tests run them.
    assert all(line.startswith(("lozo-kernels ", "make ")) for line in INDENTED), INDENTED


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "self_test", list)  # of half a minute, which the tests of the command line run
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


ELSEWHERE = [
    (page, line)
    for page in PAGES
    for line in indented(page)
    if re.match(r"(PYTHON=\S+ )?(lozo-kernels|make|python|torchrun) ", line)
    and line not in COMMANDS
    and (page not in SCRIPTS or "lozo_kernels" in line)
]


@pytest.mark.parametrize(("page", "line"), ELSEWHERE, ids=[line for _, line in ELSEWHERE])
def test_commands_of_other_pages_exist(page, line, capsys):
    """Other tests run what these do; here every command, module, script, target and option is at least there."""
    words = [word for word in shlex.split(line) if not word.startswith("PYTHON=")]
    if "lozo_kernels" in words:  # torchrun ... -m lozo_kernels finetune
        words = words[words.index("lozo_kernels") :]
    program, *words = words
    if program == "make":
        assert re.search(rf"^{words[0]}:", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "python":
        path = REPO / (words[1].replace(".", "/") if words[0] == "-m" else words[0])
        assert path.is_file() or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    else:
        command = words[: 2 if words[0] == "bench" else 1]
        try:
            code = cli.main([*command, "--help"])
        except SystemExit as e:
            code = e.code
        options = re.findall(r"(?<![\w-])--[\w-]+", capsys.readouterr().out)
        assert code == 0 and {word for word in words if word.startswith("--")} <= set(options)


IDS = torch.arange(3, 9)
DATA = [{"input_ids": IDS + i, "labels": IDS + i} for i in range(8)]
BATCH = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}


def few_steps(folder, **settings):
    pytest.importorskip("accelerate")
    small = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 2}
    return transformers.TrainingArguments(folder, **settings | small)


@contextmanager
def loop(monkeypatch, model, tokenizer):
    for cls, made in ((transformers.AutoModelForCausalLM, model), (transformers.AutoTokenizer, tokenizer)):
        monkeypatch.setattr(cls, "from_pretrained", lambda name, made=made, **options: made)
    names = {"batches": [["a line", "a longer line of text"], ["another one", "and one more"]]}
    yield names
    assert names["optimizer"].steps_done == 2 and Path("tuned/config.json").is_file()


@contextmanager
def trainer(monkeypatch, model, tokenizer):
    pytest.importorskip("accelerate")
    full = transformers.TrainingArguments
    small = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 2}
    monkeypatch.setattr(transformers, "TrainingArguments", lambda folder, max_steps: full(folder, max_steps=2, **small))
    yield {"model": model, "data": DATA}


@contextmanager
def driven(monkeypatch, model, tokenizer):
    args = few_steps("driven")
    yield {"LOZO": lozo_kernels.LOZO, "Trainer": transformers.Trainer, "model": model, "args": args, "data": DATA}


@contextmanager
def attached(monkeypatch, model, tokenizer):
    args = few_steps("attached", learning_rate=1e-6)
    yield {"Trainer": transformers.Trainer, "model": model, "args": args, "data": DATA}


def few_zo_steps(monkeypatch, **more):
    pytest.importorskip("accelerate")
    full = lozo_kernels.hf.ZOArguments
    small = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True} | more
    monkeypatch.setattr(lozo_kernels.hf, "ZOArguments", lambda folder, **given: full(folder, **given | small), raising=False)


@contextmanager
def zo_trainer(monkeypatch, model, tokenizer):
    few_zo_steps(monkeypatch, per_device_train_batch_size=2)
    yield {"model": model, "data": DATA, "dev": DATA}


@contextmanager
def split_trainer(monkeypatch, model, tokenizer):
    few_zo_steps(monkeypatch)
    yield {"model": model, "data": DATA * (1 + 16 // len(DATA))}


@contextmanager
def handle(monkeypatch, model, tokenizer):
    yield {"model": model, "step": 0, "eps": 1e-3, "lr": 1e-6, "loss": torch.no_grad()(lambda: model(**BATCH).loss)}


@contextmanager
def captured(monkeypatch, model, tokenizer):
    """On the CPU the same code runs without a graph."""
    batch = {name: tensor.clone() for name, tensor in BATCH.items()}
    optimizer = lozo_kernels.LOZO(model, lr=1e-6)

    def fill(batch, ids):
        for tensor in batch.values():
            tensor.copy_(ids)

    batches = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10]])]
    yield {"lozo_kernels": lozo_kernels, "optimizer": optimizer, "model": model, "batch": batch, "batches": batches, "fill": fill}
    assert optimizer.steps_done == 2


@contextmanager
def probe(monkeypatch, model, tokenizer):
    yield {"LOZO": lozo_kernels.LOZO, "model": model}


@contextmanager
def batched(monkeypatch, model, tokenizer):
    names = {"LOZO": lozo_kernels.LOZO, "cross_entropy": torch.nn.functional.cross_entropy}
    names |= {"model": model, "batch": {"input_ids": torch.randint(3, 100, (2, 6))}}
    yield names
    assert names["loss"].isfinite()


@contextmanager
def journal(monkeypatch, model, tokenizer):
    base = copy.deepcopy(model)
    yield {"model": model, "base_model": base, "loader": [BATCH] * 3}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))


@contextmanager
def resumed(monkeypatch, model, tokenizer):
    from lozo_kernels.journal import Journal

    run = lozo_kernels.LOZO(copy.deepcopy(model), lr=1e-6, eps=1e-3, placement="probe")
    with Journal.create("run.journal", run):
        for _ in range(2):
            run.step(lambda: run.handle.model(**BATCH).loss)
    names = {"LOZO": lozo_kernels.LOZO, "Journal": Journal, "base_model": model, "steps": 4}
    yield names
    assert names["first"] == 2


def alone(monkeypatch):
    """One process, with the group that torchrun's environment would give it."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch.distributed or its gloo backend is missing")
    start = distributed.init_process_group
    monkeypatch.setattr(
        distributed, "init_process_group", lambda: start("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    )


@contextmanager
def several(monkeypatch, model, tokenizer):
    alone(monkeypatch)
    names = {"torch": torch, "LOZO": lozo_kernels.LOZO, "model": model, "loader_of_this_rank": [BATCH] * 2}
    yield names
    assert names["optimizer"].parallel.mode == "examples"


@contextmanager
def lost(monkeypatch, model, tokenizer):
    alone(monkeypatch)
    distributed.init_process_group()
    optimizer = lozo_kernels.LOZO(model, lr=1e-6, parallel="examples")

    def loader():
        yield BATCH
        raise lozo_kernels.PeerLostError("rank 1 is gone")

    names = {"torch": torch, "PeerLostError": lozo_kernels.PeerLostError, "model": model, "optimizer": optimizer, "rank": 0}
    with pytest.raises(lozo_kernels.PeerLostError):
        yield names | {"loader_of_this_rank": loader()}
    assert torch.load("left-by-rank-0.pt").keys() == {"model", "optimizer"}


@contextmanager
def sharded(monkeypatch, model, tokenizer):
    alone(monkeypatch)
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group()
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    names = {"fully_shard": fully_shard, "LOZO": lozo_kernels.LOZO, "mesh": mesh, "model": model}
    yield names | {"loader_of_this_rank": [BATCH] * 2}


@contextmanager
def adapter(monkeypatch, model, tokenizer):
    trainer = MezoLarge(TinyLM(), [0.0] * 9)
    trainer.train = trainer.step_once
    before = [p.detach().clone() for p in trainer.model.parameters()]
    yield {"trainer": trainer}
    assert not all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))


@contextmanager
def directions(monkeypatch, model, tokenizer):
    loss = torch.no_grad()(lambda model, batch: model(**batch).loss)
    yield {"model": model, "batches": [BATCH] * 2, "loss": loss, "eps": 1e-3, "lr": 1e-6}


@contextmanager
def found(monkeypatch, model, tokenizer):
    half = torch.no_grad()(lambda: model(**BATCH))
    batch = {name: torch.cat([tensor, tensor]) for name, tensor in BATCH.items()}
    yield {"model": model, "batch": batch, "first_half": half, "second_half": half}


@contextmanager
def planned(monkeypatch, model, tokenizer):
    config = transformers.OPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name, **options: config)
    names = {}
    yield names
    assert names["planned"].total_bytes(names["planned"].options[0]) > 0


@contextmanager
def measured(monkeypatch, model, tokenizer):
    names = {"model": model, "batch": BATCH}
    yield names
    assert names["optimizer"].eps == names["eps"] > 0


STAND_INS = {
    ("README.md", "AutoModelForCausalLM"): loop,
    ("README.md", "TrainingArguments"): trainer,
    ("docs/library.md", "lozo_kernels.patch("): handle,
    ("docs/library.md", "capture_step"): captured,
    ("docs/library.md", 'lr="auto"'): found,
    ("docs/library.md", "find_eps"): measured,
    ("docs/probe.md", "interval=50"): probe,
    ("docs/probe.md", 'evaluation="batched"'): batched,
    ("docs/trainer.md", 'drive="backward"'): driven,
    ("docs/trainer.md", "attach(trainer"): attached,
    ("docs/trainer.md", "eval_dataset=dev"): zo_trainer,
    ("docs/trainer.md", 'method="agzo-split"'): split_trainer,
    ("docs/journal.md", "Journal.create"): journal,
    ("docs/journal.md", "Journal.resume"): resumed,
    ("docs/distributed.md", "init_process_group"): several,
    ("docs/distributed.md", "PeerLostError"): lost,
    ("docs/distributed.md", "fully_shard"): sharded,
    ("docs/adapters.md", "accelerate_trainer"): adapter,
    ("docs/adapters.md", "DirectionBackend"): directions,
    ("docs/plan.md", "plan("): planned,
}
STAYS = (probe, batched, resumed, adapter, planned, measured)
"""Blocks that leave the weights of the model as they are: they only prepare it, are a probe's first steps, or use no model."""


def flat(model):
    """The weights as they are stored; ``model.parameters()`` would bring them up to date first."""
    found = dict.fromkeys(p for module in model.modules() for p in module._parameters.values() if p is not None)
    return torch.cat([getattr(p, "to_local", lambda p=p: p)().detach().flatten().clone() for p in found])


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page}: {block.splitlines()[0]}" for page, block in BLOCKS])
def test_blocks(page, block, places, tmp_path, monkeypatch, capsys):
    """What the text takes for granted is stood in for by small things."""
    (stand_in,) = [stand_in for (name, word), stand_in in STAND_INS.items() if name == page and word in block]
    monkeypatch.chdir(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(places["llama"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(places["llama"])
    before = flat(model)
    try:
        with stand_in(monkeypatch, model, tokenizer) as names:
            exec(compile(block, page, "exec"), names)
        moved = not torch.equal(before, flat(model))
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    assert moved == (stand_in not in STAYS)


def test_every_block_has_a_stand_in():
    assert all(sum(name == page and word in block for name, word in STAND_INS) == 1 for page, block in BLOCKS)
    assert all(sum(word in block for block in blocks(page)) == 1 for page, word in STAND_INS)
