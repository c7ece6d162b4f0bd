"""Adapters made of what a run learned, loaded by PEFT."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, export_lora, patch
from lozo_kernels.model.probe.lora import truncate
from python_tests.models import Zoo, zoo_loss
from python_tests.test_probe_offload import MODELS, TOKENS, closure, offload

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")


def make(name="llama", dtype=torch.float32):
    torch.manual_seed(3)
    return MODELS[name]().to(dtype).eval()


def train(model, steps=8, **options):
    settings = {"placement": "probe", "lr": 3e-2, "eps": 1e-2, "rank": 2, "interval": 3, "backend": "eager", "keep_factors": True}
    optimizer = LOZO(model, **(settings | options))
    for _ in range(steps):
        optimizer.step(closure(model))
    return optimizer


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits.float()


def load(base, folder):
    with warnings.catch_warnings():  # about tied weights and merging
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder).eval()


def shifted(base, adapted, tuned):
    """How far the adapted model's logits are from the tuned one's, as a part of what training did to them."""
    rest, got, wanted = logits(base), logits(adapted), logits(tuned)
    assert (wanted - rest).norm() > 1e-3 * rest.norm()
    return float((got - wanted).norm() / (wanted - rest).norm())


@pytest.mark.parametrize("when", ["between steps", "merged", "restored"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_gives_the_tuned_model(name, when, tmp_path):
    tuned = make(name)
    optimizer = train(tuned)
    if when == "merged":
        optimizer.handle.merge()
    elif when == "restored":
        optimizer.handle.restore()
    adapter = export_lora(optimizer.handle, tmp_path)
    assert adapter.rank == 2 * 3 and set(adapter.errors.values()) == {0.0}
    assert shifted(make(name), load(make(name), tmp_path), tuned) < 1e-4


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"scaling": "published"}, {"scaling": "card", "directions": 2}], ids=str)
def test_every_way_of_updating(options, tmp_path):
    tuned = make()
    optimizer = train(tuned, lr=1e-2, **options)
    optimizer.state_dict()  # merges within the window
    optimizer.step(closure(tuned))
    assert export_lora(optimizer.handle, tmp_path).rank == 2 * 3
    assert shifted(make(), load(make(), tmp_path), tuned) < 1e-4


@pytest.mark.parametrize("name", ["llama", "llama untied"])
def test_peft_merges_an_adapter_but_not_into_tied_weights(name, tmp_path):
    tuned = make(name)
    optimizer = train(tuned)
    if name == "llama":
        with pytest.warns(UserWarning, match="tied"):
            export_lora(optimizer.handle, tmp_path)
        return
    export_lora(optimizer.handle, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = load(make(name), tmp_path).merge_and_unload()
    assert shifted(make(name), merged, tuned) < 1e-4


def test_a_resumed_run_has_the_factors_of_the_first_part(tmp_path):
    tuned, again = make(), make()
    first = train(tuned, 5)
    saved = first.state_dict()
    again.load_state_dict(tuned.state_dict())
    second = train(again, 0)
    second.load_state_dict(copy.deepcopy(saved))
    for _ in range(4):
        second.step(closure(again))
    export_lora(second.handle, tmp_path)
    assert shifted(make(), load(make(), tmp_path), again) < 1e-4


def test_offloaded_weights(tmp_path):
    tuned = offload(make("opt"), "disk", tmp_path / "weights")
    export_lora(train(tuned).handle, tmp_path / "adapter")
    assert shifted(make("opt"), load(make("opt"), tmp_path / "adapter"), tuned) < 1e-4


def test_half_precision(tmp_path):
    tuned = make(dtype=torch.bfloat16)
    export_lora(train(tuned, lr=0.3).handle, tmp_path)
    assert shifted(make(dtype=torch.bfloat16), load(make(dtype=torch.bfloat16), tmp_path), tuned) < 0.2


@pytest.mark.parametrize("rank", [1, 3, 6, 40])
def test_truncation_is_the_best_one_and_says_what_it_left_out(rank, tmp_path):
    tuned = make()
    handle = train(tuned).handle
    exact, adapter = export_lora(handle), export_lora(handle, tmp_path, rank=rank)
    prefix = "base_model.model.model.layers.0.mlp.down_proj."
    whole, part = (a.tensors[prefix + "lora_B.weight"] @ a.tensors[prefix + "lora_A.weight"] for a in (exact, adapter))
    s = torch.linalg.svdvals(whole.double())
    best = float(s[rank:].norm() / s.norm())
    assert float((whole - part).norm() / whole.norm()) == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert adapter.errors["model.layers.0.mlp.down_proj"] == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert adapter.rank == rank and (rank >= 6) == (best < 1e-6)
    load(make(), tmp_path)


def test_truncation_of_nothing():
    b, v, error = truncate(torch.zeros(5, 4), torch.randn(3, 4), 2)
    assert error == 0.0 and not (b @ v.T).any() and len(v) == 3


def test_names_that_end_alike(tmp_path):
    """PEFT compares the ends of names: 'head' would also be 'inner.head', and 'norm' 'inner.norm'."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
            self.inner = nn.ModuleDict({"head": nn.Linear(6, 6), "norm": nn.LayerNorm(6)})

        def forward(self, x):
            return self.norm(self.head(self.inner["norm"](self.inner["head"](x))))

    torch.manual_seed(0)
    tuned, x = Model(), torch.randn(5, 6)
    base = copy.deepcopy(tuned)
    target = torch.randn(5, 6)
    options = {"exclude": "inner.*", "placement": "probe", "keep_factors": True, "backend": "eager"}
    optimizer = LOZO(tuned, lr=0.1, **options)
    for _ in range(5):
        optimizer.step(lambda: (tuned(x) - target).square().mean())
    adapter = export_lora(optimizer.handle, tmp_path)
    assert adapter.config["target_modules"] == "head" and set(adapter.config["modules_to_save"]) == {"norm", "inner.norm"}
    adapted = load(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        assert torch.allclose(adapted(x), tuned(x), atol=1e-5) and not torch.allclose(base(x), tuned(x), atol=1e-3)


def test_what_an_adapter_cannot_say_is_named():
    torch.manual_seed(0)
    model = Zoo().eval()
    optimizer = LOZO(model, placement="probe", keep_factors=True, backend="eager")
    optimizer.step(zoo_loss(model))
    with pytest.raises(ValueError, match=r"'experts'.*exclude="):
        export_lora(optimizer.handle)


@pytest.mark.parametrize("make_handle", [lambda m: patch(m), lambda m: MeZO(m, placement="probe").handle], ids=["in place", "mezo"])
def test_a_handle_without_factors_is_refused(make_handle):
    with pytest.raises(ValueError, match="keep_factors"):
        export_lora(make_handle(make()))


def test_factors_that_were_not_kept():
    with pytest.raises(ValueError, match=r"keep_factors=True"):
        export_lora(train(make(), keep_factors=False).handle)


def test_before_the_first_step_there_is_nothing():
    with pytest.raises(ValueError, match="learned anything"):
        export_lora(patch(make(), placement="probe", keep_factors=True))


@pytest.mark.parametrize("rank", [0, True, 1.5])
def test_an_odd_rank(rank):
    with pytest.raises(ValueError, match="rank"):
        export_lora(patch(make(), placement="probe", keep_factors=True), rank=rank)


def test_decay_is_refused_before_a_step():
    with pytest.raises(ValueError, match="cannot decay"):
        LOZO(make(), placement="probe", keep_factors=True, weight_decay=0.1)


def test_the_export_changes_nothing(tmp_path):
    model = make()
    optimizer = train(model)
    before, live = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
    export_lora(optimizer.handle, tmp_path, rank=2)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and torch.equal(logits(model), live)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
