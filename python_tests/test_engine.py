"""patch(): what is trained and how, storage that moves, undoing, and every error before anything is touched."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import lozo_kernels
from lozo_kernels import handle_of, patch
from lozo_kernels.kernels import noise
from lozo_kernels.model.config import PatchConfig
from python_tests.models import Zoo, same, weights


def test_finds_every_parameter_once():
    model = Zoo()
    handle = patch(model, rank=4)
    rows = {p.name: p for p in handle.report().parameters}
    assert rows["embed.weight"].aliases == ("head.weight",)
    assert "head.weight" not in rows
    assert rows["frozen"].treatment == "left alone" and rows["frozen"].note == "requires_grad is False"
    assert rows["gain"].treatment == "dense" and rows["norm.weight"].treatment == "dense"
    assert rows["experts"].treatment == "low-rank 4" and rows["experts"].note.startswith("3 matrices of 6 x 5")
    assert rows["conv.weight"].note.startswith("6 x 24")
    assert handle.names == [n for n, p in model.named_parameters() if p.requires_grad]
    text = str(handle.report())
    assert "tied with head.weight" in text and "requires_grad is False" in text


def test_rank_above_the_smaller_side_works_and_is_reported():
    model = nn.Linear(16, 2)
    handle = patch(model, rank=8)
    assert "rank 8 is above min(rows, columns)" in handle.report().parameters[0].note
    before = weights(model)
    handle.perturb_(0, 1e-3)
    expected = before["weight"] + 1e-3 * handle.materialize("weight", 0)
    assert torch.allclose(model.weight, expected, atol=1e-7)


@pytest.mark.parametrize("estimator", ["lowrank", "dense"])
@pytest.mark.parametrize("scaling", ["paper", "card", "published"])
def test_perturb_adds_materialize(rng, backend, estimator, scaling):
    model = Zoo()
    handle = patch(model, estimator=estimator, rank=3, interval=5, seed=rng.getrandbits(64), scaling=scaling, backend=backend.name)
    step, direction = rng.randrange(1000), rng.choice((0, 2))
    before = weights(model)
    handle.perturb_(step, 1e-2, direction=direction)
    for name, old in before.items():
        if name == "frozen":
            assert torch.equal(model.frozen, old)
            continue
        d = handle.materialize(name, step, direction=direction)
        assert d.shape == old.shape and d.dtype == torch.float32
        assert torch.allclose(model.get_parameter(name), old + 1e-2 * d, rtol=1e-6, atol=1e-7)


def test_materialize_is_the_published_factor_product():
    model = nn.Linear(7, 5)
    handle = patch(model, rank=2, interval=10, seed=3, scaling="card")
    tid = noise.tensor_id("weight")
    u, v = noise.factor(3, 5, 2, tid, 25), noise.factor(3, 7, 2, tid, 2, stream="V")
    assert torch.equal(handle.materialize("weight", 25), u @ v.T * 0.5)
    assert torch.equal(handle.materialize("bias", 25), noise.dense(3, 5, noise.tensor_id("bias"), 25))
    with pytest.raises(KeyError, match="no trained parameter is named 'wight'"):
        handle.materialize("wight", 0)


def test_names_survive_reordering_subsetting_and_wrapping():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    a = nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.Linear(4, 3)})
    b = nn.ModuleDict({"y": nn.Linear(4, 3), "x": nn.Linear(4, 4)})
    wrapped = Wrapper(nn.ModuleDict({"y": nn.Linear(4, 3)}))
    ha, hb, hc = patch(a), patch(b, include="y.*"), patch(wrapped)
    assert torch.equal(ha.materialize("y.weight", 3), hb.materialize("y.weight", 3))
    assert torch.equal(ha.materialize("y.weight", 3), hc.materialize("y.weight", 3))
    assert hb.names == ["y.weight", "y.bias"]
    # Tied names: whichever is registered first, the noise is the same.
    c, d = Zoo(), Zoo()
    d._modules = dict(reversed(d._modules.items()))
    assert torch.equal(patch(c).materialize("head.weight", 1), patch(d).materialize("embed.weight", 1))


def test_update_follows_the_formula(rng, backend):
    model = Zoo()
    handle = patch(model, rank=3, interval=4, backend=backend.name)
    before = weights(model)
    step, eps, c, lr, wd = 6, 1e-2, 0.7, 1e-2, 0.1
    handle.perturb_(step, -eps)
    handle.update_(step, c, lr, weight_decay=wd, applied=-eps)
    for name in handle.names:
        d = handle.materialize(name, step) / (3 if model.get_parameter(name).dim() > 1 else 1)
        expected = (1 - lr * wd) * before[name] - lr * c * d
        assert torch.allclose(model.get_parameter(name), expected, atol=1e-6)


@pytest.mark.parametrize("boundary", [False, True])
@pytest.mark.parametrize("directions", [1, 2, 3, 7])
@pytest.mark.parametrize("momentum", [None, 0.5])
def test_update_in_pieces_equals_formula(rng, backend, directions, momentum, boundary):
    """Any number of directions, with what stands taken out and the next perturbation put in, within or across a refresh of V."""
    model = Zoo()
    handle = patch(model, rank=2, interval=4, backend=backend.name)
    if momentum is not None:
        handle.enable_momentum()
    before = weights(model)
    step, eps, lr, wd = (7 if boundary else 5), 1e-2, 1e-2, 0.3
    c = [rng.gauss(0, 1) for _ in range(directions)]
    handle.perturb_(step, -eps, direction=directions - 1)
    lrs = torch.full((len(handle.names),), lr, dtype=torch.float64)
    handle.update_(step, c, lrs, weight_decay=wd, beta=momentum, applied=-eps, perturb_next=eps)
    for name in handle.names:
        low_rank = model.get_parameter(name).dim() > 1
        mean = sum(cd * handle.materialize(name, step, direction=d) for d, cd in enumerate(c)) / directions
        estimate = mean / 2 if low_rank else mean
        factor = 1.0 if momentum is None else 1 - momentum
        expected = (1 - lr * wd) * before[name] - lr * factor * estimate + eps * handle.materialize(name, step + 1)
        assert torch.allclose(model.get_parameter(name), expected, atol=2e-6), name


def test_storage_is_resolved_at_the_call(backend):
    model = Zoo()
    handle = patch(model, rank=2, backend=backend.name)
    fresh = Zoo()
    for change in (
        lambda: model.load_state_dict(fresh.state_dict()),
        lambda: model.load_state_dict(copy.deepcopy(fresh.state_dict()), assign=True),
        lambda: setattr(model.up.weight, "data", torch.zeros(8, 5)),
        lambda: setattr(model.up, "weight", nn.Parameter(torch.ones(8, 5))),
        lambda: model.to(torch.bfloat16),
        lambda: model.to(torch.float32),
    ):
        change()
        before = weights(model)
        handle.perturb_(1, 0.5)
        after = weights(model)
        for name in handle.names:
            expected = before[name].float() + 0.5 * handle.materialize(name, 1)
            assert torch.allclose(after[name].float(), expected, rtol=1e-2, atol=1e-2), name
            assert not torch.equal(after[name], before[name])


def test_changed_shape_or_dtype_is_an_error():
    model = nn.Linear(3, 3)
    handle = patch(model)
    model.weight.data = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"'weight' was \(3, 3\), now is \(4, 3\)"):
        handle.perturb_(0, 1.0)
    model.weight.data = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"'weight' is torch.float64"):
        handle.perturb_(0, 1.0)
    assert not model.weight.any()


def test_a_second_patch_raises_with_the_way_out():
    model = nn.Linear(2, 2)
    handle = patch(model)
    assert handle_of(model) is handle
    with pytest.raises(RuntimeError, match=r"handle_of\(model\), or call its restore\(\)"):
        patch(model)
    handle.restore()
    handle.restore()
    assert handle_of(model) is None
    with pytest.raises(RuntimeError, match="was restored"):
        handle.perturb_(0, 1.0)
    patch(model).restore()


def test_nothing_of_the_model_or_its_class_changes():
    model = Zoo()
    before = weights(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    forward = Zoo.forward
    handle = patch(model)
    assert same(weights(model), before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert Zoo.forward is forward and "forward" not in vars(model)
    handle.restore()


def test_the_handle_keeps_the_model_and_nothing_keeps_both():
    model = nn.Linear(2, 2)
    gone = weakref.ref(model)
    handle = patch(model)
    del model
    gc.collect()
    handle.perturb_(0, 1.0)
    del handle
    gc.collect()
    assert gone() is None


def test_without_its_handle_a_model_is_not_patched():
    model = nn.Linear(2, 2)
    patch(model)
    assert handle_of(model) is None
    patch(model)


def test_a_parameter_that_is_gone_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    handle = patch(model)
    model[0] = nn.Identity()
    gc.collect()
    with pytest.raises(RuntimeError, match=r"module '0' was replaced after patching: restore\(\) and patch"):
        handle.perturb_(0, 1.0)


def test_include_and_exclude():
    model, other = Zoo(), Zoo()
    handle = patch(model, include=["*.weight", "gain"], exclude="norm.*")
    assert set(handle.names) == {"embed.weight", "conv.weight", "up.weight", "gain"}
    assert {p.note for p in handle.report().parameters if p.name == "norm.weight"} == {"matches an exclude pattern"}
    assert {p.note for p in handle.report().parameters if p.name == "experts"} == {"matches no include pattern"}
    assert set(patch(other, include="head.weight").names) == {"embed.weight"}


def test_mixed_dtypes_and_strided_rows(backend):
    model = nn.Module()
    model.fp16 = nn.Parameter(torch.zeros(4, 6, dtype=torch.float16))
    model.bf16 = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
    storage = torch.zeros(4, 10)
    model.rows = nn.Parameter(storage[:, :6])
    model.every_second = nn.Parameter(torch.zeros(12)[::2])
    model.empty = nn.Parameter(torch.zeros(0, 6))
    model.nothing = nn.Parameter(torch.zeros(0))
    handle = patch(model, rank=2, backend=backend.name)
    handle.perturb_(0, 1.0)
    for name in ("fp16", "bf16", "rows", "every_second"):
        assert torch.allclose(model.get_parameter(name).float(), handle.materialize(name, 0), rtol=1e-2), name
    assert not storage[:, 6:].any()


def bad(parameter):
    model = nn.Module()
    model.good = nn.Parameter(torch.ones(2, 2))
    model.bad = parameter
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Linear(2, 2), {"rank": 0}, ValueError, "rank is at least 1 and at most 64, not 0"),
        (nn.Linear(2, 2), {"rank": 65}, ValueError, "rank is at least 1 and at most 64, not 65"),
        (nn.Linear(2, 2), {"rank": 2.0}, TypeError, "rank is an integer"),
        (nn.Linear(2, 2), {"interval": 0}, ValueError, "interval is at least 1"),
        (nn.Linear(2, 2), {"seed": -1}, ValueError, "seed is at least 0"),
        (nn.Linear(2, 2), {"scaling": "none"}, ValueError, "scaling is one of 'paper', 'card', 'published'"),
        (nn.Linear(2, 2), {"estimator": "full"}, ValueError, "estimator is one of"),
        (nn.Linear(2, 2), {"rounding": "up"}, ValueError, "rounding is one of"),
        (nn.Linear(2, 2), {"ranks": 3}, TypeError, "unexpected keyword argument 'ranks'"),
        (nn.Linear(2, 2), {"include": "encoder.*"}, ValueError, r"include pattern 'encoder.\*' matches no parameter"),
        (nn.Linear(2, 2), {"exclude": ["bias", "x"]}, ValueError, "exclude pattern 'x' matches no parameter"),
        (nn.Linear(2, 2), {"include": [3]}, TypeError, "include is a glob pattern"),
        (nn.Linear(2, 2), {"backend": "cuda2"}, ValueError, "no backend 'cuda2'; there are"),
        (nn.ReLU(), {}, ValueError, "no trainable parameter"),
        (nn.Linear(2, 2).requires_grad_(False), {}, ValueError, "no trainable parameter .2 were left alone"),
        (bad(nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))), {}, TypeError, "'bad' is torch.complex64"),
        (bad(nn.Parameter(torch.ones(2, 2, dtype=torch.float64))), {}, TypeError, "'bad' is torch.float64"),
        (bad(nn.Parameter(torch.ones(2, 2).to_sparse())), {}, TypeError, "'bad' is torch.sparse_coo"),
        (bad(nn.Parameter(torch.ones(2, 2, device="meta"))), {}, TypeError, "'bad' is on the meta device"),
        (bad(nn.Parameter(torch.ones(3, 2).t())), {}, ValueError, "'bad' .* columns must be contiguous"),
        (bad(nn.Parameter(torch.ones(1, 2).expand(3, 2))), {}, ValueError, "'bad' .* rows overlap"),
        (bad(nn.Parameter(torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last))), {}, ValueError, "'bad' .*contiguous"),
        (bad(nn.Parameter(torch.ones(3, 2).t())), {"estimator": "dense"}, ValueError, "'bad' .*contiguous"),
        (torch.ones(3), {}, TypeError, "takes the model, a torch.nn.Module, not Tensor"),
    ],
)
def test_bad_input_changes_nothing(model, options, error, message):
    before = weights(model) if isinstance(model, nn.Module) and not isinstance(model, nn.ReLU) else {}
    with pytest.raises(error, match=message):
        patch(model, **options)
    if isinstance(model, nn.Module):
        assert handle_of(model) is None
        assert all(p.device.type == "meta" or p.is_sparse or torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("untrained", ["frozen", "excluded"])
def test_unsupported_parameters_may_be_left_alone(untrained):
    model = bad(nn.Parameter(torch.ones(3, 2, dtype=torch.complex64), requires_grad=untrained != "frozen"))
    handle = patch(model, exclude=None if untrained == "frozen" else "bad")
    assert handle.names == ["good"]


def test_bad_calls_change_nothing():
    model = nn.Linear(3, 3)
    handle = patch(model)
    before = weights(model)
    with pytest.raises(ValueError, match="step is 0 to"):
        handle.perturb_(-1, 1.0)
    with pytest.raises(ValueError, match="scale is a finite number, not nan"):
        handle.perturb_(0, float("nan"))
    with pytest.raises(ValueError, match="direction is 0 to"):
        handle.perturb_(0, 1.0, direction=-1)
    with pytest.raises(RuntimeError, match="momentum was not enabled"):
        handle.update_(0, 1.0, 1.0, beta=0.9)
    with pytest.raises(ValueError, match="other parameters; differing: bias, weight"):
        handle.load_momentum({}, 0)
    assert same(weights(model), before)


def test_config_round_trips_as_json():
    config = PatchConfig(rank=3, include=("a.*",), seed=2**64 - 1)
    assert PatchConfig.from_json(config.to_json()) == config
    handle = patch(nn.Linear(2, 2), **PatchConfig(rank=3, exclude=("bias",)).to_dict())
    assert handle.config.exclude == ("bias",)
    with pytest.raises(TypeError, match="unexpected keyword"):
        PatchConfig.from_json('{"ranks": 3}')


def test_backend_choice_and_reasons(monkeypatch):
    monkeypatch.setenv("LOZO_KERNELS_BACKEND", "eager")
    model = nn.Linear(2, 2)
    report = patch(model).report()
    assert {p.backend for p in report.parameters} == {"eager"}
    assert report.rejected_backends["cpu"]["native"] == "eager was asked for"
    monkeypatch.setenv("LOZO_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="no backend 'fast'"):
        patch(nn.Linear(2, 2))
    monkeypatch.delenv("LOZO_KERNELS_BACKEND")
    with pytest.raises(RuntimeError, match="cannot serve meta"):
        lozo_kernels.choose_backend("meta", "eager")


def test_versions_of_changed_tensors_grow(backend):
    """Autograd notices that a saved weight was changed in place."""
    model = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    loss = (model(x) ** 2).sum()
    patch(model, backend=backend.name).perturb_(0, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
