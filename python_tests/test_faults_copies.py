"""Copies and pickles of models that are trained: they are the model as it was before it was patched, with what it learned."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from lozo_kernels import LOZO, MeZO, SubZero, handle_of, patch

PLACEMENTS = [
    {},
    {"momentum": 0.9},
    {"fuse_steps": True},
    {"placement": "probe"},
    *({"placement": "probe", "side": side} for side in ("activation", "scratch", "copy")),
    {"placement": "probe", "momentum": 0.9, "weight_decay": 0.1},
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(13, 16), nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16))
        self.head = nn.Linear(16, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def train(model, steps=3, kind=LOZO, **options):
    tokens = torch.randint(13, (3, 5))
    optimizer = kind(model, lr=1e-2, eps=1e-2, rank=2, interval=50, **options)
    for _ in range(steps):
        optimizer.step(lambda: loss_of(model, tokens))
    return optimizer


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, through_pickle, through_torch_save]


def is_free(made, model, tokens):
    """Whether a copy is a model of its own: changing either does not change the other, and nothing of a patch is left in it."""
    before = model(tokens)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    plain = {*nn.Linear(1, 1).__dict__, *(name for m in made.modules() for name in m._modules)}
    extra = {name for m in made.modules() for name in m.__dict__ if name not in plain} - {"normalized_shape", "eps"}
    names = {"forward", "__reduce_ex__", "__deepcopy__", "named_modules", "_old_forward"}
    hooks = sum(
        len(m._forward_pre_hooks) + len(m._state_dict_pre_hooks) + len(m._load_state_dict_pre_hooks) for m in made.modules()
    )
    return bool(made(tokens).eq(0).all()) and torch.equal(model(tokens), before) and not names & extra and hooks == 0


@pytest.mark.parametrize("make", COPIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_a_copy_has_what_was_learned_and_is_free(options, make):
    model = Net()
    optimizer = train(model, **options)
    tokens = torch.randint(13, (2, 4))
    made = make(model)
    assert torch.equal(made(tokens), model(tokens))
    assert made.head.weight is made.embed.weight
    assert is_free(made, model, tokens)
    assert handle_of(made) is None and handle_of(model) is optimizer.handle
    optimizer.step(lambda: loss_of(model, tokens))  # the run goes on


@pytest.mark.parametrize("kind", [LOZO, MeZO, SubZero])
@pytest.mark.parametrize("options", [{}, {"fuse_steps": True}, {"placement": "probe"}], ids=str)
def test_a_copy_can_be_trained_and_the_run_keeps_its_bits(kind, options):
    def run(copies):
        torch.manual_seed(4)
        model = Net()
        tokens = torch.randint(13, (3, 5))
        optimizer = train(model, kind=kind, **options)
        if copies:
            made = copy.deepcopy(model)
            other = train(made, kind=kind, **options)
            assert other.handle.model is made
        else:
            optimizer.handle.merge()
            optimizer.flush()
            torch.randint(13, (3, 5))
        torch.manual_seed(5)
        for _ in range(3):
            optimizer.step(lambda: loss_of(model, tokens))
        return model.state_dict()

    one, two = run(True), run(False)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_part_of_a_model_is_copied_with_what_it_learned():
    model = Net()
    train(model, placement="probe", side="activation")
    x = torch.randn(2, 16)
    made = copy.deepcopy(model.body)
    assert torch.equal(made(x), model.body(x)) and not torch.equal(made[0].weight, Net().body[0].weight)
    with torch.no_grad():
        made[0].weight.zero_()
    assert model.body[0].weight.any()


def test_a_wrapper_is_copied_with_the_model_in_it():
    model = Net()
    train(model, placement="probe")
    tokens = torch.randint(13, (2, 4))
    made = copy.deepcopy(nn.ModuleDict({"policy": model}))["policy"]
    assert torch.equal(made(tokens), model(tokens)) and is_free(made, model, tokens)


def test_classes_that_copy_themselves():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Linear(6, 6))
    data = torch.randn(3, 6)
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, placement="probe", include=["1.*"])
    for _ in range(2):
        optimizer.step(lambda: model(data).square().mean())
    made = copy.deepcopy(model)
    assert torch.equal(made(data), model(data))
    with torch.no_grad():
        made[1].weight.zero_()
    assert not torch.equal(made(data), model(data))


def test_forwards_that_others_replaced_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].forward = Doubled(model[1])
    data = torch.randn(3, 4)
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, placement="probe")
    optimizer.step(lambda: model(data).square().mean())
    made = copy.deepcopy(model)
    assert isinstance(made[1].forward, Doubled) and made[1].forward.layer is made[1]
    assert torch.equal(made(data), model(data))


class Doubled:
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return 2 * nn.functional.linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("options", [{}, {"fuse_steps": True}, {"placement": "probe"}], ids=str)
def test_handles_and_optimisers_are_refused_with_the_way_out(options):
    model = Net()
    optimizer = train(model, **options)
    for made, thing in [(copy.deepcopy, optimizer), (pickle.dumps, optimizer), (copy.deepcopy, optimizer.handle)]:
        with pytest.raises(TypeError, match="copy the model"):
            made(thing)
    model.optimizer = optimizer  # as some training loops keep it
    with pytest.raises(TypeError, match="copy the model"):
        copy.deepcopy(model)


def test_a_driven_model_is_refused():
    model = Net()
    handle = patch(model, drive="backward", placement="probe")
    with pytest.raises(TypeError, match="copy it before patching"):
        copy.deepcopy(model)
    handle.restore()
    copy.deepcopy(model)


@pytest.mark.parametrize("what", [copy.deepcopy, lambda model: model.state_dict(), through_pickle])
def test_inside_a_closure_a_probe_has_no_weights_to_show(what):
    model, tokens = Net(), torch.randint(13, (3, 5))
    optimizer = train(model, placement="probe")

    def closure():
        what(model)
        return loss_of(model, tokens)

    with pytest.raises(RuntimeError, match="outside of the closure"):
        optimizer.step(closure)
    optimizer.step(lambda: loss_of(model, tokens))


@pytest.mark.parametrize("options", [{"placement": "probe"}, {"fuse_steps": True}], ids=str)
def test_a_model_keeps_what_it_learned_when_its_optimiser_is_gone(options):
    model = Net()
    train(model, **options)  # a function that trains and returns nothing
    fresh, tokens = Net(), torch.randint(13, (2, 4))
    fresh.load_state_dict(model.state_dict())
    fresh.head.weight = fresh.embed.weight
    assert torch.equal(fresh(tokens), model(tokens))
    with pytest.raises(RuntimeError, match="patched already"):
        LOZO(model)


@pytest.mark.parametrize("options", [{"placement": "probe"}, {"fuse_steps": True}, {}], ids=str)
def test_averages(options):
    """torch's averages, which copy the model and then read ``parameters()`` after every step."""
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(13, (3, 5))
    averages = []
    for one, some in ((model, options), (plain, {})):
        optimizer = LOZO(one, lr=1e-2, eps=1e-2, rank=2, seed=3, **some)
        average = AveragedModel(one)
        for _ in range(4):
            optimizer.step(lambda one=one: loss_of(one, tokens))
            average.update_parameters(one)
        averages.append(average.module)
    got, expected = (average(tokens) for average in averages)
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, Net()(tokens), atol=1e-5)


def test_a_probe_cannot_be_replicated_over_devices():
    model = Net()
    train(model, placement="probe")
    with pytest.raises(RuntimeError, match="DataParallel"):
        model._replicate_for_data_parallel()
