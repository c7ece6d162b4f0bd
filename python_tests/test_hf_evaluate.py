"""``lozo-kernels evaluate``: zero-shot, in-context, generation, checkpoints; and what is wrong with an input."""

import dataclasses
import json
import shutil

import pytest
import torch
from hf_helpers import write_jsonl
from hf_tiny import tiny_llama, tiny_roberta, tiny_tokenizer
from task_rows import HUB_ROWS

from lozo_kernels.cli import command as cli
from lozo_kernels.errors import InputError
from lozo_kernels.hf.data.examples import Example
from lozo_kernels.hf.data.load import load_data
from lozo_kernels.hf.evaluate import evaluate, render_result
from lozo_kernels.hf.finetune import finetune
from lozo_kernels.hf.loop.scoring import generate_answers, score
from lozo_kernels.hf.models.checkpoint import open_checkpoint
from lozo_kernels.hf.objectives import AnswerObjective, OptionsObjective
from lozo_kernels.hf.settings import Settings
from lozo_kernels.hf.tasks import TASKS

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return tiny_roberta(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with train and dev files of some tasks; the same rows in both."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("sst2", "rte", "copa", "squad"):
        for part in ("train", "dev"):
            write_jsonl(folder / f"{name}.{part}.jsonl", HUB_ROWS[name])
    return folder


def run(capsys, *argv):
    code = cli.main(["evaluate", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line(capsys, llama, data):
    code, out, err = run(capsys, "--model", llama, "--task", "copa", "--data-dir", data, "--json")
    result = json.loads(out)
    assert code == 0 and err.startswith(f"model: {llama}\ncopa (answer): 4 examples from ")
    assert result["task"] == "copa" and result["method"] == "zero-shot" and result["objective"] == "answer"
    assert result["metrics"]["accuracy"] in (0, 0.25, 0.5, 0.75, 1) and result["examples"] == 4
    assert result["settings"]["num_eval"] == 1000 and result["settings"]["max_length"] == 2048
    assert result["command"].startswith("lozo-kernels evaluate --model")
    code, out, err = run(capsys, "--model", llama, "--task", "squad", "--data-dir", data, "--max-new-tokens", 3, "--quiet")
    assert code == 0 and err == ""
    for expected in ("squad (answer), zero-shot", "4 examples from", "f1", "exact match", "loss per token"):
        assert expected in out


def test_in_context(llama, data):
    settings = Settings(model=str(llama), task="sst2", data_dir=str(data), method="icl", num_shots=3, num_eval=2, max_length=400)
    result = evaluate(settings, quiet=True)
    assert result["demonstrations"] == 3 and result["examples"] == 2 and "demonstrations" in render_result(result)
    assert evaluate(settings, quiet=True)["loss"] == result["loss"]
    assert result["notes"] == []
    short = evaluate(dataclasses.replace(settings, max_length=70), quiet=True)
    assert short["demonstrations"] < 3 and "of the 3 demonstrations only" in short["notes"][0]
    zero = evaluate(Settings(model=str(llama), task="sst2", data_dir=str(data), method="zero-shot", num_eval=2), quiet=True)
    assert zero["demonstrations"] == 0 and zero["loss"] != result["loss"]


def test_zero_shot_needs_only_the_examples_to_score(tmp_path, llama):
    path = write_jsonl(tmp_path / "rte.dev.jsonl", HUB_ROWS["rte"])
    folder = evaluate(Settings(model=str(llama), task="rte", data_dir=str(tmp_path), method="zero-shot"), quiet=True)
    file = evaluate(Settings(model=str(llama), task="rte", dev_file=str(path), method="zero-shot"), quiet=True)
    assert folder["loss"] == file["loss"] and folder["examples"] == 4
    with pytest.raises(InputError, match=r"no rte.train.jsonl"):
        evaluate(Settings(model=str(llama), task="rte", data_dir=str(tmp_path), method="icl"), quiet=True)


def test_a_masked_model_is_asked_by_its_prompt(roberta, data):
    result = evaluate(Settings(model=str(roberta), task="rte", data_dir=str(data), method="zero-shot"), quiet=True)
    assert result["objective"] == "masked" and result["notes"] == []
    with pytest.raises(InputError, match="--method icl needs a causal model"):
        evaluate(Settings(model=str(roberta), task="rte", data_dir=str(data), method="icl"), quiet=True)


def test_greedy_generation_is_that_of_single_sequences(llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    objective = AnswerObjective(tokenizer, TASKS["squad"], 200)
    # As checkpoints of chat models have them; what is written is greedy all the same.
    model.generation_config.repetition_penalty, model.generation_config.num_beams = 5.0, 2
    examples = [Example((f"Context: {'red ' * n}", "Which colour?"), answers=("red",)) for n in (1, 9, 4)]
    written = generate_answers(model, objective, examples, 2, 6, CPU)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for example, answer in zip(examples, written, strict=True):
        ids = tokenizer(objective.prompt(example))["input_ids"]
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (tokenizer.eos_token_id, *newline):
                break
        assert answer == tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0].strip()


class Parrot(torch.nn.Module):
    """Writes a text whatever the prompt; its logits say nothing."""

    def __init__(self, tokenizer, text):
        super().__init__()
        self.ids, self.size = tokenizer(text, add_special_tokens=False)["input_ids"], len(tokenizer)

    def forward(self, input_ids, **_):
        return transformers.modeling_outputs.CausalLMOutput(logits=torch.zeros(*input_ids.shape, self.size))

    def generate(self, input_ids, generation_config, **_):
        assert not generation_config.do_sample
        assert bool((input_ids[:, -1] != 0).all())  # padded on the left
        return torch.cat([input_ids, torch.tensor([self.ids] * len(input_ids))], 1)


def test_answers_are_scored_up_to_the_end_of_the_line():
    tokenizer = tiny_tokenizer()
    objective = AnswerObjective(tokenizer, TASKS["squad"], 200)
    examples = [
        Example(("Context: a", "b"), answers=("134,000 inhabitants", "the 134,000")),
        Example(("Context: a longer one", "b"), answers=("nobody",)),
    ]
    scores = score(Parrot(tokenizer, " 134,000\nQuestion: what else?"), objective, examples, 2, 40, CPU)
    assert scores.answers == ["134,000", "134,000"]
    assert scores.metrics == {"f1": 0.5, "exact_match": 0.5} and list(scores.metrics) == ["f1", "exact_match"]


def test_generation_leaves_room_for_the_answer(llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    objective = AnswerObjective(tokenizer, TASKS["squad"], 60)
    lengths = []

    class Length(Parrot):
        def generate(self, input_ids, **options):
            lengths.append(input_ids.shape[1])
            return super().generate(input_ids, **options)

    example = Example(("Context: " + "red " * 100, "Which colour?"), answers=("red",))
    generate_answers(Length(tokenizer, "x"), objective, [example], 1, 20, CPU)
    assert lengths == [40]
    with pytest.raises(InputError, match="--max-new-tokens 60 leaves no room for a prompt in 60 tokens"):
        generate_answers(Length(tokenizer, "x"), objective, [example], 1, 60, CPU)


def test_a_run_and_its_model_are_checkpoints(tmp_path, llama, data):
    settings = Settings(model=str(llama), task="copa", data_dir=str(data), steps=3, lr=1e-3, output=str(tmp_path / "run"))
    summary = finetune(settings, quiet=True)
    assert summary["test"] is None and summary["loss_unit"] == "token"
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        named = Settings(data_dir=str(data), task="copa", method="zero-shot", max_length=256)
        result = evaluate(named, checkpoint=str(folder), quiet=True)
        assert result["loss"] == pytest.approx(summary["loss_after"], rel=1e-5)
        assert result["metrics"]["accuracy"] == summary["accuracy_after"]
    # The run says which task it was.
    unnamed = Settings(data_dir=str(data), method="zero-shot")
    assert evaluate(unnamed, checkpoint=str(tmp_path / "run"), quiet=True)["task"] == "copa"
    with pytest.raises(InputError, match=r"no config\.json or adapter_config\.json"):
        evaluate(Settings(task="copa", method="zero-shot"), checkpoint=str(tmp_path), quiet=True)


def test_an_adapter_is_a_checkpoint(tmp_path, llama, data):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    settings = Settings(task="rte", data_dir=str(data), method="zero-shot")
    result = evaluate(settings, checkpoint=str(tmp_path / "adapter"), quiet=True)
    plain = evaluate(Settings(**{**settings.to_dict(), "model": str(llama)}), quiet=True)
    assert result["model"] == str(tmp_path / "adapter") and result["loss"] != plain["loss"]
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "merged")
    merged = evaluate(Settings(**{**settings.to_dict(), "model": str(tmp_path / "merged")}), quiet=True)
    assert result["loss"] == pytest.approx(merged["loss"], rel=1e-4)


def test_test_examples_are_scored_after_training(tmp_path, llama, data):
    settings = Settings(
        model=str(llama), task="squad", data_dir=str(data), num_train=2, num_dev=2, num_eval=3, steps=2, max_new_tokens=3,
        output=str(tmp_path),
    )  # fmt: skip
    summary = finetune(settings, quiet=True)
    assert summary["data"]["train_examples"] == 2 and summary["data"]["dev_examples"] == 2
    assert summary["test"]["examples"] == 3 and list(summary["test"]["metrics"]) == ["f1", "exact_match"]
    assert summary["accuracy_after"] is None and summary["objective"] == "answer"


def test_k_shot_on_a_masked_model(tmp_path, roberta, data):
    settings = Settings(
        model=str(roberta), task="sst2", data_dir=str(data), k_shot=1, steps=20, lr=1e-4, output=str(tmp_path)
    )  # fmt: skip
    summary = finetune(settings, quiet=True)
    assert summary["objective"] == "masked" and summary["steps_done"] == 20
    assert (summary["data"]["train_examples"], summary["data"]["dev_examples"]) == (2, 2)
    assert summary["test"]["examples"] == 4 and list(summary["test"]["metrics"]) == ["accuracy"]


def test_a_roberta_has_as_many_tokens_as_positions_after_the_padding(roberta, data):
    settings = Settings(model=str(roberta), task="sst2")
    checkpoint = open_checkpoint(settings)
    assert checkpoint.masked and not checkpoint.causal and checkpoint.max_length(10_000) == 127
    rows = [{"sentence": "word " * 500, "label": 0}]
    path = write_jsonl(data / "long.jsonl", rows)
    evaluate(Settings(model=str(roberta), task="sst2", dev_file=str(path), method="zero-shot", max_length=2048), quiet=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--method mezo", "evaluate knows the methods zero-shot and icl, not mezo"),
        ("--num-shots 0 --method icl", "--num-shots is at least 1"),
        ("--task squad --data-dir DATA --model ROBERTA", "the task squad needs a causal language model"),
        ("--task squad --data-dir DATA --model LLAMA --max-new-tokens 5000", "--max-new-tokens 5000 leaves no room for a prompt"),
        ("--task rte --data-dir DATA --model LLAMA --max-length 20", "the prompt of the task rte alone takes"),
        ("--task rte --data-dir DATA --model LLAMA --objective masked", "the tokenizer of this model has no mask token"),
        ("--task copa --data-dir DATA --model ROBERTA --objective masked", "needs a task with classes, and copa has none"),
        ("--task sst2 --data-dir DATA --model BARE", "its tokenizer has neither a padding nor an end token"),
        ("--task sst2 --dev-file UNLABELLED --model LLAMA", "line 1: no field 'label'"),
        ("--checkpoint nowhere", "--checkpoint nowhere: no config.json"),
        ("--checkpoint BROKEN", "summary.json is not a JSON object"),
        ("--checkpoint LLAMA", "does not say which task it is for: give --task, --dev-file"),
        ("--checkpoint ADAPTER --task sst2 --data-dir DATA", "no usable adapter"),
        ("--task sst2 --data-dir DATA --model DAMAGED", "no usable weights in that folder"),
        ("--task sst2 --data-dir DATA --model WORDLESS", "no usable tokenizer in that folder"),
        ("--task sst2 --data-dir DATA --model ROBERTA --objective prompt", "is no causal language model; use --objective class"),
        ("--dev-file UNLABELLED", "--dev-file goes with --task"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, llama, roberta, data, argv, message):
    bare = tmp_path / "bare"
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(bare)
    tokenizer = tiny_tokenizer()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(bare)
    broken, adapter, damaged, wordless = (tmp_path / name for name in ("broken", "adapter", "damaged", "wordless"))
    for folder in (broken, adapter, wordless):
        folder.mkdir()
    (broken / "summary.json").write_text("{")
    write_jsonl(adapter / "adapter_config.json", [{"base_model_name_or_path": str(llama)}])
    (wordless / "config.json").write_bytes((llama / "config.json").read_bytes())
    shutil.copytree(llama, damaged)
    (damaged / "model.safetensors").write_bytes(b"cut off")
    places = {
        "BROKEN": broken,
        "ADAPTER": adapter,
        "DAMAGED": damaged,
        "WORDLESS": wordless,
        "DATA": data,
        "LLAMA": llama,
        "ROBERTA": roberta,
        "BARE": bare,
        "UNLABELLED": write_jsonl(tmp_path / "unlabelled.jsonl", [{"sentence": "fine"}]),
    }
    code, out, err = run(capsys, "--quiet", *(places.get(word, word) for word in argv.split()))
    assert code == 2 and out == "" and message in err
    assert err.startswith("lozo-kernels evaluate: error: ") and len(err.strip().splitlines()) == 1


def test_options_of_a_real_llama_are_its_own_choice(tmp_path):
    """A model that has read stories prefers a story's next words to nonsense, for prompts that it never saw."""
    from hf_helpers import convert_stories260k, data_folder

    model = convert_stories260k(data_folder(), tmp_path / "stories")
    rows = [
        {"premise": "Lily went to the park.", "choice1": "She played with her friends.", "choice2": "Zinc fiscal upon quarterly.",
         "question": "effect", "label": 0},
        {"premise": "Tom was very sad.", "choice1": "Parse the lemma over.", "choice2": "He lost his toy.", "question": "cause",
         "label": 1},
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "copa.jsonl", rows)
    result = evaluate(Settings(model=str(model), task="copa", dev_file=str(path), method="zero-shot"), quiet=True)
    assert result["metrics"]["accuracy"] == 1.0
    assert load_data(Settings(task="copa", dev_file=str(path), method="zero-shot")).train == []
    assert issubclass(AnswerObjective, OptionsObjective)
