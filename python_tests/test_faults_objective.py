"""Faults of the objective: what is trained is what the loop differentiates or the closure returns, or one line says why not."""

import collections
import types

import pytest
import torch
from torch import nn
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast

from lozo_kernels import LOZO, MeZO, capture_step, patch
from lozo_kernels.hf import attach
from python_tests.trainer_helpers import arguments, tiny_llama, token_rows, trained


def llama(**changes):
    model = tiny_llama(**changes).train()
    rows = token_rows(4)
    return model, {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def driven(**options):
    model, batch = llama()
    return model, batch, LOZO(model, lr=1e-3, drive="backward", **options)


TERMS = {
    "logits": lambda out: 1000 * out.logits.pow(2).mean(),
    "label smoothing": lambda out: -0.1 * out.logits.log_softmax(-1).mean(),
    "distillation": lambda out: nn.functional.mse_loss(out.logits, out.logits.detach().roll(1, 0)),
    "hidden states": lambda out: out.hidden_states[-1].norm(),
    "by name": lambda out: out["logits"].mean(),
    "as a tuple": lambda out: out.to_tuple()[1].mean(),
    "scaled in place": lambda out: out.logits.div_(2.0).mean(),
}


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_a_term_on_another_output_is_refused(term, alone, placement):
    model, batch, optimizer = driven(placement=placement)
    before = trained(model)
    out = model(**batch, output_hidden_states=True)
    loss = term(out) if alone else out.loss + term(out)
    with pytest.raises(RuntimeError, match=r"only that loss is trained.*attach\(trainer\) or step\(closure\)"):
        loss.backward()
    with pytest.raises(RuntimeError, match="no projected gradient"):  # no step follows from a part of the loss
        optimizer.step()
    after = trained(model)
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    model(**batch).loss.backward()
    optimizer.step()
    assert optimizer.steps_done == 1


def test_what_is_not_differentiated_may_be_looked_at():
    model, batch, optimizer = driven()
    out = model(**batch)
    accuracy = (out.logits.argmax(-1) == batch["labels"]).float().mean()
    entropy = -(out.logits.detach().softmax(-1) * out.logits.detach().log_softmax(-1)).sum(-1).mean()
    (out.loss / 2 + 0.0 * out.logits.sum() + accuracy + entropy).backward()  # a term times 0 is how loops please DDP
    assert torch.isfinite(optimizer.projected_gradient).all()
    optimizer.step()


def test_outputs_of_every_form():
    from lozo_kernels.model.outputs import refuse_gradients

    refused = []

    def refusal(grad):
        refused.append(tuple(grad.shape))
        return RuntimeError("refused")

    Pair = collections.namedtuple("Pair", "first second")
    x, whole = torch.randn(3), torch.tensor([1, 2])
    forms = {
        "tensor": (x, lambda o: o),
        "tuple": ((whole, x), lambda o: o[1]),
        "list in a dict": ({"a": [whole, x]}, lambda o: o["a"][1]),
        "named tuple": (Pair(whole, x), lambda o: o.second),
        "object": (types.SimpleNamespace(loss=whole, aux=x), lambda o: o.aux),
        "output": (CausalLMOutputWithPast(loss=None, logits=x), lambda o: o.logits),
        "structure of torch": (torch.randn(3, 3).max(0), lambda o: o.values),
    }
    for form, (output, find) in forms.items():
        found = refuse_gradients(output, refusal)
        assert type(found) is type(output), form
        assert torch.equal(find(found), find(output)), form
        with pytest.raises(RuntimeError, match="refused"):
            find(found).sum().backward()
        assert not find(output).requires_grad or form in ("tensor", "output"), form
    assert len(refused) == len(forms)
    for output in (whole, (whole, None, "text"), {"a": 1}, x.clone().requires_grad_(True)):
        assert refuse_gradients(output, refusal) is output


def test_inputs_that_require_a_gradient():
    """A prompt that is trained by another optimiser would never learn."""
    model, batch, _ = driven()
    prompt = torch.randn(4, 9, 24, requires_grad=True)
    with pytest.raises(TypeError, match="input of the driven model requires a gradient"):
        model(inputs_embeds=prompt, labels=batch["labels"])
    with pytest.raises(TypeError, match="input of the driven model requires a gradient"):
        model(batch["input_ids"], None, None, [(prompt, prompt)])
    model(inputs_embeds=prompt.detach(), labels=batch["labels"]).loss.backward()


REGULARISERS = {
    "squares": lambda model: sum(p.pow(2).sum() for p in model.parameters()),
    "norms": lambda model: sum(p.norm() for p in model.parameters()),
    "of what requires a gradient": lambda model: sum(p.abs().sum() for p in model.parameters() if p.requires_grad),
    "of a vector": lambda model: nn.utils.parameters_to_vector(model.parameters()).square().sum(),
}


@pytest.mark.parametrize("term", REGULARISERS.values(), ids=REGULARISERS)
def test_a_loss_term_over_all_parameters(term):
    model, batch, _ = driven()
    value = term(model)  # which may be looked at
    assert float(value.detach()) > 0 or term is REGULARISERS["of what requires a gradient"]
    with pytest.raises(RuntimeError, match=r"trains nothing.*weight_decay, or step\(closure\)"):
        (model(**batch).loss + 0.01 * value).backward()


@pytest.mark.parametrize("layer", ["", "model.layers.0", "model.layers.1.mlp.up_proj", "model", "lm_head"])
@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_a_term_on_what_a_hook_keeps(layer, placement):
    """Distillation from inner layers: what a hook sees is as constant as the other outputs."""
    model, batch = llama()
    kept = []

    def keep(module, args, out):
        kept.append(out if isinstance(out, torch.Tensor) else out["logits"] if "logits" in out else out[0])

    model.get_submodule(layer).register_forward_hook(keep)
    optimizer = LOZO(model, drive="backward", placement=placement)
    out = model(**batch)
    with pytest.raises(RuntimeError, match="only that loss is trained"):
        (out.loss + kept[-1].square().mean()).backward()
    out = model(**batch)
    out.loss.backward()
    optimizer.step()
    optimizer.handle.restore()
    kept.clear()
    (model(**batch).loss + kept[-1].square().mean()).backward()


class Smoothing(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        out = model(**inputs)
        loss = out.loss + 0.1 * out.logits.float().pow(2).mean()
        return (loss, out) if return_outputs else loss


def test_an_own_compute_loss_is_refused_and_attached(tmp_path):
    model, _ = llama()
    settings = arguments(tmp_path, max_steps=2, per_device_train_batch_size=4)
    stock = Smoothing(model, settings, train_dataset=token_rows(8), optimizers=(LOZO(model, drive="backward"), None))
    with pytest.raises(RuntimeError, match="only that loss is trained"):
        stock.train()
    model, batch = llama()
    trainer = Smoothing(model, settings, train_dataset=token_rows(8))
    attachment = attach(trainer, rank=2)
    trainer.train()
    with torch.no_grad():  # what was minimised is the whole loss
        whole = trainer.compute_loss(model, dict(batch)).item()
    assert whole > model(**batch).loss.item() and attachment.optimizer.steps_done == 2


# ------------------------------------------------------------------------------------------------ closures that return a pair


def classifier(placement="inplace", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(10, 6), torch.randint(3, (10,))
    return model, x, y, LOZO(model, lr=1e-2, eps=1e-2, placement=placement, **options)


SECOND = {
    "accuracy": lambda logits, y: (logits.argmax(1) == y).float().mean() * 0.9,
    "accuracy as a number": lambda logits, y: float((logits.argmax(1) == y).float().mean()) * 0.9,
    "learning rate": lambda logits, y: 1e-3,
    "entropy": lambda logits, y: torch.distributions.Categorical(logits=logits).entropy().mean(),
    "none right": lambda logits, y: (logits.argmin(1) != logits.argmin(1)).sum(),
    "a negative number": lambda logits, y: -2,
    "perplexity": lambda logits, y: nn.functional.cross_entropy(logits, y).exp().double(),
}


@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
@pytest.mark.parametrize("placement", ["inplace", "probe"])
@pytest.mark.parametrize("options", [{}, {"two_sided": False}, {"fuse_steps": True}], ids=str)
def test_a_loss_and_a_figure_are_no_quotient(second, placement, options):
    if placement == "probe" and "fuse_steps" in options:
        options = {"directions": 2}
    model, x, y, optimizer = classifier(placement, **options)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"of a closure that returns two values the quotient is minimised.*return the loss alone"):
        optimizer.step(lambda: (nn.functional.cross_entropy(model(x), y), second(model(x), y)))
    assert optimizer.steps_done == 0
    assert all(torch.allclose(p, b, atol=1e-6) for p, b in zip(model.parameters(), before, strict=True))


def test_a_number_of_right_answers_is_refused_when_it_changes():
    _, x, y, optimizer = classifier()
    answers = iter([5, 5, 5, 6])
    optimizer.step(lambda: (nn.functional.cross_entropy(optimizer.handle.model(x), y), next(answers)))
    with pytest.raises(ValueError, match="same at all evaluations of a step, and here it was 6"):
        optimizer.step(lambda: (nn.functional.cross_entropy(optimizer.handle.model(x), y), next(answers)))


def test_micro_batches_have_weights_of_their_own():
    model, x, y, optimizer = classifier()

    def part(rows):
        return lambda: (nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum"), len(y[rows]))

    optimizer.step([part(slice(0, 4)), part(slice(4, 10))])
    assert optimizer.steps_done == 1


@pytest.mark.parametrize("placement", ["inplace", "probe"])
@pytest.mark.parametrize(
    "count", [int, float, torch.tensor, lambda n: torch.tensor(float(n))], ids=["int", "float", "ints", "floats"]
)
def test_a_sum_and_its_count_are_the_mean(placement, count):
    found = []
    for pair in (True, False):
        model, x, y, optimizer = classifier(placement)

        def closure(model=model, x=x, y=y, pair=pair):
            total = nn.functional.cross_entropy(model(x), y, reduction="sum")
            return (total, count(len(y))) if pair else total / len(y)

        for _ in range(3):
            optimizer.step(closure)
        found.append(optimizer.info.loss)
    assert torch.allclose(*found, atol=1e-6)


def test_a_batch_in_which_nothing_counts_is_skipped():
    _, _, _, optimizer = classifier()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(lambda: (torch.tensor(0.0), 0))
    assert bool(optimizer.info.skipped)


def test_sums_and_weights_of_examples():
    """In one forward pass or in several: (sums, weights) of the examples train, a loss and a rightness of each do not."""
    for evaluation in ("batched", "sequential"):
        model, x, y, optimizer = classifier("probe", evaluation=evaluation)

        def good(rows, model=model, y=y):
            return nn.functional.cross_entropy(model(rows), y.repeat(len(rows) // len(y)), reduction="none"), torch.ones(len(rows))

        def bad(rows, model=model, y=y):
            logits = model(rows)
            right = (logits.argmax(1) == logits.argmin(1)).float() + 0.5
            return nn.functional.cross_entropy(logits, y.repeat(len(rows) // len(y)), reduction="none"), right

        with pytest.raises(ValueError, match="the quotient is minimised"):
            optimizer.step(bad, x)
        optimizer.step(good, x)
        assert optimizer.steps_done == 1


def test_weights_that_differ_between_evaluations_of_one_pass():
    model, x, y, optimizer = classifier("probe", evaluation="batched")
    optimizer.step(lambda rows: (model(rows).square().sum(1), torch.ones(len(rows))), x)

    def drifting(rows):
        return model(rows).square().sum(1), torch.arange(len(rows)) // len(y) + 1

    with pytest.raises(ValueError, match="the quotient is minimised"):
        optimizer.step(drifting, x)


def test_in_a_captured_step():
    model, x, y, optimizer = classifier()
    with pytest.raises(ValueError, match="the quotient is minimised"):
        capture_step(optimizer, lambda: (nn.functional.cross_entropy(model(x), y), 0.5))


def test_in_a_loss_that_drives():
    model, x, y = classifier()[:3]
    handle = patch(nn.Sequential(*model), estimator="dense", drive="loss")
    optimizer = MeZO(handle)
    with pytest.raises(ValueError, match="the quotient is minimised"):
        handle.backward.project(lambda: (nn.functional.cross_entropy(model(x), y), 0.25))
    assert optimizer.steps_done == 0
