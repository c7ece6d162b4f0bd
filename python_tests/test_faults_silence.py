"""Runs that learn nothing say so, once, with the likely cause: F(+) and F(-) that are equal in every bit, step after step."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import Trainer

from lozo_kernels import LOZO, MeZO, SubZero, capture_step
from lozo_kernels.hf import attach
from python_tests.trainer_helpers import arguments, tiny_llama, token_rows

ELSEWHERE = "does not depend on the trained weights"


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)


def loss_of(model, data):
    return nn.functional.cross_entropy(model(data[0]), data[1])


def warned(run, steps):
    """The warnings of a run about steps in which nothing was learned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            run()
    return [str(w.message) for w in caught if "nothing was learned" in str(w.message)]


@pytest.mark.parametrize("options", [{}, {"directions": 3}, {"two_sided": False}, {"fuse_steps": True}, {"momentum": 0.9}], ids=str)
@pytest.mark.parametrize("kind", [LOZO, MeZO, SubZero])
def test_a_closure_of_another_model(kind, options):
    model = make()
    other, data = copy.deepcopy(model), batch()
    optimizer = kind(model, lr=1e-2, **options)
    said = warned(lambda: optimizer.step(lambda: loss_of(other, data)), 30)
    assert len(said) == 1 and ELSEWHERE in said[0] and "copy" in said[0]


def test_a_result_that_was_kept_under_a_drive():
    model, data = make(), batch()

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.kept = model, None

        def forward(self):
            self.kept = loss_of(self.model, data) if self.kept is None else self.kept
            return self.kept.clone()

    keeping = Keeping().train()
    optimizer = LOZO(keeping, drive="backward")

    def step():
        keeping().backward()
        optimizer.step()

    said = warned(step, 30)
    assert len(said) == 1 and ELSEWHERE in said[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_a_loss_in_half_precision(dtype, placement):
    model, data = make(), batch()
    optimizer = LOZO(model, lr=1e-4, eps=1e-5, placement=placement)
    said = warned(lambda: optimizer.step(lambda: loss_of(model, data).to(dtype)), 20)
    name = str(dtype).removeprefix("torch.")
    assert len(said) == 1 and "compute it in fp32" in said[0] and (name in said[0] or "bfloat16" in said[0])
    model = make()
    optimizer = LOZO(model, lr=1e-4, eps=1e-5, placement=placement)
    assert not warned(lambda: optimizer.step(lambda: loss_of(model, data)), 20)


def test_a_model_of_transformers_in_bf16():
    """Its own loss is made in fp32, one's own from its logits is not."""
    model = tiny_llama().to(torch.bfloat16)
    rows = token_rows(4)
    data = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    optimizer = LOZO(model, lr=1e-6, eps=1e-3, placement="probe")
    assert not warned(lambda: optimizer.step(lambda: model(**data).loss), 20)

    def own():
        logits = model(input_ids=data["input_ids"]).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten())

    optimizer.eps = 1e-4
    said = warned(lambda: optimizer.step(own), 30)
    assert len(said) == 1 and "bfloat16" in said[0] and "logits.float()" in said[0]


def test_an_epsilon_that_weights_cannot_hold():
    model = make(torch.bfloat16)
    optimizer = LOZO(model, eps=1e-9)
    said = warned(lambda: optimizer.step(lambda: sum(p.float().square().sum() for p in model.parameters()) / 7), 20)
    assert len(said) == 1 and "eps=1e-09 is lost in the rounding of bfloat16: raise eps" in said[0]


def test_an_accuracy():
    model, data = make(), batch()
    optimizer = LOZO(model, eps=1e-6)
    said = warned(lambda: optimizer.step(lambda: (model(data[0]).argmax(1) == data[1]).float().mean() + 0.5), 20)
    assert len(said) == 1 and "an accuracy needs larger batches" in said[0]


def test_an_attached_trainer(tmp_path):
    model = tiny_llama()
    other = copy.deepcopy(model)

    class Wrong(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            out = other(**inputs)
            return (out.loss, out) if return_outputs else out.loss

    trainer = Wrong(model, arguments(tmp_path, max_steps=12, per_device_train_batch_size=2), train_dataset=token_rows(8))
    attach(trainer)
    assert len(warned(trainer.train, 1)) == 1


def test_a_captured_step():
    model, data = make(), batch()
    other = copy.deepcopy(model)
    assert len(warned(capture_step(LOZO(model), lambda: loss_of(other, data)), 30)) == 1
    optimizer = LOZO(other)
    step = capture_step(optimizer, lambda: loss_of(other, data))
    assert not warned(step, 20) and int(optimizer.info.flat) == 0


@pytest.mark.parametrize("period", [2, 3])
def test_steps_that_now_and_then_see_nothing(period):
    """Every second evaluation of an accuracy may be flat, which is no fault."""
    model, data = make(), batch()
    optimizer = LOZO(model)
    counter = iter(range(1000))

    def step():
        flat = next(counter) % period == 0
        optimizer.step(lambda: torch.tensor(1.5) if flat else loss_of(model, data))

    assert not warned(step, 40) and int(optimizer.info.flat) <= 1


def test_losses_that_are_not_finite_are_another_matter():
    model = make()
    optimizer = LOZO(model, max_nonfinite=50)
    assert not warned(lambda: optimizer.step(lambda: torch.tensor(float("nan"))), 20)
    assert int(optimizer.info.flat) == 0
