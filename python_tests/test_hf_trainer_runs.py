"""Runs of the Trainer: killed and resumed, best models, half precision, objectives without a gradient, adapters."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from models import same  # noqa: E402
from trainer_helpers import OPTIONS, Recorder, apart, arguments, tiny_llama, token_rows, trained, zo_arguments  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer  # noqa: E402

from lozo_kernels import LOZO  # noqa: E402
from lozo_kernels.hf import ZOTrainer  # noqa: E402

DATA = token_rows(48)
DROPOUT = {"attention_dropout": 0.1}


class Killed(Exception):
    pass


class KillAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, _args, state, _control, **_):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("how", ["subclass", "stock"])
@pytest.mark.parametrize("placing", [{}, {"placement": "probe", "side": "scratch"}], ids=["inplace", "probe"])
def test_killed_and_resumed_gives_the_same_bits(tmp_path, placing, how):
    """LOZO-M, with dropout, in the middle of a window and of an epoch."""

    def run(folder, kill=None, resume=None):
        model = tiny_llama(**DROPOUT)
        settings = {"max_steps": 13, "save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 4}
        callbacks = [] if kill is None else [KillAt(kill)]
        if how == "subclass":
            args = zo_arguments(folder, method="lozo-m", **settings, **placing)
            trainer = ZOTrainer(model, args, train_dataset=DATA, callbacks=callbacks)
        else:
            optimizer = LOZO(model, lr=1e-4, seed=3, momentum=0.9, drive="backward", **OPTIONS, **placing)
            args = arguments(folder, **settings)
            trainer = Trainer(model, args, train_dataset=DATA, callbacks=callbacks, optimizers=(optimizer, None))
        if kill is None:
            trainer.train(resume_from_checkpoint=resume)
        else:
            with pytest.raises(Killed):
                trainer.train()
        return model.state_dict(), trainer.state

    whole, whole_state = run(tmp_path / "whole")
    run(tmp_path / "killed", kill=8)
    resumed, state = run(tmp_path / "killed", resume=True)
    assert same(whole, resumed) and not same(whole, tiny_llama().state_dict())
    assert state.global_step == whole_state.global_step == 13
    assert [row.get("loss") for row in state.log_history if "loss" in row][-1] > 0


@pytest.mark.parametrize("how", ["subclass", "stock"])
def test_the_best_model_and_what_is_saved(tmp_path, how, caplog):
    model = tiny_llama()
    settings = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "max_steps": 12,
        "load_best_model_at_end": True,
        "learning_rate": 3e-3,
    }
    if how == "subclass":
        trainer = ZOTrainer(
            model, zo_arguments(tmp_path, placement="probe", **settings), train_dataset=DATA, eval_dataset=DATA[:16]
        )
    else:
        optimizer = LOZO(model, lr=3e-3, drive="backward")
        args = arguments(tmp_path, **settings)
        trainer = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA[:16], optimizers=(optimizer, None))
    trainer.train()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert len(set(losses.values())) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-5)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.state_dict().keys() == tiny_llama().state_dict().keys() and apart(loaded, model) == 0
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text
    ids = DATA[0]["input_ids"][None, :4]
    assert torch.equal(model.generate(ids, max_new_tokens=4), loaded.generate(ids, max_new_tokens=4))


@pytest.mark.parametrize("placing", [{}, {"placement": "probe", "side": "scratch"}], ids=["inplace", "probe"])
@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_half_precision(tmp_path, precision, placing):
    """Against a loop by hand that has the same batches: the same bits."""
    dtype = torch.bfloat16 if precision == "weights" else torch.float32
    model, start, expected = (tiny_llama().to(dtype).train() for _ in range(3))
    recorder = Recorder()
    args = zo_arguments(tmp_path, max_steps=4, learning_rate=1e-2, eps=1e-2, bf16=precision == "autocast", **placing)
    trainer = ZOTrainer(model, args, train_dataset=DATA, data_collator=recorder)
    trainer.train()
    assert trainer.zo_optimizer.info.c.item() != 0 and model.dtype == dtype
    trainer.restore()
    optimizer = LOZO(expected, seed=3, eps=1e-2, drive="backward", **OPTIONS, **placing)
    for step, batch in enumerate(recorder.batches[:4]):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = expected(**batch).loss
        loss.backward()
        optimizer.step()
    optimizer.handle.restore()
    assert same(trained(model), trained(expected)) and not same(trained(model), trained(start))


@pytest.mark.parametrize("method", ["mezo", "mezo-m", "subzero"])
def test_methods(tmp_path, method):
    model = tiny_llama()
    ranked = {"rank": 3} if method == "subzero" else {"rank": None, "interval": None}
    trainer = ZOTrainer(model, zo_arguments(tmp_path, method=method, max_steps=3, **ranked), train_dataset=DATA)
    trainer.train()
    config = trainer.zo_optimizer.handle.config
    assert trainer.zo_optimizer.steps_done == 3 and trainer.zo_optimizer.momentum == (0.9 if method == "mezo-m" else 0)
    assert config.rank == 3 if method == "subzero" else config.estimator == "dense"
    assert all(not torch.equal(p, q) for p, q in zip(trained(model).values(), trained(tiny_llama()).values(), strict=True))


class Accuracy:
    """Share of positions whose most likely token is the label's: piecewise constant in the weights."""

    maximize = True

    def __init__(self):
        self.values, self.training = [], []

    def __call__(self, model, inputs):
        self.training.append(model.training)
        generated = model.generate(inputs["input_ids"][:, :3], max_new_tokens=3, do_sample=False, eos_token_id=None)
        share = (generated == inputs["input_ids"][:, :6]).float().mean()
        self.values.append(share.item())
        return share


@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_an_objective_without_a_gradient(tmp_path, placement):
    objective, model = Accuracy(), tiny_llama(**DROPOUT)
    settings = {"max_steps": 5, "eps": 0.5, "placement": placement, "gradient_accumulation_steps": 2, "logging_steps": 1}
    args = zo_arguments(tmp_path, per_device_train_batch_size=4, **settings)
    ends = []

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(len(objective.values))

    trainer = ZOTrainer(model, args, train_dataset=DATA, compute_objective=objective, callbacks=[Ends()])
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    # An accuracy moves seldom, so that a probe's checks go on before the evaluations of a step.
    of_steps = [objective.values[end - 4 : end] for end in ends]
    values = torch.tensor(of_steps, dtype=torch.float64).view(5, 2, 2)  # steps, micro-batches, sides
    expected = -(values[..., 0] - values[..., 1]).mean(1) / (2 * 0.5)
    assert torch.allclose(torch.tensor([row["projected_gradient"] for row in logs], dtype=torch.float64), expected, atol=1e-7)
    assert expected.any() and logs[0]["loss"] == pytest.approx(-values[0].mean().item(), abs=1e-6)
    assert not any(objective.training) and model.training


def test_an_objective_that_returns_a_number(tmp_path):
    calls = []

    def count(_model, inputs):
        calls.append(len(inputs["input_ids"]))
        return len(calls) % 2

    trainer = ZOTrainer(tiny_llama(), zo_arguments(tmp_path, max_steps=2), train_dataset=DATA, compute_objective=count)
    trainer.train()
    assert calls == [16] * 4 and trainer.zo_optimizer.info.c.item() == pytest.approx(1 / 2e-3)


def test_steps_whose_loss_is_not_finite(tmp_path):
    values = iter([1.0, 1.0, float("nan"), 1.0, 2.0, 1.0])
    model = tiny_llama()
    trainer = ZOTrainer(model, zo_arguments(tmp_path, max_steps=3), train_dataset=DATA, compute_objective=lambda *_: next(values))
    with pytest.warns(UserWarning, match="update skipped"):
        trainer.train()
    assert trainer.state.log_history[-1]["step"] == 3 and int(trainer.zo_optimizer.info.skipped_total) == 1


def test_training_again_and_by_trials(tmp_path):
    model = tiny_llama()
    trainer = ZOTrainer(model, zo_arguments(tmp_path, max_steps=3), train_dataset=DATA)
    trainer.train()
    first = trainer.zo_optimizer
    trainer.train()
    assert trainer.zo_optimizer is first and first.steps_done == 6
    trainer = ZOTrainer(args=zo_arguments(tmp_path, max_steps=3), train_dataset=DATA, model_init=lambda: tiny_llama())
    trainer.train()
    before = trained(trainer.model)
    trainer.train()
    assert trainer.zo_optimizer.steps_done == 3 and same(before, trained(trainer.model))


def adapted(kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]()
    return peft.get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("how", ["subclass", "stock"])
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_adapters_of_peft(tmp_path, kind, how):
    model = adapted(kind)
    before, trainable = trained(model), {n for n, p in model.named_parameters() if p.requires_grad}
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    if how == "subclass":
        args = zo_arguments(tmp_path, method="lozo-m", placement="probe", side="scratch", **settings)
        trainer = ZOTrainer(model, args, train_dataset=DATA)
    else:
        optimizer = LOZO(model, lr=1e-2, drive="backward", seed=3, **OPTIONS)
        trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=DATA, optimizers=(optimizer, None))
    trainer.train()
    after = model.state_dict()
    changed = {n for n, p in trained(model).items() if not torch.equal(p, before[n])}
    assert changed == trainable
    if how == "subclass":
        resumed = adapted(kind)
        again = ZOTrainer(resumed, args, train_dataset=DATA)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert same(after, resumed.state_dict())
    saved = set(torch_load(tmp_path / "checkpoint-8"))
    assert saved and not any("projected_gradient" in key for key in saved)


def torch_load(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
