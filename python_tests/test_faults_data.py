"""Own data: files in the forms in which people have them are read as what they are, or one line says what is not right."""

import csv
import json
import random

import pytest

for package in ("transformers", "tokenizers"):
    pytest.importorskip(package)

from lozo_kernels.cli import command as cli  # noqa: E402
from lozo_kernels.errors import InputError  # noqa: E402
from lozo_kernels.hf.data.load import load_data  # noqa: E402
from lozo_kernels.hf.settings import Settings  # noqa: E402
from python_tests.hf_helpers import write_jsonl  # noqa: E402
from python_tests.hf_tiny import tiny_llama, tiny_tokenizer  # noqa: E402

ROWS = [
    {"text": f'he said "{word}", twice\nand left {i}', "label": ("bad", "good")[i % 2]} for i, word in enumerate("abcdefghijkl")
]


def load(path, **more):
    return load_data(Settings(train_file=str(path), **more))


def examples(data):
    return sorted((e.texts, e.label, e.answers) for e in (*data.train, *data.dev))


def write(folder, form, rows, bom=False):
    """The rows as the libraries that people use write them."""
    path, encoding = folder / f"file.{form}", "utf-8-sig" if bom else "utf-8"
    if form == "json":
        path.write_text(json.dumps(rows, indent=2), encoding=encoding)
    elif form in ("jsonl", "ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    elif form == "parquet":
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(str(path))
    elif form == "xls.csv":  # a spreadsheet of a country whose comma is decimal
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
    else:
        pytest.importorskip("pandas").DataFrame(rows).to_csv(
            path, sep="\t" if form == "tsv" else ",", index=False, encoding=encoding
        )
    return path


FORMS = ["json", "jsonl", "ndjson", "csv", "tsv", "xls.csv", "parquet"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bom", [False, True])
def test_every_form_of_a_file_gives_the_same_examples(tmp_path, form, bom):
    if bom and form == "parquet":
        pytest.skip("not a text file")
    data = load(write(tmp_path, form, ROWS, bom))
    assert data.task.kind == "classification" and data.task.labels == ("bad", "good")
    assert examples(data) == sorted(((row["text"],), ("bad", "good").index(row["label"]), ()) for row in ROWS)
    assert data.counts().keys() == {"bad", "good"}


@pytest.mark.parametrize("form", FORMS)
def test_pairs_of_texts_and_texts_alone(tmp_path, form):
    pairs = [{"premise": f"p {i}", "hypothesis": "h", "label": "yn"[i % 2]} for i in range(12)]
    assert len(load(write(tmp_path, form, pairs)).train[0].texts) == 2
    texts = load(write(tmp_path, form, [{"text": f"line {i}", "id": str(i)} for i in range(12)]))
    assert texts.task.name == "text" and examples(texts)[0] == (("line 0",), None, ())


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet"])
def test_a_known_task_reads_every_form(tmp_path, form):
    rows = [{"sentence": f"s {i}", "label": i % 2} for i in range(12)]
    data = load(write(tmp_path, form, rows), task="sst2")
    assert data.counts().keys() == {"negative", "positive"} and {e.label for e in data.train} == {0, 1}
    truth = [{"passage": f"p {i}", "question": "q", "label": bool(i % 2)} for i in range(12)]
    assert {e.label for e in load(write(tmp_path, form, truth), task="boolq").train} == {0, 1}


def test_classes_of_a_data_set_have_their_names(tmp_path):
    """ClassLabel columns of ``datasets`` are numbers in the file."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["spam", "ham"])})
    rows = {"text": [f"t {i}" for i in range(12)], "label": [i % 2 for i in range(12)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "file.parquet"))
    data = load(tmp_path / "file.parquet")
    assert data.task.labels == ("ham", "spam") and sum(data.counts().values()) == len(data.train)


def test_values_of_a_table_stay_as_they_are_written(tmp_path):
    """Libraries take NA, null and 1e3 for something else."""
    path = tmp_path / "file.csv"
    path.write_text(
        "text,label\n" + "".join(f"{t},{y}\n" for t in ("NA", "null", "1e3", "007", "True", "None") for y in ("1", "5"))
    )
    data = load(path)
    assert {e.texts[0] for e in (*data.train, *data.dev)} == {"NA", "null", "1e3", "007", "True", "None"}
    assert data.task.labels == ("1", "5")


def test_parquet_without_its_library(tmp_path, monkeypatch):
    import sys

    (tmp_path / "file.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package .datasets.: pip install"):
        load(tmp_path / "file.parquet")


BAD = {
    "one class": ("f.jsonl", [{"text": f"t{i}", "label": "good"} for i in range(9)], "all its labels are 'good'"),
    "one class by number": ("f.jsonl", [{"text": f"t{i}", "label": 0} for i in range(9)], "all its labels are 0"),
    "a typing error": (
        "f.jsonl",
        [{"text": f"t{i}", "label": "positve" if i == 7 else ("positive", "negative")[i % 2]} for i in range(40)],
        "line 8: the label 'positve' has this one example, and 'positive' has",
    ),
    "capitals": (
        "f.jsonl",
        [{"text": f"t{i}", "label": "Good" if i == 7 else ("good", "bad")[i % 2]} for i in range(40)],
        "line 8: the label 'Good' differs from 'good' only in case or spaces",
    ),
    "a space in a table": ("f.csv", "text,label\na,x\nb,y\nc,x \nd,x\n", "line 4: the label 'x ' differs from 'x'"),
    "an empty label": ("f.csv", "text,label\na,x\nb,\nc,y\n", "line 3: the label is empty"),
    "a class called otherwise": (
        "f.csv",
        "text,sentiment\na,x\nb,y\n",
        "beside the text there is 'sentiment': name it 'label'",
    ),
    "no header": ("f.csv", "a good film,1\na bad film,0\n", "its fields are 'a good film', '1'"),
    "columns of other names": ("f.tsv", "review\tstars\na\t1\n", "its fields are 'review', 'stars'"),
    "a comma without quotes": ("f.csv", "text,label\nyes, indeed,x\n", "line 2: 3 columns, and the header has 2"),
    "an open quote": ("f.tsv", 'text\tlabel\n"a\tx\nb\ty\n', "line "),
    "two columns of a name": ("f.csv", "text,text\na,b\n", "two columns have the name 'text'"),
    "a table in a text file": ("f.txt", "text,label\na,x\nb,y\n", "a table in a file of plain text; name the file .csv"),
    "tabs in a text file": ("f", "text\tlabel\na\tx\n", "name the file .tsv"),
    "JSON in a text file": ("f.txt", '{"text": "a"}\n{"text": "b"}\n', "line 1: a JSON object in a file of plain text"),
    "preferences": ("f.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}], "no text field"),
    "a chat without an answer": (
        "f.jsonl",
        [{"messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": "hi?"}]}],
        "line 1: not a row of f: a chat has two messages or more, the last one of the assistant",
    ),
    "a chat of pictures": (
        "f.jsonl",
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        "a message has the texts role",
    ),
    "a prompt without its completion": (
        "f.jsonl",
        [{"prompt": "p", "completion": "c"}, {"prompt": "p"}],
        "line 2: no field 'completion'",
    ),
    "no parquet": ("f.parquet", "text", "f.parquet: not a parquet file"),
    "a spreadsheet": ("f.xlsx", b"PK\x03\x04\xff\xfe\x00", "f.xlsx: not UTF-8 text"),
    "a list of numbers": ("f.json", "[1, 2]", "item 1: a JSON object is needed, this is int"),
    "half a list": ("f.json", '[{"text": "a"},', "f.json: not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_right_is_one_line(tmp_path, monkeypatch, capsys, case):
    name, content, words = BAD[case]
    monkeypatch.chdir(tmp_path)
    if isinstance(content, list):
        write_jsonl(tmp_path / name, content)
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        (tmp_path / name).write_text(content)
    assert cli.main(["finetune", "--train-file", name, "--steps", "1", "--compare-steps", "0", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and "Traceback" not in said, said
    assert not (tmp_path / "runs").exists()


def test_classes_that_are_only_rare_or_numbered_are_no_error(tmp_path):
    rows = [{"text": f"t{i}", "label": ("entailment", "not_entailment")[i % 2]} for i in range(20)]
    assert len(load(write_jsonl(tmp_path / "a.jsonl", [*rows, {"text": "z", "label": "other"}])).task.labels) == 3
    numbered = [{"text": f"t{i}", "label": f"class {i % 5}"} for i in range(40)]
    assert len(load(write_jsonl(tmp_path / "b.jsonl", [*numbered, {"text": "z", "label": "class 6"}])).task.labels) == 6


def test_a_label_beside_a_text_can_be_left_out(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("text,category\n" + "".join(f"a{i},x\n" for i in range(12)))
    assert load(path, objective="lm").task.name == "text"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "repeats", [[49, 1], [40, *[1] * 10], [25, 25, *[1] * 50], [3] * 20, [1] * 50], ids=["49+1", "40", "25+25", "3s", "1s"]
)
def test_a_tenth_is_a_tenth_of_the_examples(tmp_path, repeats, seed):
    """One text that fills most of the file was held out with all its lines."""
    rows = [{"text": f"text {i}"} for i, count in enumerate(repeats) for _ in range(count)]
    random.Random(seed).shuffle(rows)
    data = load(write_jsonl(tmp_path / "f.jsonl", rows), seed=seed)
    assert 1 <= len(data.dev) <= len(rows) / 5 and len(data.train) + len(data.dev) == len(rows)
    assert not {e.texts for e in data.train} & {e.texts for e in data.dev}
    assert ("a tenth" in data.source) == (len(data.dev) >= len(rows) / 20) and (repeats != [49, 1] or "1 of its 50" in data.source)


def test_without_repeats_the_tenth_is_the_same_as_ever(tmp_path):
    """Runs that were begun go on with the examples that they had."""
    rows = [{"text": f"text {i}"} for i in range(57)]
    texts = sorted({(row["text"],) for row in rows})
    random.Random(3).shuffle(texts)
    data = load(write_jsonl(tmp_path / "f.jsonl", rows), seed=3)
    assert {e.texts for e in data.dev} == set(texts[:5])


def test_a_file_of_one_text_cannot_be_divided(tmp_path):
    with pytest.raises(InputError, match="the one text of its 50 examples is too few to hold some out; give --dev-file"):
        load(write_jsonl(tmp_path / "f.jsonl", [{"text": "the same"}] * 50))


# --- prompts with completions, and chats

PROMPTS = [{"prompt": f"Question {i}?\nAnswer:", "completion": f" line one {i}\nline two"} for i in range(12)]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": f"hello {i}"},
            {"role": "assistant", "content": f"good day {i}"},
        ]
    }
    for i in range(12)
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A decoder, and one with a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models")
    plain, chat = tiny_llama(folder / "plain"), tiny_llama(folder / "chat")
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chat)
    return {"plain": plain, "chat": chat}


def taught(path, model, **more):
    """What is read and what is learned of the first example, as text."""
    from lozo_kernels.hf.run import open_run

    run = open_run(Settings(model=str(model), train_file=str(path), device="cpu", **more).resolved(), quiet=True)
    encoded = run.objective.encode(run.data.train[0])
    if "options" not in encoded:
        return run, run.objective.tokenizer.decode(encoded["input_ids"]), None
    (option,), (count,) = encoded["options"], encoded["options"][0]["count"]
    ids = option["input_ids"]
    return run, run.objective.tokenizer.decode(ids[:-count]), run.objective.tokenizer.decode(ids[-count:])


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_prompt_and_completion(tmp_path, models, form):
    """The completion follows the prompt as it stands, and its end is learned; the prompt is not."""
    run, read, learned = taught(write(tmp_path, form, PROMPTS), models["plain"])
    number = run.data.train[0].texts[0].split()[1].rstrip("?")
    assert read == f"<s>Question {number}?\nAnswer:" and learned == f" line one {number}\nline two</s>"
    assert run.objective.name == "answer"


def test_language_modelling_on_prompts_reads_the_completions_too(tmp_path, models):
    run, read, learned = taught(write(tmp_path, "jsonl", PROMPTS), models["plain"], objective="lm")
    assert learned is None and run.objective.name == "lm" and read.endswith("line two") and "Answer: line one" in read


@pytest.mark.parametrize("form", ["messages", "prompt and completion", "parquet"])
def test_chats_are_written_by_the_template_of_the_model(tmp_path, models, form):
    rows = CHATS
    if form == "prompt and completion":
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in CHATS]
    run, read, learned = taught(write(tmp_path, "parquet" if form == "parquet" else "jsonl", rows), models["chat"])
    tokenizer, number = run.objective.tokenizer, json.loads(run.data.train[0].texts[0])[1]["content"].split()[1]
    whole = tokenizer.apply_chat_template(CHATS[int(number)]["messages"], tokenize=False)
    assert read + learned == whole and learned == f"good day {number}</s>"
    assert read.count("<s>") == 1  # by the template, and not by the tokenizer again


@pytest.mark.parametrize("form", ["prompt and completion", "chat"])
def test_the_tokens_are_those_that_trl_trains(tmp_path, models, form):
    """TRL's SFTTrainer on the same rows: the same tokens are read, and the same ones are learned."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows, model = PROMPTS, models["plain"]
    if form == "chat":
        rows, model = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in CHATS], models["chat"]
    run, _, _ = taught(write(tmp_path, "jsonl", rows), model)
    arguments = trl.SFTConfig(output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, max_length=None, bf16=False)
    trainer = trl.SFTTrainer(str(model), args=arguments, train_dataset=datasets.Dataset.from_list(rows))
    theirs = {tuple(row["input_ids"]): sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset}
    ours = {}
    for example in (*run.data.train, *run.data.dev):
        (option,) = run.objective.encode(example)["options"]
        ours[tuple(option["input_ids"])] = sum(option["count"])
    assert ours == theirs


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        ("plain", {}, "this model has no chat template"),
        ("chat", {"objective": "lm"}, "--objective lm reads texts, and these are messages"),
    ],
)
def test_chats_that_cannot_be(tmp_path, models, model, more, words):
    with pytest.raises(InputError, match=words):
        taught(write(tmp_path, "jsonl", CHATS), models[model], **more)


def test_a_template_that_refuses_is_one_line(tmp_path, models):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["chat"])
    tokenizer.chat_template = "{{ raise_exception('no\\nsystem role') }}"
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((models["chat"] / name).read_bytes())
    with pytest.raises(InputError, match="the chat template of this model refuses a chat: no system role"):
        taught(write(tmp_path, "jsonl", CHATS), tmp_path / "model")


def test_whole_runs_on_completions_and_chats(tmp_path, models):
    from lozo_kernels.hf.finetune import finetune

    for rows, model in ((PROMPTS, "plain"), (CHATS, "chat")):
        path = write(tmp_path, "jsonl", rows)
        given = {"steps": 1, "batch_size": 2, "num_eval": 2, "max_new_tokens": 3, "threads": 1, "output": str(tmp_path / model)}
        summary = finetune(Settings(model=str(models[model]), train_file=str(path), **given), quiet=True)
        assert list(summary["test"]["metrics"]) == ["f1", "exact_match"] and summary["loss_after"] > 0
        assert summary["model"] == str(models[model])


def test_answers_of_several_lines_are_written_whole():
    import torch

    from lozo_kernels.hf.data.examples import Example
    from lozo_kernels.hf.loop.scoring import generate_answers
    from lozo_kernels.hf.objectives import AnswerObjective
    from lozo_kernels.hf.tasks import COMPLETION

    tokenizer = tiny_tokenizer()

    class Parrot(torch.nn.Module):
        def generate(self, input_ids, **_):
            ids = tokenizer(" one\ntwo", add_special_tokens=False)["input_ids"]
            return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], 1)

    objective = AnswerObjective(tokenizer, COMPLETION, 64)
    found = generate_answers(Parrot(), objective, [Example(("p",), answers=("one\ntwo",))], 1, 8, torch.device("cpu"))
    assert found == ["one\ntwo"]


# --- which model, which classes


def test_the_model_is_named_first_and_classes_are_counted(tmp_path, capsys, models):
    path = write(tmp_path, "csv", ROWS)
    given = ["--steps", "1", "--batch-size", "2", "--compare-steps", "0", "--threads", "1"]
    assert cli.main(["finetune", "--train-file", str(path), *given, "--output", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if "model: " in line or "classes: " in line]
    assert "model: the embedded model of 0.3M parameters" in told[0] and "2 classes: bad " in told[1]
    assert printed.out.splitlines()[0].startswith("model: the embedded model") and "no --model was given" in printed.out
    assert (
        cli.main(["finetune", "--model", str(models["plain"]), "--train-file", str(path), *given, "--output", str(tmp_path / "b")])
        == 0
    )
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith(f"model: {models['plain']}") and "no --model" not in printed.out
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["data"]["classes"].keys() == {"bad", "good"}
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "c")]) == 0
    table = capsys.readouterr().out
    assert "the embedded model" in table and "plain" in table


def test_notes_of_what_is_likely_not_meant_so(tmp_path, models):
    from lozo_kernels.hf.run import open_run

    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    train = write_jsonl(tmp_path / "train.jsonl", [*rows, {"text": "word " * 400, "label": "a"}])
    dev = write_jsonl(tmp_path / "dev.jsonl", [*rows[:3], {"text": "new", "label": "b"}])
    given = {"model": str(models["plain"]), "train_file": str(train), "dev_file": str(dev), "device": "cpu"}
    notes = open_run(Settings(**given).resolved(), quiet=True).notes()
    assert notes[0] == "3 of the 4 dev examples have the texts of train examples"
    assert notes[1].startswith("1 of the 21 train examples have 256 tokens or more") and len(notes) == 2
    only = write_jsonl(tmp_path / "only.jsonl", [{"sentence": f"s {i}", "label": 1} for i in range(12)])
    run = open_run(Settings(**given | {"train_file": str(only), "dev_file": str(only), "task": "sst2"}).resolved(), quiet=True)
    assert "no train example is of the class negative" in run.notes()
