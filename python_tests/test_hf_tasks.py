"""Every task: its prompts as the papers have them, its rows in every form, and that it loads, is scored and is trained."""

import math
import sys
import types
from functools import partial

import pytest
import torch
from hf_helpers import REPO, data_folder, write_jsonl
from hf_tiny import tiny_llama, tiny_roberta
from task_rows import HUB_ROWS

from lozo_kernels import LOZO
from lozo_kernels.errors import InputError
from lozo_kernels.hf.data.load import load_data
from lozo_kernels.hf.data.text import read_examples
from lozo_kernels.hf.loop.scoring import score
from lozo_kernels.hf.models.checkpoint import load_model, open_checkpoint
from lozo_kernels.hf.objectives import OBJECTIVES, choose_objective
from lozo_kernels.hf.run import draw_batches
from lozo_kernels.hf.settings import Settings
from lozo_kernels.hf.tasks import KINDS, TASKS
from lozo_kernels.hf.tasks.prompts import FORMS, render

pytest.importorskip("transformers")

CPU = torch.device("cpu")
MASKED = [name for name, task in TASKS.items() if task.masked]
LARGE = ["sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop", "winogrande"]

# Malladi et al. 2023, appendix, table of OPT prompts: the prompt of the first row of each task, and all answers to it. winogrande
# is as in the code of SubZero (large_models/tasks.py): candidates are an option and what follows the blank.
PROMPTS = {
    "sst2": ("a slow and tired film It was", (" terrible", " great"), 0),
    "rte": ('Ada lived in London.\nDoes this mean that "Ada lived in England." is true? Yes or No?\n', ("Yes", "No"), 0),
    "cb": ('Suppose It is late. I think he left. Can we infer that "he left"? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe"), 0),
    "boolq": ("Bern -- Bern is a city of Switzerland. Is bern in europe?\n", ("No", "Yes"), 1),
    "wsc": (
        'Ann thanked Sue because She helped.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
        ("No", "Yes"),
        0,
    ),
    "wic": (
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nWe sat on the bank.\nThe bank lent money.\n',
        ("No", "Yes"),
        0,
    ),
    "multirc": (
        "Sam met Ida. She gave him a map.\nQuestion: What did Ida give?\n"
        'I found this answer "A map". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "copa": ("The sun came out so", (" the snow melted.", " I put on boots."), 0),
    "record": (
        "Ida met Sam in Bern.\n- Ida lives in Bern\n- Sam does not\n-",
        tuple(f" Only {name}, who was late, came by train." for name in ("Ida", "Sam", "Bern")),
        1,
    ),
    "winogrande": (
        "The box did not fit in the bag as the",
        (" box was big.", " bag was big."),
        0,
    ),
    "squad": (
        "Title: Bern\nContext: Bern has 134,000 inhabitants.\nQuestion: How many live in Bern?\nAnswer:",
        (" 134,000\n",),
        0,
    ),
    "drop": (
        "Passage: The Bears scored 21 points, the Lions 14.\nQuestion: How many points more did the Bears score?\nAnswer:",
        (" 7\n",),
        0,
    ),
}

# Gao et al. 2021, table of manual templates; Malladi et al. 2023, table of RoBERTa prompts: the words by class.
MASKED_PROMPTS = {
    "sst2": ("a slow and tired film It was <mask>.", {"negative": "terrible", "positive": "great"}),
    "sst5": (
        "so very wrong It was <mask>.",
        {"very negative": "terrible", "negative": "bad", "neutral": "okay", "positive": "good", "very positive": "great"},
    ),
    "trec": (
        "<mask>: What does NASA stand for ?",
        {
            "description": "Description",
            "entity": "Entity",
            "abbreviation": "Expression",
            "human": "Human",
            "location": "Location",
            "number": "Number",
        },
    ),
    "snli": ("A man sleeps? <mask>, a man rests.", {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}),
    "mnli": ("A man sleeps? <mask>, a man rests.", {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}),
    "rte": ("Ada lived in London? <mask>, ada lived in England.", {"entailment": "Yes", "not_entailment": "No"}),
}


@pytest.fixture
def from_hub(monkeypatch):
    """The Hub, with a few made-up rows of every data set."""

    def load_dataset(path, config, **_):
        names = [t.name for t in TASKS.values() if t.hub and (t.hub.path, t.hub.config) == (path, config)]
        assert len(names) == 1
        return HUB_ROWS[names[0]]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    settings = Settings(model=str(tiny_llama(tmp_path_factory.mktemp("llama"))), task="sst2")
    return settings, open_checkpoint(settings)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    settings = Settings(model=str(tiny_roberta(tmp_path_factory.mktemp("roberta"))), task="sst2")
    return settings, open_checkpoint(settings)


def made(opened, task, objective="auto", **options):
    """(model, objective) of a task on a tiny model."""
    settings, checkpoint = opened
    name = choose_objective(objective, TASKS[task], checkpoint.causal, checkpoint.masked)
    model, notes = load_model(checkpoint, name, TASKS[task], settings, CPU)
    assert notes == []
    return model, OBJECTIVES[name](checkpoint.tokenizer, TASKS[task], checkpoint.max_length(512), **options)


def train(model, objective, batches):
    """20 steps of LOZO, which move the weights and have a finite loss."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = LOZO(model, lr=1e-4, eps=1e-3, rank=2, interval=10)
    for _ in range(20):
        batch = objective.collate(next(batches), CPU)
        assert math.isfinite(float(optimizer.step(partial(objective.loss, model, batch))))
    optimizer.handle.restore()
    assert not all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_table_has_the_tasks_of_the_papers():
    assert {"sst2", "sst5", "snli", "mnli", "rte", "trec"} == set(MASKED)
    assert set(LARGE) <= TASKS.keys()
    for task in TASKS.values():
        assert task.kind in KINDS and task.source and task.objective in OBJECTIVES
        assert bool(task.masked) == bool(task.masked_source) == bool(task.masked_words)
        assert set(task.metrics) <= {"accuracy", "f1", "exact_match"}
        assert (task.metrics[:1] == ("f1",)) == (task.kind == "generation")
    assert {name for name in LARGE if "Malladi et al. 2023" not in TASKS[name].source} == {"winogrande"}
    # MeZO teaches the answers of these token by token, and the others as classes.
    assert {name for name in LARGE if TASKS[name].objective == "answer"} == {"copa", "record", "squad", "drop"}


@pytest.mark.usefixtures("from_hub")
@pytest.mark.parametrize("name", LARGE)
def test_the_prompts_of_large_models(llama, name):
    example = load_data(Settings(task=name)).train[0]
    _, objective = made(llama, name, "answer")
    prompt, answers, right = PROMPTS[name]
    assert objective.prompt(example) == prompt
    assert objective.continuations(example) == answers
    assert objective.solved(example) == (prompt + answers[right]).strip()


@pytest.mark.usefixtures("from_hub")
@pytest.mark.parametrize("name", MASKED)
def test_the_prompts_of_masked_models(name):
    task, example = TASKS[name], load_data(Settings(task=name)).train[0]
    prompt, words = MASKED_PROMPTS[name]
    texts = [text.strip() for text in example.texts]
    assert render(task.masked, texts, mask="<mask>") == prompt
    assert dict(zip(task.labels, task.masked_words, strict=True)) == words


def test_forms_of_a_field():
    assert render("{0:question}", ["is it so"]) == "Is it so?" == render("{0:question}", ["is it so?"])
    assert render("{0:clause} so", ["It rained. "]) == "It rained so" and render("{0:clause}", ["Why?"]) == "Why?"
    assert render("{0:open}? {mask}, {1:small}", ["It is. ", "The {0} end."], mask="M") == "It is? M, the {0} end."
    assert render("{0:lower}{1:strip}", ["ABC", " x "]) == "abcx"
    assert render("{0:before}", ["as the _ was"]) == "as the" and render("{0:before}", ["_ ran"]) == ""
    assert all(form("") in ("", "?") for form in FORMS.values())


@pytest.mark.usefixtures("from_hub")
@pytest.mark.parametrize("name", HUB_ROWS)
def test_every_task_loads_is_scored_and_is_trained(llama, roberta, name):
    """Zero-shot, then 20 steps, on a decoder, and on a masked model where the paper has a prompt for it."""
    data = load_data(Settings(task=name))
    for opened in [llama, roberta] if name in MASKED else [llama]:
        model, objective = made(opened, name)
        scores = score(model, objective, data.dev[:4], 8, 4, CPU)
        assert tuple(scores.metrics) == TASKS[name].metrics and all(0 <= v <= 1 for v in scores.metrics.values())
        assert math.isfinite(scores.loss) and scores.examples == min(4, len(data.dev))
        train(model, objective, draw_batches(objective.encode_all(data.train[:4]), 2, seed=0))


def test_superglue_and_the_hub_give_the_same_examples(tmp_path):
    """The original files nest what the Hub has flat."""
    wsc, (first, second, *_), record = HUB_ROWS["wsc"][0], HUB_ROWS["multirc"], HUB_ROWS["record"][0]
    nested = {
        "wsc": [
            {
                "text": wsc["text"],
                "target": {k: wsc[k] for k in ("span1_index", "span2_index", "span1_text", "span2_text")},
                "label": False,
            }
        ],
        "multirc": [
            {
                "passage": {
                    "text": first["paragraph"],
                    "questions": [
                        {
                            "question": first["question"],
                            "answers": [{"text": row["answer"], "label": row["label"]} for row in (first, second)],
                        }
                    ],
                }
            }
        ],
        "record": [
            {
                "passage": {
                    "text": record["passage"],
                    # An entity that is named twice is one option.
                    "entities": [
                        {"start": 0, "end": 2},
                        {"start": 8, "end": 10},
                        {"start": 15, "end": 18},
                        {"start": 32, "end": 34},
                    ],
                },
                "qas": [{"query": record["query"], "answers": [{"start": 8, "end": 10, "text": "Sam"}]}],
            }
        ],
    }
    for name, rows in nested.items():
        flat = read_examples(write_jsonl(tmp_path / "flat.jsonl", HUB_ROWS[name][:2]), TASKS[name])
        original = read_examples(write_jsonl(tmp_path / "nested.jsonl", rows), TASKS[name])
        assert original == flat[: len(original)] and len(original) == (2 if name == "multirc" else 1)


@pytest.mark.usefixtures("from_hub")
def test_several_entities_of_record_may_be_right():
    assert [e.right for e in load_data(Settings(task="record")).train] == [(1,), (1, 0), (0,), (1,)]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("copa", {"premise": "a", "choice1": "b", "choice2": "c", "label": 0}, "no field 'question' as copa has it"),
        ("copa", HUB_ROWS["copa"][0] | {"label": 2}, "not a row of copa: label 2 is none of its 2 choices"),
        ("copa", HUB_ROWS["copa"][0] | {"label": -1}, "none of the 2 options of copa is the answer"),
        ("record", HUB_ROWS["record"][0] | {"answers": ["Leo"]}, "none of the 3 options of record is the answer"),
        ("squad", HUB_ROWS["squad"][0] | {"answers": {"text": []}}, "the answers are [], texts are needed"),
        ("squad", HUB_ROWS["squad"][0] | {"context": 3, "answers": 4}, "not a row of squad: 'int' object is not iterable"),
        ("winogrande", {"text": "Which one?", "answer": "option1"}, "its text is not a sentence and two options"),
        ("winogrande", HUB_ROWS["winogrande"][0] | {"sentence": "No blank."}, "its sentence has no blank (_)"),
        ("multirc", {"passage": {"text": "a", "questions": [{"question": "b"}]}}, "no field 'answers' as multirc has it"),
        ("wic", {"word": "a", "sentence1": "b", "sentence2": "c"}, "no field 'label'"),
        ("boolq", {"passage": "a", "question": "b", "label": "maybe"}, "label 'maybe' is none of the 2 classes of boolq"),
    ],
)  # fmt: skip
def test_a_row_that_is_not_the_tasks_is_named(tmp_path, task, row, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError) as error:
        read_examples(path, TASKS[task])
    assert message in str(error.value) and str(error.value).startswith(f"{path}, line 1: ")


@pytest.mark.parametrize(
    ("file", "task", "examples"),
    [
        ("wsc.train", "wsc", 554),
        ("wic.val", "wic", 638),
        ("multirc.train32", "multirc", 154),
        ("multirc.val", "multirc", 4848),
        ("copa.val", "copa", 100),
        ("record.train32", "record", 32),
        ("squad.dev", "squad", 4961),
        ("winogrande.val", "winogrande", 1267),
        ("boolq.train32", "boolq", 32),
        ("cb.val", "cb", 56),
    ],
)
def test_real_files(llama, file, task, examples):
    """Counts of the files; each example has a right answer among what can follow its prompt."""
    found = read_examples(data_folder() / f"{file}.jsonl", TASKS[task])
    assert len(found) == examples
    _, objective = made(llama, task, "answer")
    for e in found[:50]:
        assert len(objective.continuations(e)) >= 1 and objective.solved(e).startswith(objective.prompt(e)[:20].strip())
        assert objective.encode_for_evaluation(e)["right"].count(1) >= 1


def code(text):
    """A cell in which white space and quotes stay as they are."""
    return "`" + text.replace("\n", "\\n") + "`" if text else ""


def documented(task):
    """The row of docs/tasks.md."""
    hub = f"{task.hub.path}{' ' + task.hub.config if task.hub.config else ''}" if task.hub else ""
    answers = ", ".join(map(code, task.words)) or {"choice": "the options of the example", "generation": "written"}.get(
        task.kind, ""
    )
    cells = [task.name, task.kind, code(task.prompt), answers, ", ".join(task.metrics), task.objective, hub]
    return "| " + " | ".join(cells) + " |"


def documented_masked(task):
    return f"| {task.name} | {code(task.masked)} | {', '.join(map(code, task.masked_words))} | {', '.join(task.labels)} |"


@pytest.mark.parametrize("task", [t for t in TASKS.values() if t.kind != "image"], ids=lambda t: t.name)
def test_the_documentation_says_what_the_table_says(task):
    lines = (REPO / "docs" / "tasks.md").read_text(encoding="utf-8").splitlines()
    assert documented(task) in lines
    assert not task.masked or documented_masked(task) in lines
