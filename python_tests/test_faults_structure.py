"""Models that change after they were patched: noticed at the next step, by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lozo_kernels import LOZO, MeZO, patch

PLACEMENTS = [{}, {"fuse_steps": True}, {"placement": "probe"}]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.body = nn.Sequential(nn.Linear(16, 16, bias=False), nn.GELU(), nn.LayerNorm(16))
        self.head = nn.Linear(16, 13)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def wrap_head(model):
    model.head = nn.Sequential(model.head, nn.Identity())


def replace_head(model):
    model.head = nn.Linear(16, 13)


def append_layer(model):
    model.body.append(nn.Linear(16, 16))


def untie(model):
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())


def freeze(model):
    model.body[0].weight.requires_grad_(False)


def freeze_a_part(model):
    model.body.requires_grad_(False)


def add_bias(model):
    model.body[0].bias = nn.Parameter(torch.zeros(16))


def add_parameter(model):
    model.body.register_parameter("gate", nn.Parameter(torch.zeros(1)))


def remove_layer(model):
    del model.body[2]


CHANGES = [
    (wrap_head, "module 'head' was replaced"),
    (replace_head, "module 'head' was replaced"),
    (append_layer, r"parameter 'body\.3\.weight' was added"),
    (untie, r"parameter 'head\.weight' was untied"),
    (freeze, r"parameter 'body\.0\.weight' was frozen"),
    (freeze_a_part, r"parameter 'body\.0\.weight' was frozen"),
    (add_bias, r"parameter 'body\.0\.bias' was added"),
    (add_parameter, r"parameter 'body\.gate' was added"),
    (remove_layer, r"module 'body\.2' was removed"),
]


@pytest.mark.parametrize("kind", [LOZO, MeZO])
@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_a_change_is_noticed_at_the_next_step(options, change, message, kind):
    model, tokens = Net(), torch.randint(13, (3, 5))
    optimizer = kind(model, lr=1e-2, eps=1e-2, **options)
    optimizer.step(lambda: loss_of(model, tokens))
    optimizer.flush()
    before = [(p, p.detach().clone()) for p in model.parameters()]
    change(model)
    with pytest.raises(RuntimeError, match=message) as error:
        optimizer.step(lambda: loss_of(model, tokens))
    assert "patch" in str(error.value)
    assert all(torch.equal(p, old) for p, old in before)  # no weight was touched


@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_a_change_before_the_first_step(options):
    model, tokens = Net(), torch.randint(13, (3, 5))
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, **options)
    replace_head(model)
    with pytest.raises(RuntimeError, match="'head' was replaced"):
        optimizer.step(lambda: loss_of(model, tokens))
    optimizer.handle.restore()
    LOZO(model, **options).step(lambda: loss_of(model, tokens))


@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_unfreezing_in_mid_run(options):
    model, tokens = Net(), torch.randint(13, (3, 5))
    freeze(model)
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, **options)
    optimizer.step(lambda: loss_of(model, tokens))
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'body\.0\.weight' requires a gradient since patching, but it is not trained"):
        optimizer.step(lambda: loss_of(model, tokens))


@pytest.mark.parametrize("options", [{}, {"fuse_steps": True}], ids=str)
def test_changes_that_concern_no_weight(options):
    """In place, a module without parameters may be another; so may one that was excluded be frozen or not."""
    model, tokens = Net(), torch.randint(13, (3, 5))
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, exclude=["body.2.*"], **options)
    optimizer.step(lambda: loss_of(model, tokens))
    model.body[1] = nn.ReLU()
    model.body.append(nn.Dropout(0.0))
    model.body[2].requires_grad_(False)
    optimizer.step(lambda: loss_of(model, tokens))
    model.body[2].requires_grad_(True)
    model.double().float()
    optimizer.step(lambda: loss_of(model, tokens))


def tiny_llama():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31}
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_adapters_that_come_after_the_optimiser(options):
    model, tokens = tiny_llama(), torch.randint(31, (2, 6))
    optimizer = LOZO(model, **options)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with pytest.raises(RuntimeError, match=r"q_proj' was replaced after patching.*build the optimiser after"):
        optimizer.step(lambda: adapted(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_a_second_adapter_or_resized_embeddings(options):
    model, tokens = tiny_llama(), torch.randint(31, (2, 6))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    optimizer = LOZO(adapted, lr=1e-3, **options)
    optimizer.step(lambda: adapted(input_ids=tokens, labels=tokens).loss)
    adapted.add_adapter("second", LoraConfig(target_modules=["q_proj"], r=2))
    adapted.set_adapter("second")
    with pytest.raises(RuntimeError, match=r"q_proj\.lora_.*(added|frozen)|'.*lora_A\.default.*frozen"):
        optimizer.step(lambda: adapted(input_ids=tokens, labels=tokens).loss)
    model = tiny_llama()
    optimizer = LOZO(model, lr=1e-3, **options)
    optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    model.resize_token_embeddings(40)
    with pytest.raises((RuntimeError, ValueError), match=r"embed_tokens|lm_head"):
        optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_a_driven_model(placement):
    model, tokens = Net(), torch.randint(13, (3, 5))
    model.forward = lambda tokens: loss_of_output(Net.forward(model, tokens), tokens)
    optimizer = LOZO(patch(model, drive="backward", placement=placement), lr=1e-2, eps=1e-2)
    for _ in range(2):
        model(tokens).backward()
        optimizer.step()
    append_layer(model)
    with pytest.raises(RuntimeError, match=r"'body\.3\.weight' was added"):
        model(tokens).backward()


def loss_of_output(logits, tokens):
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
