"""The Trainer with evaluations that need the loss of each example: which loss that is, what a step does, and what is refused."""

import copy

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from models import same  # noqa: E402
from trainer_helpers import OPTIONS, Recorder, apart, arguments, tiny_llama, token_rows, trained, zo_arguments  # noqa: E402
from transformers import Trainer  # noqa: E402

from lozo_kernels import AGZO, LOZO, handle_of  # noqa: E402
from lozo_kernels.hf import ZOArguments, ZOTrainer, attach  # noqa: E402
from lozo_kernels.hf.trainer import example_losses  # noqa: E402

DATA = token_rows(40)
STEPS, EPS, PARTS = 6, 1e-3, 4
SPLIT = {"evaluation": "split", "directions": PARTS, "placement": "probe", "side": "scratch"}
BATCHED = SPLIT | {"evaluation": "batched"}
GUIDED = {"method": "agzo-split", "directions": PARTS, "side": "scratch"}


def settings_of(folder, **changes):
    chosen = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1}
    return zo_arguments(folder, **chosen | changes)


def token_losses(model):
    """Sums and numbers of the losses of each example's tokens, by hand."""

    def losses(batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none") * (labels != -100)
        return each.sum(1), (labels != -100).sum(1)

    return losses


@pytest.mark.parametrize("how", ["subclass", "attach"])
@pytest.mark.parametrize("chosen", [SPLIT, BATCHED, GUIDED], ids=["split", "batched", "agzo"])
def test_it_is_a_loop_of_steps(tmp_path, how, chosen):
    """The last batch of an epoch, of four examples, has no parts like the others', so that it is left out."""
    recorder, model, expected = Recorder(), tiny_llama(), tiny_llama().train()
    if how == "subclass":
        trainer = ZOTrainer(model, settings_of(tmp_path, **chosen), train_dataset=DATA[:36], data_collator=recorder)
    else:
        args = arguments(tmp_path, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-2)
        trainer = Trainer(model, args, train_dataset=DATA[:36], data_collator=recorder)
        attachment = attach(trainer, seed=3, **OPTIONS | chosen)
    trainer.train()
    (trainer if how == "subclass" else attachment).restore()
    kind, options = (AGZO, GUIDED | SPLIT) if chosen is GUIDED else (LOZO, chosen)
    optimizer = kind(expected, seed=3, eps=EPS, **OPTIONS, **{k: v for k, v in options.items() if k != "method"})
    for step, batch in enumerate(recorder.batches[:STEPS]):
        assert len(batch["labels"]) == 8 or chosen is BATCHED
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
        optimizer.step(token_losses(expected), batch)
    optimizer.handle.restore()
    assert apart(model, tiny_llama()) > 1e-4 and apart(model, expected) < 1e-5


def test_micro_batches_weigh_by_their_labels(tmp_path):
    """c in float64 from models at the points of the first step: parts of two micro-batches, over the labels of both."""
    recorder, model = Recorder(), tiny_llama()
    args = settings_of(tmp_path, gradient_accumulation_steps=2, max_steps=1, lr_scheduler_type="constant", **SPLIT)
    trainer = ZOTrainer(model, args, train_dataset=DATA, data_collator=recorder)
    trainer.train()
    handle, info, batches = trainer.zo_optimizer.handle, trainer.zo_optimizer.info, recorder.batches[:2]
    d = [{name: handle.materialize(name, 0, direction=i).double() for name in handle.names} for i in range(PARTS)]
    start, total = tiny_llama().double(), sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)

    @torch.no_grad()
    def loss(i, scale):
        moved = copy.deepcopy(start)
        for name, p in moved.named_parameters():
            if name in d[i]:
                p += scale * d[i][name]
        parts = [{name: value.chunk(PARTS)[i] for name, value in batch.items()} for batch in batches]
        return sum(token_losses(moved)(part)[0].sum() for part in parts) * PARTS / total

    plus, minus = (torch.stack([loss(i, scale) for i in range(PARTS)]) for scale in (EPS, -EPS))
    assert torch.allclose(info.loss_plus, plus, rtol=1e-5) and torch.allclose(info.loss_minus, minus, rtol=1e-5)
    assert torch.allclose(info.c, (plus - minus) / (2 * EPS), rtol=0.01, atol=0.01)  # of losses in fp32, over 2 eps
    logged = next(row for row in trainer.state.log_history if "loss" in row)
    assert logged["loss"] == pytest.approx(float((plus + minus).mean() / 2), rel=1e-3)
    trainer.restore()
    for name, p in trained(model).items():
        step = sum(float(c) * one[name] for c, one in zip(info.c, d, strict=True)) / PARTS
        expected = start.get_parameter(name) - 1e-2 * step / (2 if p.dim() > 1 else 1)
        assert torch.allclose(p.double(), expected, atol=2e-6), name


def bert(**changes):
    return transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, max_position_embeddings=16,
        **changes,
    )  # fmt: skip


def bart():
    return transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=16, dropout=0.2,
    )  # fmt: skip


MODELS = {
    "next tokens": (lambda: tiny_llama(attention_dropout=0.5), example_losses.next_tokens),
    "masked": (lambda: transformers.BertForMaskedLM(bert()), example_losses.tokens),
    "token classes": (lambda: transformers.BertForTokenClassification(bert(num_labels=3)), example_losses.tokens),
    "classes": (lambda: transformers.BertForSequenceClassification(bert(num_labels=3)), example_losses.classes),
    "numbers": (lambda: transformers.BertForSequenceClassification(bert(num_labels=1)), example_losses.numbers),
    "sequences": (lambda: transformers.BartForConditionalGeneration(bart()), example_losses.tokens),
}


def rows_of(name):
    labels = {
        "token classes": lambda _, row: torch.where(row["labels"] < 0, -100, row["labels"] % 3),
        "classes": lambda i, _: torch.tensor(i % 3),
        "numbers": lambda i, _: torch.tensor(i / 7),
    }.get(name, lambda _, row: row["labels"])
    return [row | {"labels": labels(i, row)} for i, row in enumerate(DATA)]


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_each_example_is_found(tmp_path, name):
    """Models with dropout too, which examples that are told apart cannot have, and which every other evaluation has."""
    make, kind = MODELS[name]
    torch.manual_seed(5)
    model = make().train()
    modes = {n: m.training for n, m in model.named_modules()}
    more = {"exclude": ["*embed_positions*"]} if name == "sequences" else {}  # which are the same for all examples of a batch
    trainer = ZOTrainer(model, settings_of(tmp_path, max_steps=3, **SPLIT, **more), train_dataset=rows_of(name))
    before = trained(model)
    trainer.train()
    assert trainer._example_losses._kind is kind
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert not same(before, trained(model)) and trainer.zo_optimizer.info.c.shape == (PARTS,)
    assert int(trainer.zo_optimizer.info.skipped_total) == 0


class Regular(transformers.LlamaForCausalLM):
    """A model with a term of its own in its loss."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = None if output.loss is None else output.loss + self.lm_head.weight.square().mean() * 40
        return output


@pytest.mark.parametrize("why", ["smoothed", "a term of its own", "no labels"])
def test_another_loss_needs_a_function(tmp_path, why):
    """A model whose loss is made in another way is not trained on one that it does not have."""
    data = [{"input_ids": row["input_ids"]} for row in DATA] if why == "no labels" else DATA
    model = Regular(tiny_llama().config) if why == "a term of its own" else tiny_llama()
    more = {"label_smoothing_factor": 0.1} if why == "smoothed" else {"remove_unused_columns": False}
    before, args = trained(model), settings_of(tmp_path, **SPLIT, **more)
    trainer = ZOTrainer(model, args, train_dataset=data)
    error, words = (ValueError, "did not return a loss") if why == "no labels" else (TypeError, "give compute_losses=")
    with pytest.raises(error, match=words):
        trainer.train()
    trainer.restore()
    assert same(before, trained(model))

    def losses(model, inputs):
        assert not model.training
        ids = inputs["input_ids"]
        return F.cross_entropy(model(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    trainer = ZOTrainer(model, args, train_dataset=data, compute_losses=losses)
    trainer.train()
    assert not same(before, trained(model))
    mean = sum(row["loss"] for row in trainer.state.log_history if "loss" in row) / STEPS
    assert 3.0 < mean < 5.0


def test_losses_of_the_user_are_those_that_are_found(tmp_path):
    runs = []
    for given in (None, lambda model, inputs: token_losses(model)(inputs)):
        model = tiny_llama()
        ZOTrainer(model, settings_of(tmp_path, **SPLIT), train_dataset=DATA, compute_losses=given).train()
        runs.append(trained(model))
    assert all(torch.allclose(runs[0][name], p, atol=1e-5) for name, p in runs[1].items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation": "split", "directions": 4}, "needs placement='probe'"),
        ({"evaluation": "batched"}, "needs placement='probe'"),
        ({"evaluation": "split", "placement": "probe"}, "give directions=2 or more"),
        ({"evaluation": "both"}, "evaluation is one of"),
        (SPLIT | {"directions": 3}, "divides per_device_train_batch_size, 8, into equal parts"),
        (SPLIT | {"two_sided": False}, "leave two_sided=False out"),
        ({"method": "agzo-split", "two_sided": False}, "leave two_sided=False out"),
        ({"method": "agzo-split", "directions": 1}, "give directions=2 or more"),
        ({"method": "agzo-split", "placement": "inplace"}, "needs placement='probe'"),
        ({"method": "agzo-split", "per_device_train_batch_size": 12}, "directions=8: it divides"),
    ],
)
def test_settings_that_contradict(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, **settings)


def test_defaults_are_those_of_the_method(tmp_path):
    quiet = {"use_cpu": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    args = ZOArguments(str(tmp_path), method="agzo-split", max_steps=1, **quiet)
    assert args.by_example and args.splits and not settings_of(tmp_path).splits
    trainer = ZOTrainer(tiny_llama(), args, train_dataset=DATA)
    trainer.train()
    optimizer = trainer.zo_optimizer
    config = optimizer.handle.config
    assert isinstance(optimizer, AGZO) and (optimizer.evaluation, optimizer.directions) == ("split", 8)
    assert (config.rank, config.placement, args.learning_rate) == (4, "probe", 1e-7)
    assert trainer.floating_point_ops({"input_ids": torch.ones(8, 9)}) == 4 * 72 * trainer._parameters


def test_functions_that_do_not_fit(tmp_path):
    model, args, split = tiny_llama(), settings_of(tmp_path), settings_of(tmp_path, **SPLIT)
    with pytest.raises(TypeError, match="compute_losses is a function of"):
        ZOTrainer(model, split, compute_losses=3)
    with pytest.raises(ValueError, match="compute_losses goes with evaluation='split'"):
        ZOTrainer(model, args, compute_losses=len)
    with pytest.raises(ValueError, match="need the loss of each example: give compute_losses"):
        ZOTrainer(model, split, compute_objective=len)
    stock = Trainer(model, arguments(tmp_path))
    with pytest.raises(TypeError, match="compute_losses is a function of"):
        attach(stock, compute_losses=3, **SPLIT)
    with pytest.raises(ValueError, match="compute_losses goes with evaluation='split'"):
        attach(stock, compute_losses=len)
    assert handle_of(model) is None
    assert settings_of(tmp_path, method="agzo-split", normalise="spread").optimizer_options()["normalise"] == "spread"
    for evaluation in ("split", "batched"):
        with pytest.raises(ValueError, match="needs the loss of each example, which drive='backward' does not allow"):
            LOZO(model, drive="backward", placement="probe", evaluation=evaluation, directions=2)


@pytest.mark.parametrize("how", ["subclass", "attach"])
def test_only_training_leaves_examples_out(tmp_path, how):
    """Evaluations and predictions have all of them, and fewer than a batch are an error."""

    def trainer_of(data):
        more = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "max_steps": -1}
        if how == "subclass":
            return ZOTrainer(tiny_llama(), settings_of(tmp_path, **SPLIT, **more), train_dataset=data)
        trainer = Trainer(tiny_llama(), arguments(tmp_path, **more), train_dataset=data)
        attach(trainer, **SPLIT)
        return trainer

    trainer = trainer_of(DATA[:19])
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(trainer.predict(DATA[:11]).predictions) == 11 and trainer.evaluate(DATA[:5])["eval_loss"] > 0
    assert not trainer.args.dataloader_drop_last
    with pytest.raises(ValueError, match="the 6 train examples are less than one batch"):
        trainer_of(DATA[:6]).train()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(DATA[:11])


def test_a_stream_that_ends_with_another_batch_is_refused(tmp_path):
    trainer = ZOTrainer(tiny_llama(), settings_of(tmp_path, **SPLIT), train_dataset=Stream())
    with pytest.raises(ValueError, match=r"does not divide into directions=4 equal parts: leave such a batch out .* take\(\) of a"):
        trainer.train()


def mean_losses(model, inputs):
    sums, weights = token_losses(model)(inputs)
    return sums / weights


@pytest.mark.parametrize("how", ["subclass", "attach", "with a loss of its own"])
def test_means_of_micro_batches_are_averaged_once(tmp_path, how):
    """Whatever the Trainer makes of a loss that it takes for a sum over all of them."""
    more = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    model, recorder = tiny_llama(), Recorder()
    if how == "attach":
        trainer = Trainer(model, arguments(tmp_path, **more), train_dataset=DATA, data_collator=recorder)
        optimizer = attach(trainer, seed=3, compute_losses=mean_losses, **SPLIT, **OPTIONS).optimizer
    else:
        own = {} if how == "subclass" else {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.mean()}
        args = settings_of(tmp_path, **SPLIT, **more)
        trainer = ZOTrainer(model, args, train_dataset=DATA, data_collator=recorder, compute_losses=mean_losses, **own)
    trainer.train()
    info = (optimizer if how == "attach" else trainer.zo_optimizer).info
    expected = sum(mean_losses(tiny_llama(), batch).mean() for batch in recorder.batches[:2]) / 2
    assert float(info.loss) == pytest.approx(float(expected), rel=1e-3)


class Mean(ZOTrainer):
    """As the documentation of transformers asks of a subclass whose loss is the mean of a batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_trainer_that_divides_itself(tmp_path):
    args = settings_of(tmp_path, gradient_accumulation_steps=4, max_steps=1, **SPLIT)
    trainer = Mean(tiny_llama(), args, train_dataset=DATA)
    trainer.train()
    assert 3.5 < float(trainer.zo_optimizer.info.loss) < 4.5


@pytest.mark.parametrize("where", ["first", "later"])
def test_a_micro_batch_without_labels_counts_for_nothing(tmp_path, where):
    empty = [row | {"labels": torch.full_like(row["labels"], -100)} for row in DATA[:8]]
    data, collator = (empty + DATA[:24] if where == "first" else DATA[:24] + empty), Recorder()
    args = settings_of(tmp_path, gradient_accumulation_steps=4, max_steps=1, train_sampling_strategy="sequential", **SPLIT)
    trainer = ZOTrainer(tiny_llama(), args, train_dataset=data, data_collator=collator)
    trainer.train()
    info = trainer.zo_optimizer.info
    found = [token_losses(tiny_llama())(batch) for batch in collator.batches[:4]]
    expected = sum(sums.sum() for sums, _ in found) / sum(weights.sum() for _, weights in found)
    assert not info.skipped and float(info.loss) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["token classes", "masked"])
def test_labels_are_not_shifted_where_both_losses_are_alike(tmp_path, name, dtype):
    """A fresh head gives every class the same, to what bf16 can tell."""
    model = MODELS[name][0]().to(dtype)
    with torch.no_grad():
        head = model.classifier if name == "token classes" else model.cls.predictions.decoder
        head.weight.mul_(0.0 if dtype == torch.float32 else 0.01)
    trainer = ZOTrainer(model, settings_of(tmp_path, max_steps=1, **SPLIT), train_dataset=rows_of(name))
    trainer.train()
    assert trainer._example_losses._kind is example_losses.tokens


def test_whole_numbers_are_regressed_on(tmp_path):
    model = transformers.BertForSequenceClassification(bert(num_labels=1))
    rows = [row | {"labels": torch.tensor(i % 4)} for i, row in enumerate(DATA)]
    trainer = ZOTrainer(model, settings_of(tmp_path, max_steps=1, **SPLIT), train_dataset=rows)
    trainer.train()
    assert trainer._example_losses._kind is example_losses.numbers


class Later(ZOTrainer):
    """A term that is nothing at first."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return outputs.loss + self.state.global_step


def test_a_term_that_comes_later_is_seen(tmp_path):
    trainer = Later(tiny_llama(), settings_of(tmp_path, max_steps=30, **SPLIT), train_dataset=DATA)
    with pytest.raises(TypeError, match="give compute_losses="):
        trainer.train()
    assert trainer.state.global_step == 9


def test_killed_and_resumed_gives_the_same_bits(tmp_path):
    def run(folder, steps=STEPS, resume=None):
        model = tiny_llama(attention_dropout=0.1)
        saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
        args = settings_of(folder, max_steps=steps, **GUIDED, **saving)
        ZOTrainer(model, args, train_dataset=DATA).train(resume_from_checkpoint=resume)
        return trained(model)

    whole = run(tmp_path / "whole")
    run(tmp_path / "part", 3)
    assert same(whole, run(tmp_path / "part", resume=True))
