"""Tasks, files and the embedded language."""

import json
import random

import pytest
from hf_helpers import data_folder, write_jsonl

from lozo_kernels.errors import InputError
from lozo_kernels.hf.data import Example, load_data, read_examples
from lozo_kernels.hf.demo import language
from lozo_kernels.hf.settings import Settings
from lozo_kernels.hf.tasks import TASKS, TEXT


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
def test_rows_of_the_table_are_complete(task):
    assert task.kind in ("classification", "causal_lm")
    assert task.fields and all(task.fields)
    if task.kind == "classification":
        assert len(task.labels) == len(set(task.labels)) > 1
        assert len(task.words) == len(task.labels)
        assert all(word.startswith(" ") for word in task.words)
        assert task.prompt.format(*("field" for _ in task.fields)) != task.prompt
        assert task.hub or task.generate
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

    def load_dataset(path, config, *, split, revision):
        calls.append((path, split, revision))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = load_data(Settings(task="trec"))
    assert [TASKS["trec"].labels[e.label] for e in data.train] == ["abbreviation", "entity", "description", "human"]
    assert calls == [("CogComp/trec", split, "refs/convert/parquet") for split in ("train", "test")]


def test_a_hub_failure_is_one_line(monkeypatch):
    import sys
    import types

    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline\nsecond line")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"could not be had from the Hub \(offline second line\)"):
        load_data(Settings(task="sst2"))


def test_the_embedded_task_is_new_to_its_model_and_dev_is_disjoint():
    rng = random.Random(1)
    assert not any("again?" in language.story(rng) for _ in range(2000))
    train, dev = language.reviews(0, 500, 200)
    assert (len(train), len(dev)) == (500, 200)
    assert not {text for text, _ in train} & {text for text, _ in dev}
    assert (train, dev) == language.reviews(0, 500, 200)
    share = sum(label for _, label in train) / len(train)
    assert 0.4 < share < 0.6


def test_settings_survive_json():
    settings = Settings(task="sst2", lr=1e-3)
    assert Settings(**json.loads(json.dumps(settings.to_dict()))) == settings
