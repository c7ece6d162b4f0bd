"""Ways into the Hugging Face Trainer: the same run by each of them, losses from elsewhere, and what is refused."""

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_helpers import OPTIONS, Recorder, apart, arguments, tiny_llama, token_rows, trained, zo_arguments  # noqa: E402
from transformers import Trainer  # noqa: E402

from lozo_kernels import LOZO, handle_of, hf, patch  # noqa: E402
from lozo_kernels.hf import ZOArguments, ZOTrainer, attach  # noqa: E402

STEPS, LR = 40, 1e-4
DATA = token_rows(96)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A stock Trainer with all its defaults, gradient clipping among them, and the batches that it saw."""
    recorder, model = Recorder(), tiny_llama()
    optimizer = LOZO(model, lr=LR, seed=3, drive="backward", **OPTIONS)
    args = arguments(tmp_path_factory.mktemp("stock"))
    assert args.max_grad_norm == 1.0
    trainer = Trainer(model, args, train_dataset=DATA, data_collator=recorder, optimizers=(optimizer, None))
    trainer.train()
    assert optimizer.steps_done == STEPS
    optimizer.handle.restore()
    assert apart(model, tiny_llama()) > 1e-4
    return model, recorder.batches[:STEPS]


def losses_and_rates(batches):
    for step, batch in enumerate(batches):
        yield batch, LR * (1 - step / STEPS)


def test_plain_loops(reference):
    expected, batches = reference
    closing, driven = tiny_llama().train(), tiny_llama().train()
    first = LOZO(closing, lr=LR, seed=3, **OPTIONS)
    second = LOZO(driven, lr=LR, seed=3, drive="backward", **OPTIONS)
    for batch, rate in losses_and_rates(batches):
        first.param_groups[0]["lr"] = second.param_groups[0]["lr"] = rate
        first.step(lambda batch=batch: closing(**batch).loss)
        driven(**batch).loss.backward()
        second.step()
        second.zero_grad()
    for optimizer in (first, second):
        optimizer.handle.restore()
    assert apart(closing, expected) < 1e-5 and apart(driven, expected) < 1e-5


def test_a_loop_of_accelerate(reference):
    from accelerate import Accelerator

    expected, batches = reference
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_llama().train()
    optimizer = LOZO(model, lr=LR, seed=3, drive="backward", **OPTIONS)
    model, prepared = accelerator.prepare(model, optimizer)
    for batch, rate in losses_and_rates(batches):
        optimizer.param_groups[0]["lr"] = rate
        items = (batch["labels"][:, 1:] != -100).sum()
        for part in (slice(8), slice(8, 16)):
            with accelerator.accumulate(model):
                loss = model(**{name: x[part] for name, x in batch.items()}, num_items_in_batch=items).loss
                accelerator.backward(2 * loss)  # which it divides by the number of micro-batches
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                prepared.step()
                prepared.zero_grad()
    assert optimizer.steps_done == STEPS
    optimizer.handle.restore()
    assert apart(model, expected) < 1e-5


@pytest.mark.parametrize("how", ["stock", "attach", "subclass"])
@pytest.mark.parametrize("parts", [1, 2])
def test_trainers(reference, tmp_path, how, parts):
    if (how, parts) == ("stock", 1):
        return
    expected, _ = reference
    model = tiny_llama()
    settings = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 16 // parts}
    if how == "stock":
        optimizer = LOZO(model, lr=LR, seed=3, drive="backward", **OPTIONS)
        trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=DATA, optimizers=(optimizer, None))
    elif how == "attach":
        trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=DATA)
        attachment = attach(trainer, seed=3, **OPTIONS)
        optimizer = attachment.optimizer
    else:
        trainer = ZOTrainer(model, zo_arguments(tmp_path, **settings), train_dataset=DATA)
    trainer.train()
    if how == "subclass":
        assert trainer.zo_optimizer.steps_done == STEPS
        trainer.restore()
    elif how == "attach":
        attachment.restore()
        assert "compute_loss" not in trainer.__dict__ and trainer.optimizer is None
    else:
        optimizer.handle.restore()
    assert apart(model, expected) < 1e-5
    assert handle_of(model) is None and all(p.requires_grad for p in model.parameters())


def test_logs(tmp_path):
    args = zo_arguments(tmp_path, directions=2, method="lozo-m", eval_strategy="steps", eval_steps=20, max_steps=20)
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_log(self, *_, logs=None, **__):
            seen.append(dict(logs))

    trainer = ZOTrainer(tiny_llama(), args, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=[Watch()])
    trainer.train()
    logs = [log for log in seen if "loss" in log]
    assert len(logs) == 2 and "eval_loss" in {name for log in seen for name in log}
    last, info = logs[-1], trainer.zo_optimizer.info
    assert [last["projected_gradient_0"], last["projected_gradient_1"]] == info.c.tolist()
    assert last["loss_plus"] == pytest.approx(info.loss_plus.mean().item()) and last["skipped"] == 0
    assert 0 < last["forwards_ms"] < last["step_ms"] and "grad_norm" not in last
    assert last["weights_ms"] == pytest.approx(last["step_ms"] - last["forwards_ms"])
    assert trainer.zo_optimizer.momentum == 0.9 and trainer.state.total_flos > 0


def smoothed(model, batch, epsilon=0.2):
    """Label smoothing as its paper defines it (Szegedy et al., 2016), over the labels that count."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    log_p = torch.log_softmax(logits, -1)[labels != -100]
    picked = log_p.gather(-1, labels[labels != -100][:, None])
    return -((1 - epsilon) * picked.mean() + epsilon * log_p.mean())


@pytest.mark.parametrize("how", ["attach", "subclass"])
def test_a_loss_from_outside_of_the_model(tmp_path, how):
    recorder, model, settings = Recorder(), tiny_llama(), {"label_smoothing_factor": 0.2, "max_steps": 10}
    if how == "attach":
        trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=DATA, data_collator=recorder)
        attach(trainer, seed=3, **OPTIONS)
    else:
        trainer = ZOTrainer(model, zo_arguments(tmp_path, **settings), train_dataset=DATA, data_collator=recorder)
    trainer.train()
    handle_of(model).restore()
    expected = tiny_llama().train()
    optimizer = LOZO(expected, seed=3, **OPTIONS)
    for step, batch in enumerate(recorder.batches[:10]):
        optimizer.param_groups[0]["lr"] = LR * (1 - step / 10)
        optimizer.step(lambda batch=batch: smoothed(expected, batch))
    optimizer.handle.restore()
    assert apart(model, expected) < 1e-5


def test_a_loss_from_outside_is_refused_by_a_driven_model(tmp_path):
    model = tiny_llama()
    optimizer = LOZO(model, drive="backward")
    args = arguments(tmp_path, label_smoothing_factor=0.2, max_steps=2)
    with pytest.raises(TypeError, match=r"must return its loss.*attach\(trainer\)"):
        Trainer(model, args, train_dataset=DATA, optimizers=(optimizer, None)).train()


@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_a_loss_of_a_subclass_and_of_a_function(tmp_path, placement):
    def loss_of(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    class Own(ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = loss_of(outputs, labels, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    models = []
    for cls, named in ((ZOTrainer, {}), (ZOTrainer, {"compute_loss_func": loss_of}), (Own, {})):
        models.append(tiny_llama())
        settings = {"max_steps": 6, "placement": placement, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
        if cls is Own:  # the Trainer takes what an overridden compute_loss returns for a mean, or not, by the model's signature
            named = named | {"eval_dataset": DATA[:4]}
        trainer = cls(models[-1], zo_arguments(tmp_path, **settings), train_dataset=DATA, **named)
        trainer.train()
        if cls is Own:
            assert trainer.evaluate.__self__ is trainer
        trainer.restore()
    assert apart(models[0], models[1]) < 1e-5 and apart(models[0], models[2]) < 1e-5


def test_columns_that_the_model_does_not_take_are_removed(tmp_path):
    model = tiny_llama()
    optimizer = LOZO(model, drive="backward")
    rows = [row | {"text": "not a tensor", "score": torch.ones(())} for row in DATA]
    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    assert optimizer.steps_done == 2


def test_weight_decay_leaves_biases_and_norms(tmp_path):
    model = tiny_llama(attention_bias=True)
    before = trained(model)
    args = zo_arguments(tmp_path, weight_decay=0.5, max_steps=1, learning_rate=1e-2, eps=1e-3, lr_scheduler_type="constant")
    trainer = ZOTrainer(model, args, train_dataset=DATA)
    trainer.train()
    c, handle = trainer.zo_optimizer.info.c.item(), trainer.zo_optimizer.handle
    for name, value in before.items():
        kept = 1.0 if "norm" in name or "bias" in name else 1 - 1e-2 * 0.5
        d = handle.materialize(name, 0)
        expected = kept * value - 1e-2 * c * d / (2 if value.dim() > 1 else 1)
        assert torch.allclose(handle.model.get_parameter(name), expected, atol=2e-6), name
    assert [g["weight_decay"] for g in trainer.zo_optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_grad_norm": 1.0}, "would clip the projected gradient"),
        ({"optim": "sgd"}, "the optimiser follows from method"),
        ({"fsdp": "full_shard"}, "fsdp shards the model"),
        ({"deepspeed": {"train_batch_size": 1}}, "deepspeed brings an optimiser"),
        ({"method": "adam"}, "method is one of"),
        ({"momentum": 0.9}, "use method='lozo-m'"),
        ({"method": "mezo", "momentum": 0.9, "rank": None, "interval": None}, "use method='mezo-m'"),
        ({"method": "lozo-m", "momentum": 0.0}, "use method='lozo'"),
        ({"method": "subzero", "momentum": 0.9}, "leave it out"),
        ({"method": "mezo", "interval": None}, "method='mezo' has no rank"),
        ({"rank": 1000}, "rank is at least 1"),
        ({"eps": 0.0}, "eps"),
        ({"placement": "moon"}, "placement is one of"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_settings_that_contradict(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        zo_arguments(tmp_path, **settings)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trainers_that_are_refused(tmp_path):
    model = tiny_llama()
    args = arguments(tmp_path)
    for given, error, message in (
        (object(), TypeError, "takes a transformers.Trainer"),
        (Trainer(model, args, optimizers=(torch.optim.SGD(model.parameters()), None)), ValueError, "has an optimiser already"),
        (Trainer(args=args, model_init=lambda: tiny_llama()), ValueError, "model_init"),
    ):
        with pytest.raises(error, match=message):
            attach(given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lerning_rate'"):
        attach(Trainer(model, args), lerning_rate=1)
    with pytest.raises(ValueError, match="eps"):
        attach(Trainer(model, args), eps=-1)
    with pytest.raises(ValueError, match="method is one of"):
        attach(Trainer(model, args), method="sgd")
    for options, message in (
        ({"method": "mezo", "rank": 2}, "method='mezo' has no rank"),
        ({"method": "mezo", "momentum": 0.9}, "use method='mezo-m'"),
        ({"method": "lozo-m", "momentum": 0}, "use method='lozo'"),
        ({"method": "subzero", "momentum": 0.9}, "leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(Trainer(model, args), **options)
    with pytest.raises(TypeError, match="momentum is a number, not 'a'"):
        attach(Trainer(model, args), momentum="a")
    several = arguments(tmp_path)
    several._n_gpu = 2
    trainer = Trainer(model, args)
    trainer.args = several
    with pytest.raises(ValueError, match="one process per GPU"):
        attach(trainer)
    assert handle_of(model) is None and all(p.requires_grad for p in model.parameters())
    own = zo_arguments(tmp_path)
    with pytest.raises(TypeError, match="momentum is a number, not 'a'"):
        zo_arguments(tmp_path, momentum="a")
    with pytest.raises(TypeError, match=r"takes lozo_kernels\.hf\.ZOArguments"):
        ZOTrainer(model, args)
    with pytest.raises(ValueError, match="makes its optimiser"):
        ZOTrainer(model, own, optimizers=(torch.optim.SGD(model.parameters()), None))
    with pytest.raises(TypeError, match="function of"):
        ZOTrainer(model, own, compute_objective=3)
    with pytest.raises(ValueError, match="leave compute_loss_func out"):
        ZOTrainer(model, own, compute_objective=len, compute_loss_func=len)
    kept = patch(model)
    with pytest.raises(RuntimeError, match="patched already"):
        ZOTrainer(model, own, train_dataset=DATA).train()
    kept.restore()


def test_rates_by_default_are_the_papers(tmp_path):
    args = ZOArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=2, save_strategy="no", disable_tqdm=True)
    assert args.learning_rate == 1e-6
    trainer = ZOTrainer(tiny_llama(), args, train_dataset=DATA)
    trainer.train()
    assert trainer.lr_scheduler.get_last_lr() == [1e-6]  # after the last step, where a linear one is at zero


def test_arguments_from_a_command_line(tmp_path):
    parser = transformers.HfArgumentParser(ZOArguments)
    words = [
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--method",
        "lozo-m",
        "--rank",
        "4",
        "--exclude",
        "*.bias",
        "--zo_seed",
        "7",
    ]
    (args,) = parser.parse_args_into_dataclasses(words)
    assert args.patch_options()["rank"] == 4 and args.patch_options()["seed"] == 7 and args.exclude == ["*.bias"]
    assert args.optimizer_options()["momentum"] == 0.9 and args.max_grad_norm == 0
    args = ZOArguments(str(tmp_path), directions_law="rademacher", normalise="spread", directions=3)
    assert args.optimizer_options()["normalise"] == "spread" and args.patch_options()["directions_law"] == "rademacher"
    for bad in ({"normalise": "spread"}, {"normalise": "max"}, {"directions_law": "uniform"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ZOArguments(str(tmp_path), **bad)


def test_transformers_is_imported_when_it_is_asked_for():
    code = "import sys, lozo_kernels.hf as hf; assert 'transformers' not in sys.modules; assert not hasattr(hf, 'nothing')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(hf.attach) and issubclass(hf.ZOTrainer, Trainer)
