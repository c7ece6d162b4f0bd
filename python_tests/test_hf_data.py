"""Tasks, files and the embedded language."""

import dataclasses
import json
import random
from typing import NamedTuple

import pytest
from hf_helpers import data_folder, write_jsonl

from bench.pretrain_demo import story
from lozo_kernels.errors import InputError
from lozo_kernels.hf.data.examples import Example, TaskData
from lozo_kernels.hf.data.load import load_data
from lozo_kernels.hf.data.splits import draw_demonstrations, split
from lozo_kernels.hf.data.text import read_examples
from lozo_kernels.hf.demo import language
from lozo_kernels.hf.settings import Settings
from lozo_kernels.hf.tasks import KINDS, TASKS, TEXT
from lozo_kernels.hf.tasks.prompts import render


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
def test_rows_of_the_table_are_complete(task):
    assert task.kind in KINDS
    assert task.fields and all(task.fields)
    texts = ["field"] * len(task.fields)
    if task.kind == "classification":
        assert len(task.labels) == len(set(task.labels)) > 1
        assert len(task.words) == len(task.labels)
        # Words follow the prompt directly.
        assert all(word.startswith(" ") != task.prompt.endswith("\n") for word in task.words)
        assert render(task.prompt, texts).lower().count("field") == len(texts)
        assert task.hub or task.generate
    if task.masked:
        assert len(task.masked_words) == len(task.labels)
        assert render(task.masked, texts, mask="MASK").count("MASK") == 1
    if task.hub and task.hub.labels:
        assert sorted(task.hub.labels) == sorted(task.labels)


@pytest.mark.parametrize(
    ("task", "train", "dev", "first"),
    [
        ("sst2", 6920, 872, 1),
        ("trec", 5452, 500, 0),
        ("rte", 2490, 277, 1),
        ("snli", 8999, 1000, 2),
        ("mnli", 8999, 1000, 0),
        ("boolq", 32, 3270, None),
        ("cb", 32, 56, 0),
        ("wsc", 554, 104, 0),
        ("wic", 32, 638, None),
        ("multirc", 154, 4848, None),
    ],
)
def test_real_files_of_every_task(task, train, dev, first):
    data = load_data(Settings(task=task, data_dir=str(data_folder())))
    assert (len(data.train), len(data.dev)) == (train, dev)
    assert len(data.train[0].texts) == len(TASKS[task].fields)
    assert {e.label for e in data.train} == set(range(len(TASKS[task].labels)))
    assert first is None or data.train[0].label == first


def test_labels_by_name_index_and_boolean(tmp_path):
    path = write_jsonl(
        tmp_path / "boolq.jsonl",
        [{"passage": "p", "question": "q", "label": value} for value in (True, "false", 1, "true", 0)],
    )
    assert [e.label for e in read_examples(path, TASKS["boolq"])] == [1, 0, 1, 1, 0]


def test_a_text_file_is_one_example_a_line(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("first\n\n  second  \nthird\n", encoding="utf-8")
    assert read_examples(path, TEXT) == [Example(("first",)), Example(("second",)), Example(("third",))]


def test_a_file_without_a_task_is_what_its_rows_say(tmp_path):
    named = write_jsonl(tmp_path / "named.jsonl", [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(20)])
    data = load_data(Settings(train_file=str(named)))
    assert data.task.labels == ("a", "b") and data.task.kind == "classification"
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"premise": f"p{i}", "hypothesis": "h", "label": i} for i in range(11)])
    data = load_data(Settings(train_file=str(pairs)))
    assert data.task.labels == tuple(map(str, range(11))) and len(data.train[0].texts) == 2
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"text": f"t{i}"} for i in range(20)])
    assert load_data(Settings(train_file=str(plain))).task is TEXT


def test_the_held_out_tenth_shares_no_text_with_the_rest(tmp_path):
    path = write_jsonl(tmp_path / "f.jsonl", [{"text": f"text {i % 30}"} for i in range(100)])
    data = load_data(Settings(train_file=str(path), seed=3))
    train, dev = ({e.texts for e in part} for part in (data.train, data.dev))
    assert len(data.train) + len(data.dev) == 100
    assert dev and not train & dev
    assert load_data(Settings(train_file=str(path), seed=3)) == data
    with pytest.raises(InputError, match="too few"):
        load_data(Settings(train_file=str(write_jsonl(tmp_path / "one.jsonl", [{"text": "x"}]))))


def test_lm_on_a_classification_task_ignores_labels(tmp_path):
    write_jsonl(tmp_path / "sst2.train.jsonl", [{"text": "a", "label": 9}, {"text": "b"}])
    write_jsonl(tmp_path / "sst2.val.jsonl", [{"text": "c"}])
    data = load_data(Settings(task="sst2", data_dir=str(tmp_path), objective="lm"))
    assert data.train == [Example(("a",)), Example(("b",))]


def test_hub_rows_are_mapped_to_the_tasks_labels(monkeypatch):
    import sys
    import types

    rows = [{"text": "What is it ?", "coarse_label": i} for i in (0, 1, 2, 3, -1)]
    calls = []

    def load_dataset(path, _config, *, split, revision):
        calls.append((path, split, revision))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = load_data(Settings(task="trec"))
    assert [TASKS["trec"].labels[e.label] for e in data.train] == ["abbreviation", "entity", "description", "human"]
    assert calls == [("CogComp/trec", split, "refs/convert/parquet") for split in ("train", "test")]


def test_a_hub_failure_is_one_line(monkeypatch):
    import sys
    import types

    def load_dataset(*_, **__):
        raise ConnectionError("offline\nsecond line")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"could not be had from the Hub \(offline second line\)"):
        load_data(Settings(task="sst2"))


def test_the_embedded_task_is_new_to_its_model_and_dev_is_disjoint():
    rng = random.Random(1)
    assert not any("again?" in story(rng) for _ in range(2000))
    train, dev = language.reviews(0, 500, 200)
    assert (len(train), len(dev)) == (500, 200)
    assert not {text for text, _ in train} & {text for text, _ in dev}
    assert (train, dev) == language.reviews(0, 500, 200)
    share = sum(label for _, label in train) / len(train)
    assert 0.4 < share < 0.6


def test_settings_survive_json():
    settings = Settings(task="sst2", lr=1e-3)
    assert Settings(**json.loads(json.dumps(settings.to_dict()))) == settings


class Parts(NamedTuple):
    train: list[int]
    dev: list[int]
    test: list[int]
    note: str


def drawn(settings, train=range(1000), held=range(2000, 2600), task="sst2", labels=None):
    """How numbers are divided that stand for examples."""
    labels = labels or [i % 2 for i in train]
    examples = [Example((str(i),), label) for i, label in zip(train, labels, strict=True)]
    parts = split(TaskData(TASKS[task], examples, [Example((str(i),)) for i in held], "numbers"), settings)
    assert parts.source.startswith("numbers")
    numbers = ([int(e.texts[0]) for e in part] for part in (parts.train, parts.dev, parts.test))
    return Parts(*numbers, note=parts.source.removeprefix("numbers"))


def test_nothing_is_drawn_unless_it_was_asked_for():
    parts = drawn(Settings())
    assert (parts.train, parts.dev, parts.test, parts.note) == (list(range(1000)), list(range(2000, 2600)), [], "")
    parts = drawn(Settings(num_train=30, num_eval=7))
    assert len(parts.train) == 30 and set(parts.train) < set(range(1000)) and len(parts.dev) == 600
    assert len(parts.test) == 7 and set(parts.test) < set(parts.dev)


def test_the_papers_split_is_drawn_from_the_train_examples():
    settings = Settings(num_train=600, num_dev=300, seed=5)
    parts = drawn(settings)
    assert (len(parts.train), len(parts.dev), len(parts.test)) == (600, 300, 600)
    assert len({*parts.train, *parts.dev}) == 900 and {*parts.train, *parts.dev} < set(range(1000))
    assert set(parts.test) == set(range(2000, 2600)) and "600 and 300 of its train examples drawn with seed 5" in parts.note
    assert drawn(settings) == parts != drawn(dataclasses.replace(settings, seed=6))
    # The seed of the run and that of the draws can be two.
    assert drawn(dataclasses.replace(settings, seed=6, data_seed=5)) == parts
    assert len(drawn(settings, held=range(3000)).test) == 1000
    # Fewer than were asked for: dev has its number, as in the published runs on CB (150 and 100 of 250).
    parts = drawn(Settings(num_train=1000, num_dev=100), train=range(250))
    assert (len(parts.train), len(parts.dev)) == (150, 100)
    with pytest.raises(InputError, match="--num-dev 500 of 32 train examples leaves none to train on"):
        drawn(Settings(num_train=1000, num_dev=500), train=range(32))


def test_k_shot_takes_as_many_of_each_class():
    labels = [rank % 3 for rank in range(900)]
    parts = drawn(Settings(k_shot=16), train=range(900), task="snli", labels=labels)
    for part in (parts.train, parts.dev):
        assert [sum(labels[i] == c for i in part) for c in range(3)] == [16] * 3
    assert not set(parts.train) & set(parts.dev) and len(parts.test) == 600
    assert drawn(Settings(k_shot=16, seed=1), train=range(900), task="snli", labels=labels).train != parts.train
    # A class with fewer is trained on first.
    few = [0] * 5 + [1] * 90 + [2] * 12
    parts = drawn(Settings(k_shot=10), train=range(107), task="snli", labels=few)
    assert [sum(few[i] == c for i in parts.train) for c in range(3)] == [5, 10, 10]
    assert [sum(few[i] == c for i in parts.dev) for c in range(3)] == [0, 10, 2]
    assert "(entailment has 5, contradiction has 12)" in parts.note


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        ({"task": "sst2", "k_shot": 5}, [0, 0, 0, 0], "no train example is of the class positive"),
        ({"task": "sst2", "k_shot": 2}, [0, 0, 1, 1], "no class has more than 2 examples, so that none is left as dev"),
        ({"task": "copa", "k_shot": 2}, [None] * 4, "copa has no classes; use --num-train and --num-dev"),
    ],
)
def test_k_shot_that_cannot_be(settings, labels, message):
    with pytest.raises(InputError, match=message):
        drawn(Settings(**settings), train=range(4), task=settings["task"], labels=labels)
    with pytest.raises(InputError, match="--k-shot says how many"):
        Settings(**settings, num_train=3, train_file=__file__).resolved()


def test_demonstrations_are_drawn_with_the_seed():
    shown = draw_demonstrations(list(range(100)), Settings(num_shots=8, seed=3))
    assert len(set(shown)) == 8 and shown == draw_demonstrations(list(range(100)), Settings(num_shots=8, data_seed=3, seed=4))
    assert sorted(draw_demonstrations(list(range(5)), Settings(num_shots=8))) == list(range(5))


def test_the_split_of_a_run_is_that_of_its_settings(tmp_path):
    write_jsonl(tmp_path / "sst2.train.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(40)])
    write_jsonl(tmp_path / "sst2.dev.jsonl", [{"text": f"d{i}", "label": i % 2} for i in range(9)])
    data = load_data(Settings(task="sst2", data_dir=str(tmp_path), k_shot=4))
    assert (len(data.train), len(data.dev), len(data.test)) == (8, 8, 9)
    assert data.source.endswith("4 of each class, and as many as dev, drawn with seed 0")


def test_rows_of_the_hub_without_an_answer_are_passed_over(monkeypatch):
    import sys
    import types

    rows = {
        "rajpurkar/squad": [
            {"context": "c", "question": "q", "answers": {"text": texts, "answer_start": []}} for texts in (["a"], [])
        ],
        "aps/super_glue": [
            {"premise": "p.", "choice1": "A b", "choice2": "C d", "question": "cause", "label": label} for label in (-1, 1)
        ],
    }
    asked = []

    def load_dataset(path, _config, *, split, **_):
        asked.append(split)
        return rows[path]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert [e.answers for e in load_data(Settings(task="squad")).train] == [("a",)]
    assert [e.right for e in load_data(Settings(task="copa", method="zero-shot")).dev] == [(1,)]
    assert asked == ["train", "validation", "validation"]  # nothing is fetched that is not needed
