"""Faults of calls from Python: what was meant is named, whichever way a loop or a user of torch would write it."""

import importlib
import sys
import tempfile
import warnings

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import HfArgumentParser, PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lozo_kernels import LOZO, MeZO, SubZero, handle_of, patch
from lozo_kernels.errors import InputError, require
from lozo_kernels.hf import ZOArguments, ZOTrainer, attach
from python_tests.trainer_helpers import arguments, tiny_llama, token_rows, zo_arguments


def make():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


WRONG = {
    "parameters": lambda m: m.parameters(),
    "a list of them": lambda m: list(m.parameters()),
    "named": lambda m: m.named_parameters(),
    "groups": lambda m: [{"params": list(m.parameters()), "lr": 1e-3}],
    "a parameter": lambda m: m[0].weight,
    "weights": lambda m: m.state_dict(),
}


@pytest.mark.parametrize("kind", [LOZO, MeZO, SubZero])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_parameters_in_place_of_the_model(kind, wrong):
    model = make()
    with pytest.raises(TypeError, match=rf"^{kind.__name__}\(model, lr=\.\.\.\) takes the model.*finds the parameters by itself"):
        kind(wrong(model), lr=1e-3, betas=(0.9, 0.99))
    with pytest.raises(TypeError, match=r"^patch\(\) takes the model.*finds the parameters by itself"):
        patch(wrong(model))
    assert handle_of(model) is None


@pytest.mark.parametrize("wrong", ["gpt2", None, 1, object()])
def test_something_else_in_place_of_the_model(wrong):
    with pytest.raises(TypeError, match=rf"takes the model, a torch\.nn\.Module, not {type(wrong).__name__}$"):
        LOZO(wrong)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("rnak", "rank"), ("epsilon", "eps"), ("plaement", "placement"), ("momentom", "momentum"), ("step_interval", "interval")],
)
def test_mistyped_options_are_suggested(tmp_path, given, meant):
    model = tiny_llama()
    calls = [
        lambda: LOZO(model, **{given: 2}),
        lambda: attach(Trainer(model, arguments(tmp_path)), **{given: 2}),
        lambda: zo_arguments(tmp_path, **{given: 2}),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{given}'; did you mean {meant}\?"):
            call()
    assert handle_of(model) is None


def test_names_of_other_optimisers_are_known():
    for given, meant in (
        ("learning_rate", "lr"),
        ("betas", "momentum"),
        ("zo_eps", "eps"),
        ("gauss_rank", "rank"),
        ("q", "directions"),
    ):
        with pytest.raises(TypeError, match=f"did you mean {meant}"):
            SubZero(make(), **{given: 1})
    with pytest.raises(TypeError, match=r"argument 'learning_rate'$"):
        patch(make(), learning_rate=1)  # which has none


def test_options_that_attach_takes_itself(tmp_path):
    for name in ("drive", "params", "estimator", "target"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument {name!r}"):
            attach(Trainer(tiny_llama(), arguments(tmp_path)), **{name: "backward"})


def test_arguments_are_still_those_of_a_dataclass(tmp_path):
    (args,) = HfArgumentParser(ZOArguments).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--rank", "3"])
    assert args.rank == 3 and ZOArguments(str(tmp_path), rank=4).rank == 4
    with pytest.raises(TypeError, match="did you mean learning_rate"):
        ZOArguments(str(tmp_path), lerning_rate=1e-6)


# ------------------------------------------------------------------------------------------------------------ groups and schedulers


@pytest.mark.parametrize("setting", ["momentum", "eps", "rank", "interval", "directions"])
def test_settings_that_a_group_cannot_have(setting):
    model = make()
    with pytest.raises(ValueError, match=f"{setting} is the same for all parameter groups"):
        LOZO(model, [{"params": model.parameters(), setting: 1}])
    assert handle_of(model) is None


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)


def cyclic(optimizer):
    return torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=1e-5, max_lr=1e-3)


class Own(torch.optim.lr_scheduler.LambdaLR):
    def step(self, epoch=None):
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.5


@pytest.mark.parametrize("scheduler", [one_cycle, cyclic, lambda o: Own(o, lambda _: 1.0)], ids=["one cycle", "cyclic", "own"])
@pytest.mark.parametrize("drive", ["closure", "backward"])
def test_schedulers_that_change_the_momentum(scheduler, drive):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make()

        def forward(self):
            return self.model(torch.ones(3, 4)).square().mean()

    model = Loss().train()
    optimizer = LOZO(model, lr=1e-3, momentum=0.9, drive=drive)
    scheduler(optimizer)
    if drive == "backward":
        model().backward()
    with pytest.raises(ValueError, match=r"momentum stays the same during a run.*cycle_momentum=False"):
        optimizer.step(None if drive == "backward" else model)
    assert optimizer.steps_done == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_schedulers_of_the_learning_rate_alone(momentum):
    model = make()
    optimizer = LOZO(model, lr=1e-3, momentum=momentum)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10, cycle_momentum=False)
    for _ in range(3):
        optimizer.step(lambda: model(torch.ones(3, 4)).square().mean())
        schedule.step()
    state = optimizer.state_dict()
    assert all("momentum" not in group for group in state["param_groups"])
    again = LOZO(make(), lr=1e-3, momentum=momentum)
    again.load_state_dict(state)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


# ----------------------------------------------------------------------------------------------------------------- missing packages


@pytest.mark.parametrize("package", ["transformers", "datasets", "peft", "matplotlib", "safetensors.torch", "PIL.Image"])
def test_a_missing_package_is_an_import_error(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"this needs the package '{package}': pip install '") as raised:
        require(package)
    assert isinstance(raised.value, InputError) and raised.value.name == package
    assert "lozo_kernels[" not in str(raised.value)  # which no index has
    assert ("pillow" if package == "PIL.Image" else package.split(".")[0]) in str(raised.value).partition("pip install")[2]


def test_the_trainer_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "lozo_kernels.hf.trainer.arguments")
    with pytest.raises(ImportError, match=r"'accelerate': pip install 'accelerate"):
        importlib.import_module("lozo_kernels.hf.trainer.arguments")


# ------------------------------------------------------------------------------------------------------------------TRL's trainers


def tokenizer():
    words = ["<unk>", "<s>", "</s>", *"abcdefgh"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def trl(kind, folder, drive=False, **settings):
    """A trainer of TRL with its own defaults, among them gradient checkpointing."""
    model = tiny_llama()
    model.save_pretrained(folder)  # from where DPO loads its reference
    model.config._name_or_path = str(folder)
    optimizers = (LOZO(model, lr=1e-4, drive="backward") if drive else None, None)
    common = {
        "output_dir": str(folder),
        "report_to": [],
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    if kind is SFTTrainer:
        data = Dataset.from_dict({"text": ["a b c d", "e f g h", "a c e g"] * 2})
        return SFTTrainer(model, SFTConfig(**common), train_dataset=data, processing_class=tokenizer(), optimizers=optimizers)
    data = Dataset.from_dict({"prompt": ["a b"] * 6, "chosen": ["c d"] * 6, "rejected": ["e"] * 6})
    return DPOTrainer(model, args=DPOConfig(**common), train_dataset=data, processing_class=tokenizer(), optimizers=optimizers)


@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer])
def test_trl_with_a_drive(tmp_path, kind):
    """Their losses are computed outside of the model."""
    trainer = trl(kind, tmp_path, drive=True)
    with pytest.warns(UserWarning, match="checkpointing was switched off"), pytest.raises(RuntimeError, match=r"attach\(trainer\)"):
        trainer.train()


@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer])
def test_trl_attached_with_its_own_defaults(tmp_path, kind):
    trainer = trl(kind, tmp_path)
    assert trainer.args.gradient_checkpointing
    before = trainer.model.lm_head.weight.clone()
    with pytest.warns(UserWarning, match="checkpointing was switched off: it spares what a backward pass needs"):
        attachment = attach(trainer, rank=2, lr=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was switched off.*")
        trainer.train()
    assert attachment.optimizer.steps_done == 2 and not trainer.args.gradient_checkpointing
    assert not trainer.model.is_activation_checkpointing
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_checkpointing_is_switched_off_in_every_way_in(tmp_path):
    with pytest.warns(UserWarning, match="checkpointing was switched off"):
        args = zo_arguments(tmp_path, gradient_checkpointing=True, max_steps=1)
    trainer = ZOTrainer(tiny_llama(), args, train_dataset=token_rows(16))
    trainer.train()
    model = tiny_llama()
    model.gradient_checkpointing_enable()  # on the model, where no setting tells
    trainer = Trainer(model, arguments(tempfile.mkdtemp(dir=tmp_path), max_steps=1), train_dataset=token_rows(16))
    attach(trainer)
    with pytest.warns(UserWarning, match="checkpointing was switched off"):
        trainer.train()
    assert not model.is_activation_checkpointing
