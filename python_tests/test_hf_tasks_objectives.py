"""Objectives against the same figures taken one sequence at a time, and what happens to what is too long."""

import pytest
import torch
from hf_tiny import tiny_llama, tiny_roberta, tiny_tokenizer

from lozo_kernels.errors import InputError
from lozo_kernels.hf.data.examples import Example
from lozo_kernels.hf.loop.scoring import evaluate
from lozo_kernels.hf.objectives import AnswerObjective, ChoiceObjective, MaskedPromptObjective, PromptObjective, choose_objective
from lozo_kernels.hf.tasks import TASKS, TEXT

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
WORDS = "red blue green dog cat runs sleeps in the house near a river"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tiny_llama(tmp_path_factory.mktemp("llama"))
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    folder = tiny_roberta(tmp_path_factory.mktemp("roberta"))
    return transformers.AutoModelForMaskedLM.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def sentence(rng, low=1, high=9):
    return " ".join(rng.choices(WORDS.split(), k=rng.randint(low, high)))


def choices(rng, count):
    """Examples of COPA with fresh texts and between two and four options."""
    examples = []
    for _ in range(count):
        options = tuple(" " + sentence(rng) for _ in range(rng.randint(2, 4)))
        right = tuple(sorted(rng.sample(range(len(options)), rng.randint(1, 2))))
        examples.append(Example((sentence(rng), rng.choice(("so", "because"))), options=options, right=right))
    return examples


@torch.no_grad()
def log_probabilities(model, tokenizer, prompt, continuation):
    """Of each token of the continuation, from one sequence without padding."""
    before, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + continuation)["input_ids"]
    assert ids[: len(before)] == before
    table = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(table[i - 1, ids[i]]) for i in range(len(before), len(ids))]


def test_options_are_compared_by_their_mean_log_probability(rng, llama):
    model, tokenizer = llama
    examples = choices(rng, 7)
    choice, answer = (kind(tokenizer, TASKS["copa"], 200) for kind in (ChoiceObjective, AnswerObjective))
    losses, taught, correct = [], [], 0
    for e in examples:
        each = [log_probabilities(model, tokenizer, choice.prompt(e), option) for option in e.options]
        means = torch.tensor([sum(values) / len(values) for values in each])
        losses.append(float(-means.log_softmax(-1)[e.right[0]]))
        taught.append(each[e.right[0]])
        correct += int(means.argmax()) in e.right
    record = evaluate(model, choice, choice.encode_all(examples, evaluation=True), 0, 5, CPU)
    assert record.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4) and record.accuracy == correct / len(examples)
    tokens = [value for values in taught for value in values]
    record = evaluate(model, answer, answer.encode_all(examples, evaluation=True), 0, 5, CPU)
    assert record.loss == pytest.approx(-sum(tokens) / len(tokens), rel=1e-4) and record.accuracy == correct / len(examples)
    # In training only the right option is read, and the loss is the same.
    encoded = answer.encode_all(examples)
    assert [len(e["options"]) for e in encoded] == [1] * len(examples)
    with torch.no_grad():
        assert float(answer.loss(model, answer.collate(encoded, CPU))) == pytest.approx(record.loss, rel=1e-4)


@pytest.mark.parametrize(
    ("sentence", "prompt", "options"),
    [("_ runs", "", ("the red dog runs", "the cat runs")), ("near the _ house", "near the", (" red house", " green house"))],
)
def test_what_follows_a_blank_is_scored_also_without_a_prompt(llama, sentence, prompt, options):
    model, tokenizer = llama
    objective = ChoiceObjective(tokenizer, TASKS["winogrande"], 200)
    example = Example((sentence,), options=options, right=(1,))
    means = [torch.tensor(log_probabilities(model, tokenizer, prompt, option)).mean() for option in options]
    with torch.no_grad():
        batch = objective.collate([objective.encode(example)], CPU)
        torch.testing.assert_close(objective.scores(model, batch)[0], torch.stack(means), rtol=1e-4, atol=1e-4)


def test_label_words_of_one_token_are_the_same_as_options(rng, llama):
    """MeZO's cross-entropy over the log-probabilities of the words is that over their logits."""
    model, tokenizer = llama
    for name in ("sst2", "rte", "cb"):
        task = TASKS[name]
        examples = [Example(tuple(sentence(rng) for _ in task.fields), rng.randrange(len(task.labels))) for _ in range(6)]
        results = []
        for kind in (PromptObjective, ChoiceObjective):
            objective = kind(tokenizer, task, 200)
            results.append(evaluate(model, objective, objective.encode_all(examples, evaluation=True), 0, 4, CPU))
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-4) and results[0].accuracy == results[1].accuracy


def test_the_answer_of_a_generation_ends_its_line(llama):
    model, tokenizer = llama
    objective = AnswerObjective(tokenizer, TASKS["squad"], 200)
    example = Example(("Context: the cat sleeps", "Who sleeps?"), answers=("the cat", "cat"))
    expected = log_probabilities(model, tokenizer, "Context: the cat sleeps\nQuestion: Who sleeps?\nAnswer:", " the cat\n")
    with torch.no_grad():
        totals = objective.totals(model, objective.collate([objective.encode(example)], CPU))
    assert int(totals.count) == len(expected) and totals.correct is None
    assert float(totals.loss) == pytest.approx(-sum(expected), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", [ChoiceObjective, AnswerObjective])
def test_losses_are_those_of_each_example(rng, llama, kind):
    model, tokenizer = llama
    objective = kind(tokenizer, TASKS["copa"], 200)
    encoded = objective.encode_all(choices(rng, 6), evaluation=True)
    each = objective.losses(model, objective.collate(encoded, CPU))
    for i, e in enumerate(encoded):
        alone = objective.totals(model, objective.collate([e], CPU))
        assert float(each.sums[i]) == pytest.approx(float(alone.loss), rel=1e-4)
        assert int(each.counts[i]) == int(alone.count) and int(each.correct[i]) == int(alone.correct)


@torch.no_grad()
def test_a_masked_model_answers_in_the_blank(rng, roberta):
    model, tokenizer = roberta
    for name in ("sst5", "trec", "snli"):
        task = TASKS[name]
        objective = MaskedPromptObjective(tokenizer, task, 120)
        examples = [Example(tuple(sentence(rng) for _ in task.fields), rng.randrange(len(task.labels))) for _ in range(5)]
        encoded = objective.encode_all(examples)
        words = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in task.masked_words]
        assert all(len(ids) == 1 for ids in words)
        expected = []
        for e in encoded:
            assert e["input_ids"].count(tokenizer.mask_token_id) == 1
            logits = model(input_ids=torch.tensor([e["input_ids"]])).logits[0, e["input_ids"].index(tokenizer.mask_token_id)]
            expected.append(logits[[ids[0] for ids in words]])
        torch.testing.assert_close(
            objective.scores(model, objective.collate(encoded, CPU)), torch.stack(expected), rtol=1e-4, atol=1e-4
        )


def test_a_text_that_is_too_long_for_a_masked_prompt_loses_its_end(roberta):
    _, tokenizer = roberta
    objective = MaskedPromptObjective(tokenizer, TASKS["snli"], 40)
    first, second = "No " + "red " * 100, "the dog sleeps"
    ids = objective.encode(Example((first, second), 0))["input_ids"]
    text = tokenizer.decode(ids)
    assert len(ids) <= 40 and text.startswith("<s>No red red") and text.endswith("?<mask>, the dog sleeps</s>")
    # A mask token in a text is no second blank.
    ids = objective.encode(Example(("a <mask> b", second), 0))["input_ids"]
    assert ids.count(tokenizer.mask_token_id) == 1


@pytest.mark.parametrize("kind", [AnswerObjective, ChoiceObjective])
def test_a_prompt_that_is_too_long_is_shortened_in_front_and_the_answer_stays(llama, kind):
    _, tokenizer = llama
    objective = kind(tokenizer, TASKS["copa"], 30)
    example = Example(("red " * 100, "so"), options=(" the dog runs.", " the cat sleeps."), right=(1,))
    for option, text in zip(objective.encode_for_evaluation(example)["options"], example.options, strict=True):
        ids = option["input_ids"]
        assert len(ids) == 30 and ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[-option["count"][0] :]) == text
        assert tokenizer.decode(ids).endswith("so" + text)
    with pytest.raises(InputError, match=r"an answer of \d+ tokens .* does not fit in 30"):
        objective.encode_for_evaluation(Example(("red", "so"), options=(" blue" * 40, " red"), right=(0,)))


def test_demonstrations_are_dropped_from_the_left_until_they_fit(llama):
    _, tokenizer = llama
    shown = [Example((f"review {i} " + "red " * i,), i % 2) for i in range(6)]
    example = Example(("the dog sleeps",), 1)
    alone = len(PromptObjective(tokenizer, TASKS["sst2"], 500).encode(example)["input_ids"])
    counts = []
    for room in range(alone, alone + 240, 9):
        objective = PromptObjective(tokenizer, TASKS["sst2"], room, shown)
        text = tokenizer.decode(objective.encode(example)["input_ids"], skip_special_tokens=True)
        count = text.count("\n\n")
        expected = [objective.solved(e) for e in shown[len(shown) - count :]]
        assert text == "\n\n".join([*expected, "the dog sleeps It was"])
        assert objective.shown == {count: 1} and len(tokenizer(text)["input_ids"]) <= room
        counts.append(count)
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 6
    assert objective.solved(shown[3]) == "review 3 red red red It was great"


def test_demonstrations_change_the_scores_of_options(llama):
    model, tokenizer = llama
    shown = [Example(("the sun shone", "so"), options=(" it was warm.", " it was cold."), right=(0,))]
    example = Example(("the dog ran", "because"), options=(" it was late.", " it slept."), right=(0,))
    objective = AnswerObjective(tokenizer, TASKS["copa"], 200, shown)
    prefix = "the sun shone so it was warm.\n\nthe dog ran because"
    means = [torch.tensor(log_probabilities(model, tokenizer, prefix, option)).mean() for option in example.options]
    with torch.no_grad():
        batch = objective.collate([objective.encode_for_evaluation(example)], CPU)
        torch.testing.assert_close(objective.scores(model, batch)[0], torch.stack(means), rtol=1e-4, atol=1e-4)


def test_batches_hold_so_many_rows(rng, llama):
    objective = ChoiceObjective(llama[1], TASKS["copa"], 200)
    encoded = objective.encode_all(choices(rng, 20))
    batches = list(objective.batches(encoded, 7))
    assert [e for batch in batches for e in batch] == encoded
    assert all(sum(len(e["options"]) for e in batch) <= 7 for batch in batches)
    assert [len(batch) for batch in objective.batches(encoded, 1)] == [1] * 20


def test_the_objective_follows_task_and_model():
    assert choose_objective("auto", TASKS["sst2"], causal=False, masked=True) == "masked"
    assert choose_objective("auto", TASKS["cb"], causal=False, masked=True) == "classification"  # no prompt for masked models
    assert choose_objective("auto", TASKS["copa"], causal=True) == "answer"
    assert choose_objective("auto", TASKS["winogrande"], causal=True) == "choice"
    assert choose_objective("choice", TASKS["copa"], causal=True) == "choice"
    with pytest.raises(InputError, match="squad needs a causal language model"):
        choose_objective("auto", TASKS["squad"], causal=False, masked=True)
    with pytest.raises(InputError, match="needs a task with classes, and squad has none"):
        choose_objective("masked", TASKS["squad"], causal=False, masked=True)


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        (MaskedPromptObjective, "boolq", "the task boolq has no prompt for masked models"),
        (MaskedPromptObjective, "sst2", "the tokenizer of this model has no mask token"),
        (ChoiceObjective, "squad", "the task squad has no options; use answer"),
        (AnswerObjective, "text", "the task text has no answers; use lm"),
        (PromptObjective, "text", "the task text has no prompt"),
    ],
)
def test_what_does_not_go_together_is_one_message(kind, task, message):
    with pytest.raises(InputError) as error:
        kind(tiny_tokenizer(), TEXT if task == "text" else TASKS[task], 100)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_longer_than_the_context_is_one_message():
    with pytest.raises(InputError, match=r"the prompt of the task wic alone takes \d+ tokens, and 12 fit \(--max-length"):
        PromptObjective(tiny_tokenizer(), TASKS["wic"], 12)
    with pytest.raises(InputError, match=r"the masked prompt of the task sst2 alone takes \d+ tokens, and 5 fit"):
        MaskedPromptObjective(tiny_tokenizer(masked=True), TASKS["sst2"], 5)


def test_label_words_that_begin_alike_are_named():
    from lozo_kernels.hf.tasks import Task

    task = Task("made-up", "classification", (("text",),), labels=("a", "b"), prompt="{0} is", words=(" qa", " qb"))
    with pytest.raises(InputError, match=r"two label words of made-up .* begin with the same token .* use --objective choice"):
        PromptObjective(tiny_tokenizer(), task, 100)
    ChoiceObjective(tiny_tokenizer(), task, 100)
