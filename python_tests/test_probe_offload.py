"""Probes of models whose weights accelerate keeps on the CPU or on disk."""

import copy
import json
import os
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, patch
from lozo_kernels.model.offload import offloaded_weights
from python_tests.models import same

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(1))
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 64, "max_position_embeddings": 32}


def llama(tied=True):
    config = transformers.LlamaConfig(intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=tied, **SIZES)
    return transformers.LlamaForCausalLM(config)


def opt():
    return transformers.OPTForCausalLM(transformers.OPTConfig(ffn_dim=24, word_embed_proj_dim=16, dropout=0.0, **SIZES))


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32))


MODELS = {"llama": llama, "llama untied": lambda: llama(tied=False), "opt": opt, "gpt2": gpt2}
PLACES = ("cpu", "disk", "mixed", "preloaded")


def make(name, dtype=torch.float32):
    torch.manual_seed(3)
    return MODELS[name]().to(dtype).eval()


def closure(model):
    return lambda: model(input_ids=TOKENS, labels=TOKENS).loss


def offload(model, where, folder):
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if where == "disk":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    if where == "preloaded":  # the hook of a whole layer brings in what its modules hold
        classes = ["LlamaDecoderLayer", "OPTDecoderLayer", "GPT2Block"]
        return accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=classes)
    blocks = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    inside = {n.rpartition(".")[0] for n, _ in model.named_parameters(remove_duplicate=False) if not n.startswith(blocks)}
    device_map = dict.fromkeys(sorted(inside), "cpu") | {f"{blocks}.0": "disk", f"{blocks}.1": "cpu"}
    rest = [n for n, m in model.named_modules() if n and not any(True for _ in m.children())]
    device_map |= {n: "cpu" for n in rest if not any(n.startswith(known) for known in device_map)}
    return accelerate.dispatch_model(model, device_map, offload_dir=folder)


def weights(model):
    """Every weight by each of its names, from wherever it is kept."""
    kept, found = offloaded_weights(model), {}
    for prefix, module in model.named_modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                home = kept[module].parameter(attribute) if module in kept and p.device.type == "meta" else None
                found[f"{prefix}.{attribute}"] = (p.detach() if home is None else home.load()).clone()
    return found


def run(model, steps=8, make_optimizer=LOZO, **options):
    settings = {"placement": "probe", "lr": 1e-2, "eps": 1e-2, "backend": "eager", "side": "scratch"}
    settings |= {"rank": 2, "interval": 3} if make_optimizer is LOZO else {}
    optimizer = make_optimizer(model, **(settings | options))
    return optimizer, [float(optimizer.step(closure(model))) for _ in range(steps)]


@pytest.mark.parametrize("side", ["activation", "scratch"])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_a_run_with_offloaded_weights_is_the_run_without(name, where, side, tmp_path):
    plain = make(name)
    away = offload(copy.deepcopy(plain), where, tmp_path)
    assert any(p.device.type == "meta" for p in away.parameters())
    assert same(weights(away), before := weights(plain))
    one, losses = run(plain, side=side)
    two, probed = run(away, side=side)
    assert probed == losses
    for optimizer in (one, two):
        optimizer.handle.merge()
    assert same(weights(away), weights(plain))
    for model, optimizer in ((plain, one), (away, two)):
        optimizer.step(closure(model))
        optimizer.handle.restore()
    assert same(weights(away), after := weights(plain)) and not any(torch.equal(after[k], before[k]) for k in before)
    with torch.no_grad():
        assert closure(away)() == closure(plain)()


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"weight_decay": 0.1}, {"rounding": "stochastic"}], ids=lambda o: next(iter(o))
)
def test_settings_reach_offloaded_weights(options, tmp_path):
    plain = make("opt", torch.bfloat16)
    away = offload(copy.deepcopy(plain), "disk", tmp_path)
    runs = [run(model, side="activation", lr=0.1, **options) for model in (plain, away)]
    # A bias that decays is added in another place there, after another rounding.
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-2 if "weight_decay" in options else 0)
    for optimizer, _ in runs:
        optimizer.handle.restore()
    if "weight_decay" not in options:
        assert same(weights(away), weights(plain))


def test_decayed_biases_are_where_they_belong(tmp_path):
    """Weight and bias of a layer decay by different factors."""
    plain = make("opt")
    away = offload(copy.deepcopy(plain), "cpu", tmp_path)
    losses = []
    for model in (plain, away):
        handle = patch(model, placement="probe", side="activation", rank=2, backend="eager")
        handle.prepare(closure(model))
        decay = torch.tensor([5.0 if "bias" in name else 1.0 for name in handle.names], dtype=torch.float64)
        handle.update_(0, 0.5, 0.1, weight_decay=decay)
        with torch.no_grad():
            losses.append(float(closure(model)()))
            handle.merge()
            losses.append(float(closure(model)()))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("where", PLACES)
def test_mezo_moves_offloaded_weights_in_every_step(where, tmp_path):
    plain = make("llama")
    away = offload(copy.deepcopy(plain), where, tmp_path)
    runs = [run(model, 4, MeZO, momentum=0.5) for model in (plain, away)]
    assert runs[1][1] == runs[0][1]
    assert same(weights(away), weights(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_read_until_a_merge_and_then_hold_it(dtype, tmp_path):
    model = offload(make("llama", dtype), "disk", tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.glob("*.dat")}
    optimizer, _ = run(model, 3, lr=0.1)
    assert {path: path.read_bytes() for path in files} == files
    optimizer.handle.merge()
    assert not list(tmp_path.glob("*.part"))
    assert all(path.read_bytes() != old for path, old in files.items())
    merged = weights(model)
    again = accelerate.disk_offload(make("llama", dtype), tmp_path, execution_device="cpu")
    assert same(weights(again), merged)
    assert torch.equal(merged["model.embed_tokens.weight"], merged["lm_head.weight"])


def test_a_merge_that_fails_halfway_is_finished_by_the_next(tmp_path, monkeypatch):
    plain = make("llama")
    away = offload(copy.deepcopy(plain), "disk", tmp_path)
    optimizers = [run(model, 3, keep_factors=True)[0] for model in (plain, away)]
    replace, count = os.replace, iter(range(100))
    monkeypatch.setattr(os, "replace", lambda *a: full_disk() if next(count) == 9 else replace(*a))

    def full_disk():
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        optimizers[1].handle.merge()
    for optimizer in optimizers:
        optimizer.handle.merge()
    assert same(weights(away), weights(plain))
    ((window, kept),) = optimizers[1].handle.history
    assert window == 0 and same(kept, optimizers[0].handle.history[0][1])


def test_weights_have_no_storage_between_steps(tmp_path):
    model = offload(make("llama"), "disk", tmp_path)
    optimizer, _ = run(model, 4)
    assert all(p.device.type == "meta" for p in model.parameters())
    probed = optimizer.handle.probed
    assert not any(m.buffers for m in probed.members)
    scratch = {arena._memory.untyped_storage().data_ptr() for arena in probed._arenas.values()}
    kept = [x for _, table, out in probed._weights._fills.values() for x in (*table.x, *out.x)]
    assert kept and all(x.untyped_storage().data_ptr() in scratch for x in kept)


def test_a_checkpoint_is_not_written(tmp_path):
    """from_pretrained leaves weights in the checkpoint itself; merged ones go to the offload folder, or to memory without one."""
    plain = make("llama")
    plain.save_pretrained(tmp_path / "model")
    checkpoint = (tmp_path / "model" / "model.safetensors").read_bytes()
    run(plain)[0].handle.restore()
    for folder in (tmp_path / "offload", None):
        away = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "model", device_map={"": "disk"}, offload_folder=folder
        ).eval()
        run(away)[0].handle.restore()
        assert same(weights(away), weights(plain))
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == checkpoint
        assert folder is None or len(list(folder.glob("*.dat"))) == len(weights(plain))


def test_a_perturbed_weight_can_be_had(tmp_path):
    handles = []
    for model in (make("llama"), offload(make("llama"), "disk", tmp_path)):
        handles.append(patch(model, placement="probe", side="scratch", backend="eager"))
        handles[-1].prepare(closure(model))
        handles[-1].perturb_(0, 0.1)
    for name, shape in (("lm_head.weight", (64, 16)), ("model.norm.weight", (16,))):
        one, two = torch.empty(shape), torch.empty(shape)
        for handle, out in zip(handles, (one, two), strict=True):
            handle.write_perturbed(name, out)
        assert torch.equal(one, two) and one.abs().sum() > 0


def test_the_report_names_the_side_and_the_reason(tmp_path):
    model = offload(make("opt"), "cpu", tmp_path)
    optimizer, _ = run(model, 1, side="copy")
    rows = {p.name: p for p in optimizer.handle.report().parameters}
    assert rows["model.decoder.final_layer_norm.weight"].side == "scratch"
    assert "offloaded" in rows["model.decoder.final_layer_norm.weight"].note
    assert "lm_head.weight" in rows["model.decoder.embed_tokens.weight"].aliases


def test_in_place_says_what_to_do(tmp_path):
    with pytest.raises(TypeError, match="meta device"):
        patch(offload(make("llama"), "cpu", tmp_path))


def test_a_mapping_that_cannot_be_written_is_refused(tmp_path):
    class Frozen(Mapping):
        def __init__(self, model):
            self.tensors = {k: v.clone() for k, v in model.state_dict().items()}

        def __getitem__(self, key):
            return self.tensors[key].clone()

        def __iter__(self):
            return iter(self.tensors)

        def __len__(self):
            return len(self.tensors)

    model = nn.Sequential(nn.Linear(4, 4))
    accelerate.hooks.attach_align_device_hook(model, "cpu", offload=True, weights_map=Frozen(model))
    with pytest.raises(TypeError, match="cannot be written"):
        patch(model, placement="probe")


def test_index_of_the_folder_stays_readable(tmp_path):
    model = offload(make("llama", torch.bfloat16), "disk", tmp_path)
    before = json.loads((tmp_path / "index.json").read_text())
    run(model)[0].handle.restore()
    assert json.loads((tmp_path / "index.json").read_text()) == before
