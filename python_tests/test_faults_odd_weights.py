"""Weights that are not what they seem: strided vectors, and weights that were moved away, quantised or are not made yet."""

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO

PLACEMENTS = [{}, {"placement": "probe"}]
KINDS = {LOZO: {"rank": 2, "interval": 3}, MeZO: {}}


class Odd(nn.Module):
    """A linear layer and a norm whose vectors can be every other element of larger ones."""

    def __init__(self, *, strided):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.last = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        if strided:
            for module, attribute in ((self.linear, "bias"), (self.norm, "weight"), (self.norm, "bias"), (self.last, "bias")):
                p = getattr(module, attribute)
                memory = torch.full((3 * len(p) + 1,), 7.0)
                memory[1::3] = p.detach()
                setattr(module, attribute, nn.Parameter(memory[1::3]))

    def forward(self, x):
        return self.last(self.norm(torch.tanh(self.linear(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.5}], ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("side", ["auto", "activation", "scratch", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_strided_vectors_are_probed_as_others(kind, side, options, dtype):
    x, results = torch.randn(4, 6, dtype=dtype), []
    for strided in (False, True):
        model = Odd(strided=strided).to(dtype)
        optimizer = kind(model, placement="probe", lr=1e-2, eps=1e-2, side=side, **KINDS[kind], **options)
        losses = [float(optimizer.step(lambda m=model: m(x).float().square().mean())) for _ in range(7)]
        optimizer.handle.restore()
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
        if strided and dtype is torch.float32:
            assert model.norm.weight.stride() == (3,)
            memory = model.norm.weight.detach().as_strided((19,), (1,), 0)
            assert torch.equal(memory[0::3], torch.full((7,), 7.0)) and torch.equal(memory[2::3], torch.full((6,), 7.0))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_strided_vectors_in_evaluations_of_one_forward_pass():
    x, found = torch.randn(4, 6), []
    for strided in (False, True):
        model = Odd(strided=strided)
        optimizer = LOZO(model, placement="probe", evaluation="batched", rank=2, lr=1e-2, eps=1e-2)
        found.append([float(optimizer.step(lambda batch, m=model: m(batch).square().mean(1), x)) for _ in range(3)])
    assert found[0] == found[1]


def test_a_strided_vector_that_was_contiguous_when_it_was_patched():
    model, x = Odd(strided=False), torch.randn(4, 6)
    optimizer = LOZO(model, placement="probe", rank=2, lr=1e-2, eps=1e-2)
    optimizer.step(lambda: model(x).square().mean())
    with torch.no_grad():
        live = model(x)
        model.norm.weight.data = model.norm.weight.data.repeat_interleave(2)[::2]
        torch.testing.assert_close(model(x), live)
    optimizer.step(lambda: model(x).square().mean())
    optimizer.handle.restore()


@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_an_expanded_vector_is_refused_by_name(options):
    model = Odd(strided=False)
    model.norm.weight = nn.Parameter(torch.ones(1).expand(6))
    with pytest.raises(ValueError, match=r"'norm\.weight'.*overlap.*contiguous"):
        LOZO(model, rank=2, **options)


def trained(options, steps=2, width=6):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)), torch.randn(4, width)
    optimizer = LOZO(model, rank=2, lr=1e-2, eps=1e-2, **options)
    for _ in range(steps):
        optimizer.step(lambda: model(x).square().mean())
    return model, optimizer, x


@pytest.mark.parametrize("part", ["all", "a layer"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_weights_that_were_moved_to_meta_are_named(options, steps, part):
    model, optimizer, x = trained(options, steps)
    (model if part == "all" else model[2]).to("meta")
    name = "0" if part == "all" else "2"
    with pytest.raises(TypeError, match=rf"'{name}\.weight' is on the meta device.*load the weights first"):
        optimizer.step(lambda: model[0](x).square().mean())
    with pytest.raises(TypeError, match="meta device"):
        optimizer.handle.report()
    if steps and options:
        with pytest.raises(TypeError, match=r"meta device.*discard=True"):
            optimizer.handle.restore()
        with pytest.raises(TypeError, match="meta device"):
            model.state_dict()
    optimizer.handle.restore(**({"discard": True} if options else {}))


def test_weights_come_back_from_meta_and_training_goes_on():
    model, optimizer, x = trained({"placement": "probe"})
    state = {name: p.clone() for name, p in model.state_dict().items()}
    model.to("meta")
    with pytest.raises(TypeError, match="meta device"):
        optimizer.step(lambda: model(x).square().mean())
    for name, p in state.items():  # load_state_dict(assign=True) does this
        module, attribute = name.rsplit(".", 1)
        setattr(model.get_submodule(module), attribute, nn.Parameter(p))
    for _ in range(3):
        assert torch.isfinite(optimizer.step(lambda: model(x).square().mean()))


def test_what_was_learned_is_merged_into_a_parameter_that_was_replaced():
    """As libraries do that copy a model's parameters to other memory."""
    model, optimizer, x = trained({"placement": "probe"})
    with torch.no_grad():
        live = model(x)
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        optimizer.handle.restore()
        torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_quantising_after_patching_is_one_error_and_a_way_out(options, steps):
    quantization = pytest.importorskip("torchao.quantization")
    model, optimizer, x = trained(options, steps, width=64)
    with torch.no_grad():
        live = model(x)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises((TypeError, RuntimeError), match=r"'0\.weight'.*(restore\(\)|before it is patched)"):
        optimizer.step(lambda: model(x).square().mean())
    if steps and options:
        with torch.no_grad():  # what was learned still counts
            torch.testing.assert_close(model(x), live, rtol=0.05, atol=0.05)
        with pytest.raises(TypeError, match=r"'0\.weight' is a \w+, whose values.*discard=True"):
            optimizer.handle.restore()
    optimizer.handle.restore(**({"discard": True} if options else {}))
    again = LOZO(model, rank=2, placement="probe")  # a probe trains quantised layers
    assert torch.isfinite(again.step(lambda: model(x).square().mean()))


LAZY = {
    "linear": lambda: nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(2)),
    "norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.LazyBatchNorm1d()),
    "statistics": lambda: nn.Sequential(nn.Linear(6, 6), nn.LazyBatchNorm1d(affine=False)),
}


@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
@pytest.mark.parametrize("kind", LAZY)
def test_lazy_modules_are_named_and_work_once_they_ran(kind, options):
    model, x = LAZY[kind](), torch.randn(4, 6)
    with pytest.raises(TypeError, match=r"module '\d' \(Lazy\w+\) is lazy.*call the model once"):
        LOZO(model, rank=2, **options)
    model(x)
    optimizer = LOZO(model, rank=2, **options)
    assert torch.isfinite(optimizer.step(lambda: model(x).square().mean()))
