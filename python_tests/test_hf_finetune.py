"""Whole runs of ``finetune`` on tiny models: what they leave behind, and how they end."""

import dataclasses
import json
import math

import pytest
import torch
from hf_helpers import write_jsonl

from lozo_kernels import handle_of
from lozo_kernels.bench.published import PublishedStep
from lozo_kernels.cli import command as cli
from lozo_kernels.errors import InputError
from lozo_kernels.hf.data.examples import Example
from lozo_kernels.hf.finetune import finetune
from lozo_kernels.hf.loop import train as train_module
from lozo_kernels.hf.loop.scoring import evaluate
from lozo_kernels.hf.measure import peak_memory
from lozo_kernels.hf.models.checkpoint import load_model, open_checkpoint
from lozo_kernels.hf.objectives import ClassificationObjective, LanguageModelObjective, PromptObjective, choose_objective
from lozo_kernels.hf.output import to_json
from lozo_kernels.hf.run import draw_batches
from lozo_kernels.hf.settings import Settings
from lozo_kernels.hf.tasks import TASKS, TEXT

transformers = pytest.importorskip("transformers")

SUMMARY_KEYS = {
    "method", "task", "objective", "settings", "seed", "steps_done", "stopped", "loss_before", "loss_after", "accuracy_before",
    "accuracy_after", "evaluations", "step_ms", "two_forwards_ms", "outside_forwards", "inference_peak_bytes",
    "training_peak_bytes", "training_peak_over_inference", "published", "versions", "command", "device", "backends",
}  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The default, shortened: (summary as printed, its folder)."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(["finetune", "--steps", "20", "--compare-steps", "6", "--eval-size", "60", "--output", str(out), "--json"])
    assert code == 0
    return json.loads(printed.getvalue()), out


def test_summary_has_all_fields(demo):
    summary, out = demo
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps_done"] == 20 and summary["stopped"] is None
    assert summary["task"] == "go-again" and summary["method"] == "lozo"
    assert [e["step"] for e in summary["evaluations"]] == list(range(0, 21, 2))
    assert 0 <= summary["accuracy_before"] <= 1
    assert summary["loss_before"] > 0 and summary["loss_after"] > 0
    assert 0 <= summary["outside_forwards"] < 1
    assert summary["training_peak_bytes"] > summary["weight_bytes"]
    assert 1 <= summary["training_peak_over_inference"] < 1.5
    assert summary["published"]["rounds"] == 3 and summary["published"]["published_step_ms"] > 0
    assert summary["command"].startswith("lozo-kernels finetune --steps 20")
    assert json.loads((out / "summary.json").read_text()) == summary


def test_metrics_are_one_object_a_line(demo):
    summary, out = demo
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(20))
    for line in steps:
        assert math.isfinite(line["loss"]) and len(line["c"]) == 1 and line["lr"] == summary["settings"]["lr"]
        assert 0 < line["forwards_ms"] <= line["step_ms"]
        assert line["outside"] == pytest.approx(1 - line["forwards_ms"] / line["step_ms"])
    assert [{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == "eval"] == summary["evaluations"]


def test_the_plot_is_a_picture(demo):
    raw = (demo[1] / "loss.png").read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n") and len(raw) > 5000


def test_the_saved_model_reloads_and_gives_the_same_dev_loss(demo):
    summary, out = demo
    again = finetune(
        Settings(model=str(out / "model"), task="go-again", steps=1, lr=0.0, eval_size=60, threads=1, output=str(out / "again")),
        quiet=True,
    )
    assert again["loss_before"] == pytest.approx(summary["loss_after"], abs=1e-6)
    assert again["accuracy_before"] == summary["accuracy_after"]
    assert again["loss_after"] == pytest.approx(again["loss_before"], abs=1e-5)  # lr 0: nothing was learned


def test_the_table_without_json(tmp_path, capsys):
    assert cli.main(["finetune", "--steps", "2", "--eval-size", "20", "--output", str(tmp_path), "--compare-steps", "4"]) == 0
    captured = capsys.readouterr()
    for expected in (
        "before",
        "after",
        "dev loss per example",
        "dev accuracy",
        "published way",
        "two forward passes",
        "peak memory",
    ):
        assert expected in captured.out
    assert "ms/step" in captured.err


@pytest.mark.parametrize("method", ["lozo-m", "mezo", "mezo-m"])
def test_every_method_learns_nothing_wrong_in_a_few_steps(tmp_path, method):
    summary = finetune(
        Settings(method=method, task="go-again", steps=5, eval_size=20, compare_steps=4, output=str(tmp_path)), quiet=True
    )
    assert summary["steps_done"] == 5 and math.isfinite(summary["loss_after"])
    assert summary["settings"]["momentum"] == (0.9 if method.endswith("-m") else 0.0)
    assert summary["published"]["published_step_ms"] > 0


def test_the_best_evaluation_can_be_kept(tmp_path):
    """A rate that spoils the model, so that an early evaluation is the best: what is saved scores as it did."""
    given = {"task": "go-again", "steps": 6, "eval_every": 2, "eval_size": 40, "lr": 0.3, "keep": "best"}
    summary = finetune(Settings(**given, output=str(tmp_path / "out")), quiet=True)
    losses = {e["step"]: e["loss"] for e in summary["evaluations"] if e["step"] > 0}
    best = min(losses, key=losses.get)
    assert summary["kept_step"] == best < 6
    again = finetune(
        Settings(model=str(tmp_path / "out" / "model"), task="go-again", steps=1, lr=0.0, eval_size=40, output=str(tmp_path / "a")),
        quiet=True,
    )
    assert again["loss_before"] == pytest.approx(losses[best], rel=1e-5)
    assert not (tmp_path / "out" / "best.safetensors").exists()


def test_several_directions_are_several_pairs_of_forwards(tmp_path):
    summary = finetune(
        Settings(task="go-again", steps=3, eval_size=4, directions=2, scaling="card", eps=2e-3, output=str(tmp_path)), quiet=True
    )
    assert summary["two_forwards_ms"] == pytest.approx(summary["forwards_ms"] / 2)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert line["kind"] == "step" and len(line["c"]) == 2


@pytest.mark.parametrize("placement", ["inplace", "probe"])
@pytest.mark.parametrize("method", ["lozo", "mezo-m", "subzero"])
def test_one_sided_directions_share_a_forward(tmp_path, method, placement):
    settings = Settings(
        steps=3, directions=3, one_sided=True, method=method, placement=placement, eval_size=8, output=str(tmp_path)
    )
    summary = finetune(settings, quiet=True)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(len(r["c"]) == 3 for r in records if r["kind"] == "step")
    assert summary["two_forwards_ms"] == pytest.approx(summary["forwards_ms"] / 2)  # four forward passes
    with pytest.raises(InputError, match="has no --one-sided"):
        Settings(one_sided=True, compare_steps=4).resolved()
    with pytest.raises(InputError, match="means nothing"):
        Settings(one_sided=True, method="ft").resolved()


@pytest.mark.parametrize("objective", ["prompt", "lm", "answer", "choice"])
def test_evaluations_that_share_a_forward_see_what_those_in_turn_see(tmp_path, objective):
    together = Settings(
        task="go-again", objective=objective, steps=12, directions=3, one_sided=True, placement="probe", evaluation="batched",
        batch_size=5, eval_size=8, lr=1e-4, output=str(tmp_path / "together"),
    )  # fmt: skip
    in_turn = dataclasses.replace(together, evaluation="sequential", output=str(tmp_path / "in turn"))
    found = []
    for settings in (together, in_turn):
        finetune(settings, quiet=True)
        rows = (json.loads(line) for line in (tmp_path / settings.output / "metrics.jsonl").read_text().splitlines())
        found.append([row for row in rows if row["kind"] == "step"])
    for a, b in zip(*found, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["c"] == pytest.approx(b["c"], rel=0.02, abs=0.02)  # the losses' rounding over eps
    assert cli.main(["verify", "--journal", together.output, "--checkpoint", together.output]) == 0
    with pytest.raises(InputError, match="--placement probe"):
        dataclasses.replace(together, placement="inplace").resolved()
    with pytest.raises(InputError, match="has no --directions, --one-sided, --evaluation batched"):
        dataclasses.replace(together, compare_steps=4).resolved()


def test_a_direction_for_each_example(tmp_path):
    settings = Settings(method="grzo", steps=4, batch_size=6, directions=6, eval_size=8, output=str(tmp_path))
    summary = finetune(settings, quiet=True)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(len(r["c"]) == 6 for r in records if r["kind"] == "step")
    assert summary["two_forwards_ms"] == pytest.approx(summary["forwards_ms"])
    assert cli.main(["verify", "--journal", str(tmp_path), "--checkpoint", str(tmp_path)]) == 0
    assert Settings(method="grzo").resolved().directions == 8
    with pytest.raises(InputError, match="--directions 4: it divides the --batch-size, 6"):
        dataclasses.replace(settings, directions=4).resolved()
    for option in ({"momentum": 0.5}, {"one_sided": True}, {"placement": "probe"}):
        with pytest.raises(InputError, match="means nothing to --method grzo"):
            dataclasses.replace(settings, **option).resolved()


@pytest.mark.parametrize("kind", ["spread", "scalar"])
def test_normalised_steps(tmp_path, kind):
    settings = Settings(steps=4, directions=2, normalise=kind, lr=1e-3, eval_size=8, output=str(tmp_path))
    summary = finetune(settings, quiet=True)
    assert summary["settings"]["normalise"] == kind and summary["steps_done"] == 4
    assert cli.main(["verify", "--journal", str(tmp_path), "--checkpoint", str(tmp_path)]) == 0
    for bad, words in (
        ({"lr": None}, "needs --lr"),
        ({"directions": 1, "normalise": "spread"}, "--directions 2"),
        ({"method": "ft"}, "means nothing"),
        ({"normalise": "sd"}, "not known"),
    ):
        with pytest.raises(InputError, match=words):
            dataclasses.replace(settings, **bad).resolved()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, dtype):
    summary = finetune(Settings(task="go-again", steps=2, eval_size=4, dtype=dtype, output=str(tmp_path)), quiet=True)
    assert math.isfinite(summary["loss_after"]) and summary["weight_bytes"] == 2 * summary["parameters"]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_end_at_zero(tmp_path, schedule):
    finetune(
        Settings(task="go-again", steps=4, eval_size=4, eval_every=100, lr=1e-4, lr_schedule=schedule, output=str(tmp_path)),
        quiet=True,
    )
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    rates = [line["lr"] for line in lines if line["kind"] == "step"]
    assert rates[0] == 1e-4 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 5e-5


def test_two_runs_of_a_seed_agree_and_another_seed_does_not(tmp_path):
    def losses(name, seed):
        finetune(
            Settings(task="go-again", steps=4, eval_size=4, seed=seed, output=str(tmp_path / name)),
            quiet=True,
        )
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "step"]

    assert losses("a", 1) == losses("b", 1) != losses("c", 2)


def test_language_modelling_on_a_text_file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"Mia went to the old cafe on Monday. The soup was cold {i}.\n" for i in range(30)))
    summary = finetune(Settings(train_file=str(path), steps=3, output=str(tmp_path / "out")), quiet=True)
    assert summary["objective"] == "lm" and summary["loss_unit"] == "token" and summary["accuracy_after"] is None
    assert summary["data"] == {
        "source": f"{path}, a tenth of it held out",
        "train_examples": 27,
        "dev_examples": 3,
    }


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """An untrained encoder with the embedded model's tokenizer."""
    from lozo_kernels.hf.demo import MODEL

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_classification_puts_a_fresh_head_on_an_encoder(tmp_path, tiny_bert):
    rows = [{"text": f"words {i} " * 30, "label": ("bad", "fine", "good")[i % 3]} for i in range(30)]
    path = write_jsonl(tmp_path / "three.jsonl", rows)
    settings = Settings(model=str(tiny_bert), train_file=str(path), steps=3, lr=1e-3, output=str(tmp_path / "out"))
    summary = finetune(settings, quiet=True)
    assert summary["objective"] == "classification"
    assert "random weights" in summary["notes"][0] and "classifier.weight" in summary["notes"][0]
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert saved.config.id2label == {0: "bad", 1: "fine", 2: "good"}
    # The same task with another number of classes replaces the head that the checkpoint has.
    path = write_jsonl(tmp_path / "two.jsonl", [row | {"label": i % 2} for i, row in enumerate(rows)])
    again = finetune(
        Settings(model=str(tmp_path / "out" / "model"), train_file=str(path), steps=1, output=str(tmp_path / "again")), quiet=True
    )
    assert "classifier.weight" in again["notes"][0]


def test_an_encoder_cannot_be_prompted(tmp_path, tiny_bert):
    with pytest.raises(InputError, match="is no causal language model"):
        finetune(Settings(model=str(tiny_bert), task="go-again", objective="prompt", steps=1, output=str(tmp_path)), quiet=True)


def test_a_model_with_nothing_to_train_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lozo_kernels.hf.finetune.load_model", lambda *args: _frozen(load_model(*args)))
    with pytest.raises(InputError, match="this model cannot be trained by lozo: "):
        finetune(Settings(task="go-again", steps=1, eval_size=4, output=str(tmp_path)), quiet=True)


def _frozen(loaded):
    loaded[0].requires_grad_(False)
    return loaded


def test_a_loss_that_stays_nan_ends_the_run_with_everything_saved(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PromptObjective, "loss", lambda *_: torch.tensor(float("nan")))
    code = cli.main(
        ["finetune", "--steps", "50", "--eval-size", "4", "--compare-steps", "0", "--output", str(tmp_path), "--quiet", "--json"]
    )
    captured = capsys.readouterr()
    assert code == 1
    summary = json.loads(captured.out)
    assert "not finite" in summary["stopped"] and summary["skipped_updates"] == summary["steps_done"] == 10
    assert len(captured.err.strip().splitlines()) == 1 and "stopped after 10 of 50 steps" in captured.err
    assert (tmp_path / "model" / "model.safetensors").is_file() and (tmp_path / "loss.png").is_file()


def test_ctrl_c_inside_a_step_leaves_whole_weights(tmp_path, monkeypatch):
    calls = 0
    plain = PromptObjective.loss

    def interrupted(self, model, batch):
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return plain(self, model, batch)

    monkeypatch.setattr(PromptObjective, "loss", interrupted)
    summary = finetune(Settings(task="go-again", steps=50, eval_size=4, output=str(tmp_path)), quiet=True)
    assert summary["stopped"] == "interrupted"
    assert summary["loss_after"] is None and 0 < summary["steps_done"] < 5
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "step" for line in lines) == summary["steps_done"]


def test_the_patch_is_gone_after_training(tmp_path, monkeypatch):
    seen = []
    plain = train_module.train

    def spy(run, model, *args, **kwargs):
        seen.append(model)
        return plain(run, model, *args, **kwargs)

    monkeypatch.setattr("lozo_kernels.hf.finetune.train", spy)
    finetune(Settings(task="go-again", steps=1, eval_size=4, output=str(tmp_path)), quiet=True)
    assert handle_of(seen[0]) is None and not seen[0].training


@pytest.fixture(scope="module")
def embedded():
    checkpoint = open_checkpoint(Settings())
    model, _ = load_model(checkpoint, "prompt", TASKS["go-again"], Settings(), torch.device("cpu"))
    return checkpoint, model


@torch.no_grad()
def test_lm_loss_is_that_of_transformers_and_padding_changes_nothing(embedded):
    checkpoint, model = embedded
    objective = LanguageModelObjective(checkpoint.tokenizer, TEXT, 64)
    texts = ["Mia went to the old cafe on Monday.", "The soup was so cold and the clerk was rude. Leo left before the end."]
    encoded = objective.encode_all([Example((text,)) for text in texts])
    device = torch.device("cpu")
    alone = [objective.totals(model, objective.collate([e], device)) for e in encoded]
    for e, totals in zip(encoded, alone, strict=True):
        ids = torch.tensor([e["input_ids"]])
        assert float(totals.loss / totals.count) == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)
    together = objective.totals(model, objective.collate(encoded, device))
    assert float(together.loss) == pytest.approx(float(sum(t.loss for t in alone)), rel=1e-5)
    assert int(together.count) == sum(int(t.count) for t in alone)


@torch.no_grad()
def test_prompts_are_scored_at_their_last_token_and_shortened_in_front(embedded):
    checkpoint, model = embedded
    task = TASKS["go-again"]
    objective = PromptObjective(checkpoint.tokenizer, task, 20)
    long, short = objective.encode(Example(("word " * 100,), 1)), objective.encode(Example(("word",), 0))
    prompt = checkpoint.tokenizer(task.prompt.format("word"))["input_ids"]
    assert short["input_ids"] == prompt and short["labels"] == [0]
    assert len(long["input_ids"]) == 20 and long["input_ids"][0] == checkpoint.tokenizer.bos_token_id
    assert long["input_ids"][-3:] == prompt[-3:]
    device = torch.device("cpu")
    both = objective.totals(model, objective.collate([long, short], device))
    each = [objective.totals(model, objective.collate([e], device)) for e in (long, short)]
    assert float(both.loss) == pytest.approx(float(sum(t.loss for t in each)), rel=1e-5)
    words = [checkpoint.tokenizer(w, add_special_tokens=False)["input_ids"] for w in task.words]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1, [w[0] for w in words]]
    assert float(each[1].loss) == pytest.approx(float(-logits.log_softmax(-1)[0]), rel=1e-5)


def test_the_objective_follows_task_and_model():
    assert choose_objective("auto", TASKS["sst2"], causal=True) == "prompt"
    assert choose_objective("auto", TASKS["sst2"], causal=False) == "classification"
    assert choose_objective("auto", TEXT, causal=True) == "lm"
    assert choose_objective("lm", TASKS["sst2"], causal=True) == "lm"
    with pytest.raises(InputError, match="needs a task with classes"):
        choose_objective("classification", TEXT, causal=True)


def test_accuracy_counts_right_answers(embedded):
    checkpoint, _ = embedded

    class Fixed(torch.nn.Module):
        def forward(self, input_ids, **_):
            return transformers.modeling_outputs.SequenceClassifierOutput(
                logits=torch.tensor([[0.0, 3.0]]).repeat(len(input_ids), 1)
            )

    objective = ClassificationObjective(checkpoint.tokenizer, TASKS["go-again"], 16)
    encoded = objective.encode_all([Example(("a b",), label) for label in (1, 1, 0, 1, 0)])
    record = evaluate(Fixed(), objective, encoded, 7, 2, torch.device("cpu"))
    assert record.accuracy == 3 / 5 and record.step == 7
    assert record.loss == pytest.approx((3 * math.log1p(math.exp(-3)) + 2 * math.log1p(math.exp(3))) / 5)


def test_batches_go_through_all_examples_before_any_comes_again():
    examples = [{"input_ids": [i]} for i in range(10)]
    batches = draw_batches(examples, 4, seed=0)
    drawn = [e["input_ids"][0] for _ in range(5) for e in next(batches)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_published_step_descends(low_rank, momentum):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 6)
    x, y = torch.randn(32, 6), torch.randn(32, 6) * 0.1
    published = PublishedStep(
        model, low_rank=low_rank, rank=2, interval=10, lr=5e-3, eps=1e-3, momentum=momentum, weight_decay=0.0, seed=0
    )
    losses = [published.step(lambda: torch.nn.functional.mse_loss(model(x), y)) for _ in range(300)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_peak_memory_counts_what_was_alive_at_once():
    with peak_memory(torch.device("cpu")) as memory:
        a = torch.zeros(250_000)
        b = a + 1
        del a
        c = b + 1
        del b, c
    assert memory.bytes == pytest.approx(2_000_000, rel=0.01)


def test_json_has_no_nan():
    assert json.loads(to_json({"a": [float("nan"), 1.0], "b": (float("inf"),)})) == {"a": [None, 1.0], "b": [None]}
