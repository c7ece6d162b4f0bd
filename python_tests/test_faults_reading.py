"""Weights that others read or write between steps, and forwards that write weights: right, or refused by name."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from transformers import LlamaConfig, LlamaForCausalLM, RwkvConfig, RwkvForCausalLM

from lozo_kernels import LOZO, MeZO

PLACEMENTS = [{}, {"fuse_steps": True}, {"placement": "probe"}, {"placement": "probe", "side": "scratch"}]
BEHIND = [{"fuse_steps": True}, {"placement": "probe"}, {"placement": "probe", "side": "copy", "momentum": 0.9}]


def make():
    return nn.Sequential(nn.Embedding(13, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 13))


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def start(options, kind=LOZO, steps=3, model=None, lr=1e-2):
    model, tokens = model or make(), torch.randint(13, (3, 5))
    optimizer = kind(model, lr=lr, eps=1e-2, rank=2, interval=50, **options)
    for _ in range(steps):
        optimizer.step(lambda: loss_of(model, tokens))
    return model, optimizer, tokens


def as_vector(model):
    return torch.cat([p.detach().clone().view(-1) for p in model.parameters()])


def by_clones(model):
    return torch.cat([p.detach().view(-1).clone() for _, p in model.named_parameters()])


def by_parts(model):
    return torch.cat([p.detach().view(-1).clone() for part in model for p in part.parameters()])


def by_a_wrapper(model):
    return by_clones(nn.ModuleDict({"inner": model}))


@pytest.mark.parametrize("read", [as_vector, by_clones, by_parts, by_a_wrapper, lambda m: parameters_to_vector(m.parameters())])
@pytest.mark.parametrize("kind", [LOZO, MeZO])
@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_parameters_are_up_to_date_when_they_are_read(options, kind, read):
    model, optimizer, _ = start(options, kind)
    got = read(model)
    expected = torch.cat([p.flatten() for p in model.state_dict().values()])
    assert torch.equal(got, expected)
    assert not optimizer.handle.probes or not optimizer.handle.probed.learned


@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_a_restored_snapshot_is_what_training_goes_on_from(options):
    model, optimizer, tokens = start(options, lr=1e-3)
    snapshot = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.step(lambda: loss_of(model, tokens))
    with torch.no_grad():
        for p, old in zip(model.parameters(), snapshot, strict=True):
            p.copy_(old)
    optimizer.step(lambda: loss_of(model, tokens))
    optimizer.param_groups[0]["lr"] = 0.0
    distance = max(float((p - old).abs().max()) for p, old in zip(model.parameters(), snapshot, strict=True))
    assert 0 < distance < 1
    for p, old in zip(model.parameters(), snapshot, strict=True):
        p.data.copy_(old)
    optimizer.step(lambda: loss_of(model, tokens))
    assert all(torch.allclose(p, old, atol=1e-5) for p, old in zip(model.parameters(), snapshot, strict=True))


@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_clamps_and_masks_hold(options):
    model, optimizer, tokens = start(options, lr=0.1)
    for _ in range(3):
        optimizer.step(lambda: loss_of(model, tokens))
        for p in model.parameters():
            p.data.clamp_(-0.1, 0.1)
    optimizer.flush()
    assert all(p.abs().max() <= 0.1 for p in model.parameters())
    vector_to_parameters(torch.zeros(sum(p.numel() for p in model.parameters())), model.parameters())
    assert not any(p.any() for p in model.parameters())


@pytest.mark.parametrize("options", BEHIND, ids=str)
def test_a_weight_that_is_changed_by_its_name_while_it_is_behind(options):
    model, optimizer, tokens = start(options)
    with torch.no_grad():
        model[1].weight.clamp_(-0.1, 0.1)
    with pytest.raises(RuntimeError, match=r"'1\.weight' was changed.*(merge\(\)|flush\(\))"):
        optimizer.step(lambda: loss_of(model, tokens))
    optimizer.step(lambda: loss_of(model, tokens))
    optimizer.flush()
    optimizer.handle.merge()
    with torch.no_grad():
        model[1].weight.zero_()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(lambda: loss_of(model, tokens))
    optimizer.flush()
    assert model[1].weight.abs().max() < 1e-6


@pytest.mark.parametrize("options", BEHIND, ids=str)
def test_looking_at_parameters_changes_nothing(options):
    """Optimisers, clipping and zero_grad go through parameters at every step; a merge for each would round for each."""

    def run(look):
        torch.manual_seed(2)
        model, optimizer, tokens = start(options, model=make().bfloat16())
        for _ in range(3):
            if look:
                model.zero_grad()
                clip_grad_norm_(model.parameters(), 1.0)
                torch.optim.SGD(model.parameters(), lr=0.1)
                list(model.named_modules()), list(model.named_buffers())
            optimizer.step(lambda: loss_of(model, tokens))
        return model.state_dict()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        one, two = run(True), run(False)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_reading_again_and_again_says_so():
    model, optimizer, tokens = start({"placement": "probe"})
    with pytest.warns(UserWarning, match=r"test_faults_reading\.py, line \d+, goes through the model's parameters again and again"):
        for _ in range(12):
            next(model.parameters()).device  # noqa: B018
            optimizer.step(lambda: loss_of(model, tokens))


def tiny_llama():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31}
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter", "save_pretrained"])
@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_peft_merges_what_was_learned(options, way, tmp_path):
    base, tokens = tiny_llama(), torch.randint(31, (2, 6))
    weights = {name: p.clone() for name, p in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)).eval()
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, interval=50, **options)
    untouched = model(input_ids=tokens).logits
    for _ in range(4):
        optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    expected = model(input_ids=tokens).logits
    if "side" not in options or way != "save_pretrained":
        optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)  # so that something is pending again
        again = LOZO_at(model, optimizer, tokens)
        expected = again
    if way == "merge_and_unload":
        merged = model.merge_and_unload()
    elif way == "merge_adapter":
        model.merge_adapter()
        merged = model
    else:
        model.save_pretrained(tmp_path)
        other = tiny_llama()
        other.load_state_dict(weights)
        merged = PeftModel.from_pretrained(other, tmp_path).eval()
    got = merged(input_ids=tokens).logits
    assert torch.allclose(got, expected, atol=1e-4) and not torch.allclose(got, untouched, atol=1e-3)
    if way == "merge_adapter":
        with pytest.raises(RuntimeError, match="merged into its layer"):
            optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)


def LOZO_at(model, optimizer, tokens):
    """What the model computes after its pending update, without making it."""
    stepper = optimizer.stepper
    if stepper.pending is None:
        return model(input_ids=tokens).logits
    twin = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()
    pending = stepper.pending, stepper.applied
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert pending is not None
    twin.load_state_dict(state, strict=False)
    return twin(input_ids=tokens).logits


@pytest.mark.parametrize("kind", [LOZO, MeZO])
@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_an_embedding_that_renormalises_its_rows(options, kind):
    model = nn.Sequential(nn.Embedding(13, 16, max_norm=1.0), nn.Linear(16, 13))
    tokens = torch.randint(13, (3, 5))
    model(tokens)
    optimizer = kind(model, lr=0.0, eps=0.1, **options)
    with pytest.raises(RuntimeError, match=r"'0\.weight' was changed.*(exclude|only reads)"):
        for _ in range(2):
            optimizer.step(lambda: loss_of(model, tokens))
    optimizer.handle.restore()
    optimizer = kind(model, lr=0.0, eps=0.1, exclude=["0.weight"], **options)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.step(lambda: loss_of(model, tokens))
    optimizer.flush()
    assert all(torch.allclose(p, old, atol=1e-5) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("options", [{}, {"fuse_steps": True}, {"placement": "probe"}], ids=str)
def test_a_model_that_rescales_its_weights_when_its_mode_changes(options):
    """RWKV halves some weights in its first forward in eval mode, and doubles them in the first one in train mode."""
    config = RwkvConfig(vocab_size=31, hidden_size=16, attention_hidden_size=16, num_hidden_layers=4, rescale_every=2)
    model, tokens = RwkvForCausalLM(config), torch.randint(31, (2, 6))
    model.train()
    optimizer = LOZO(model, lr=0.0, eps=1e-3, **options)

    def loss():
        return model(input_ids=tokens, labels=tokens).loss

    with torch.no_grad():
        loss()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer.step(loss)
    model.eval()
    with pytest.raises(RuntimeError, match="changed"):
        optimizer.step(loss)
    optimizer.handle.merge()
    model.train()
    with torch.no_grad():
        loss()
    optimizer.step(loss)
    for name, p in model.state_dict().items():
        assert torch.allclose(p, before[name], atol=0.05), name


@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_a_closure_that_changes_weights(options):
    model, optimizer, tokens = start(options)

    def closure():
        with torch.no_grad():
            model[4].bias.add_(0.1)
        return loss_of(model, tokens)

    with pytest.raises(RuntimeError, match=r"'4\.bias' was changed"):
        optimizer.step(closure)
