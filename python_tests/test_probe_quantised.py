"""Probes of models whose linear layers are quantised: the base stays as it is, and what is learned stays in factors."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, export_lora, patch
from lozo_kernels.model.parameters import is_quantised
from python_tests.test_probe_lora import load, shifted
from python_tests.test_probe_offload import closure, llama

pytest.importorskip("transformers")


def torchao_int8(layer):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


def torchao_int4(layer):
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(8))
    quantization.quantize_(layer, config)
    return layer


def bitsandbytes_int8(layer):
    """Its layers quantise activations too."""
    made = _bitsandbytes("Linear8bitLt", layer, has_fp16_weights=False)
    with torch.no_grad():
        made(torch.zeros(1, layer.in_features))  # on the CPU it quantises in its first forward
    return made


def bitsandbytes_nf4(layer):
    return _bitsandbytes("Linear4bit", layer, quant_type="nf4", compute_dtype=torch.float32)


def _bitsandbytes(name, layer, **options):
    modules = pytest.importorskip("bitsandbytes").nn
    made = getattr(modules, name)(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


KINDS = (torchao_int8, torchao_int4, bitsandbytes_int8, bitsandbytes_nf4)


def quantise(model, kind):
    """All linear layers but the head."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, kind(child))
    return model


def make(kind=torchao_int8):
    torch.manual_seed(3)
    return quantise(llama().eval(), kind)


def dequantised(weight):
    if hasattr(weight, "dequantize") and "torchao" in type(weight).__module__:
        return weight.dequantize()
    return pytest.importorskip("bitsandbytes").functional.dequantize_4bit(weight.data, weight.quant_state)


def quantised_layers(model):
    return {n: m for n, m in model.named_modules() if is_quantised(m, getattr(m, "weight", None))}


def bits(model):
    """The integers and what scales them."""
    kept = {}
    for name, module in quantised_layers(model).items():
        weight = module.weight
        parts = [weight.qdata, weight.scale] if hasattr(weight, "qdata") else [weight.data]
        kept[name] = [part.clone() for part in parts]
    return kept


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))


def train(model, steps=8, **options):
    settings = {"placement": "probe", "lr": 3e-2, "eps": 1e-2, "rank": 2, "interval": 3, "backend": "eager"}
    optimizer = LOZO(model, **(settings | options))
    losses = [float(optimizer.step(closure(model))) for _ in range(steps)]
    return optimizer, losses


@torch.no_grad()
def loss_of(model):
    return float(closure(model)())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_a_layer_gives_what_it_gave_and_x_times_the_delta(kind, bias):
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(nn.Linear(32, 24, bias=bias))), torch.randn(5, 32)
    with torch.no_grad():
        rest = model(x)
    handle = patch(model, placement="probe", rank=3, interval=2, backend="eager")
    handle.prepare(lambda: model(x).square().mean())
    cs = (0.7, -0.4, 0.5)
    for step, c in enumerate(cs):
        handle.update_(step, c, 0.3)
    handle.perturb_(len(cs), 0.2)

    def delta(name, factor):
        learned = sum(c * handle.materialize(name, step) for step, c in enumerate(cs))
        return 0.2 * handle.materialize(name, len(cs)) - 0.3 * factor * learned

    expected = x @ delta("0.weight", 1 / 3).T + (delta("0.bias", 1.0) if bias else 0.0)
    with torch.no_grad():
        assert torch.allclose(model(x) - rest, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [torchao_int8, torchao_int4, bitsandbytes_nf4], ids=lambda k: k.__name__)
def test_the_loss_is_that_of_a_dequantised_model_with_the_delta(kind):
    model = make(kind)
    before = bits(model)
    optimizer, _ = train(model, 7)
    plain = llama().eval()
    live = loss_of(model)
    optimizer.handle.merge()
    deltas = {name: past["b"] @ past["v"] for name, past in optimizer.handle.past.items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in deltas:
                plain.get_parameter(name).copy_(dequantised(p) + deltas[name])
            else:
                plain.get_parameter(name).copy_(p)
    assert len(deltas) == 14 and all(d.abs().max() > 0 for d in deltas.values())
    assert live == pytest.approx(loss_of(plain), rel=1e-5)
    assert same_bits(bits(model), before)


def _owner(model, name):
    module, _, attribute = name.rpartition(".")
    owner = model.get_submodule(module)
    return owner, owner._parameters[attribute]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"directions": 2}], ids=lambda o: "-".join(o) or "plain")
def test_training_is_that_of_the_dequantised_model(options):
    """Steps and losses, for several windows: W is never rounded again, which the plain run's merges do in fp32."""
    model = make()
    plain = llama().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            plain.get_parameter(name).copy_(dequantised(p) if is_quantised(*_owner(model, name)) else p)
    runs = [train(m, 10, side="activation", lr=1e-2, **options)[1] for m in (model, plain)]
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_rank_grows_by_one_v_per_window_and_no_integer_changes(kind):
    model = make(kind)
    before = bits(model)
    optimizer, losses = train(model, 4)
    for _ in range(3):  # within a window, merging again adds no rank
        optimizer.handle.merge()
        optimizer.step(closure(model))
    assert {past["b"].shape[1] for past in optimizer.handle.past.values()} == {2 * 2}
    assert same_bits(bits(model), before) and len(optimizer.handle.past) == 14
    assert torch.tensor(losses).isfinite().all()


def test_settling_changes_no_output():
    model = make()
    optimizer, _ = train(model, 5)
    live = loss_of(model)
    optimizer.handle.merge()
    assert loss_of(model) == pytest.approx(live, rel=1e-6)


def test_evaluations_that_share_a_forward():
    losses = []
    for evaluation in ("sequential", "batched"):
        torch.manual_seed(0)
        model, x = nn.Sequential(torchao_int8(nn.Linear(16, 8)), nn.Tanh(), nn.Linear(8, 4)), torch.randn(6, 16)
        optimizer = LOZO(model, placement="probe", lr=0.1, eps=1e-2, interval=2, evaluation=evaluation, backend="eager")
        losses.append([float(optimizer.step(lambda x, model=model: model(x).square().mean(1), x)) for _ in range(7)])
        optimizer.handle.restore(discard=True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_restore_refuses_to_lose_what_was_learned():
    model = make()
    rest = loss_of(model)
    optimizer, _ = train(model, 2)  # nothing was merged yet
    live = loss_of(model)
    with pytest.raises(RuntimeError, match=r"export_lora.*discard=True"):
        optimizer.handle.restore()
    assert loss_of(model) == live != rest
    optimizer.step(closure(model))
    optimizer.handle.restore(discard=True)
    optimizer.handle.restore()
    assert loss_of(model) != live


def test_restore_before_a_step_asks_nothing():
    model = make()
    patch(model, placement="probe").restore()


def test_an_adapter_that_is_exported_after_restore_is_whole():
    model = make()
    optimizer, _ = train(model, keep_factors=True)
    tuned = export_lora(optimizer.handle).tensors
    optimizer.handle.restore(discard=True)
    again = export_lora(optimizer.handle).tensors
    assert tuned.keys() == again.keys()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    products = [t[name + "B.weight"] @ t[name + "A.weight"] for t in (tuned, again)]
    assert torch.allclose(*products, atol=1e-7) and products[0].abs().max() > 0


def test_state_dict_warns_once_of_what_it_lacks():
    model = make()
    _optimizer, _ = train(model, 2)
    with pytest.warns(UserWarning, match="export_lora"):
        model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_goes_on(stop):
    model, again = make(), make()
    first, _ = train(model, stop)
    saved = copy.deepcopy(first.state_dict())
    with torch.no_grad():
        for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
            if not is_quantised(*_owner(model, name)):
                q.copy_(p)
    second, _ = train(again, 0)
    second.load_state_dict(saved)
    losses = [[float(o.step(closure(m))) for _ in range(4)] for m, o in ((model, first), (again, second))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert all(torch.equal(a["b"], second.handle.past[n]["b"]) for n, a in first.handle.past.items())


def test_a_state_of_other_layers_is_refused():
    optimizer, _ = train(make(), 4)
    saved = optimizer.state_dict()
    name = next(iter(saved["past"]))
    saved["past"][name]["b"] = saved["past"][name]["b"][:-1]
    other, _ = train(make(), 0)
    with pytest.raises(ValueError, match="does not fit"):
        other.load_state_dict(saved)
    assert not other.handle.past


def test_decay_is_refused_before_a_step():
    with pytest.raises(ValueError, match="cannot decay"):
        LOZO(make(), placement="probe", weight_decay=0.1)
    handle = patch(model := make(), placement="probe")
    rest = [p for n, p in zip(handle.names, handle.parameters, strict=True) if n not in handle.undecaying]
    stuck = [p for n, p in zip(handle.names, handle.parameters, strict=True) if n in handle.undecaying]
    optimizer = LOZO(handle, [{"params": stuck}, {"params": rest, "weight_decay": 0.1}])
    for _ in range(3):
        optimizer.step(closure(model))
    handle.merge()
    assert len(handle.past) == len(stuck)


def test_decay_by_hand_is_noticed_before_a_merge():
    handle = patch(model := make(), placement="probe")
    handle.prepare(closure(model))
    handle.update_(0, 0.5, 0.1, weight_decay=0.5)
    with pytest.raises(RuntimeError, match="cannot decay"):
        handle.merge()
    assert not handle.past


def test_a_layer_that_is_used_in_another_way_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bitsandbytes_nf4(nn.Linear(64, 64))

        def forward(self, x):
            return self.inner(x) + self.inner.weight.sum()

    model = Odd()
    with pytest.raises(RuntimeError, match=r"quantised and cannot be probed.*exclude it"):
        patch(model, placement="probe").prepare(lambda: model(torch.ones(1, 64)).sum())


def test_mezo_says_that_it_cannot():
    with pytest.raises((TypeError, ValueError), match="no trainable parameter"):
        MeZO(make(), placement="probe", include="*q_proj.weight")


@pytest.mark.parametrize("rank", [None, 1])
def test_the_adapter_on_a_fresh_base_is_the_tuned_model(rank, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("safetensors")
    tuned = make()
    optimizer, _ = train(tuned, keep_factors=True)
    adapter = export_lora(optimizer.handle, tmp_path, rank=rank)
    error = shifted(make(), load(make(), tmp_path), tuned)
    assert error < 1e-4 if rank is None else 0 < max(adapter.errors.values()) < 1


def test_an_adapter_of_quantised_layers_alone_needs_no_kept_factors(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("safetensors")
    tuned = make()
    optimizer, _ = train(tuned, include=["*_proj.weight"])
    export_lora(optimizer.handle, tmp_path)
    assert shifted(make(), load(make(), tmp_path), tuned) < 1e-4
