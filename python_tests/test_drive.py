"""Models that are driven by ``loss.backward(); optimizer.step()``: the run of a closure, whatever a loop does to gradients."""

import collections
import copy
import inspect
import io
import pickle
import types

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, NonFiniteLossError, handle_of, patch
from lozo_kernels.model.backward import SHRINK
from python_tests.models import Zoo, same, weights


class Scored(Zoo):
    """The zoo with its loss, in the ways that models return one."""

    def __init__(self, kind="dict", dropout=0.0):
        super().__init__()
        self.kind, self.drop = kind, nn.Dropout(dropout)

    def forward(self, tokens, labels=None):
        logits = self.drop(super().forward(tokens[:, :-1]).float())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return {
            "dict": lambda: {"loss": loss, "logits": logits},
            "tuple": lambda: (loss, logits),
            "named tuple": lambda: collections.namedtuple("Output", "loss logits")(loss, logits),
            "object": lambda: types.SimpleNamespace(loss=loss, logits=logits),
            "tensor": lambda: loss.reshape(1),
            "logits": lambda: logits,
            "no loss": lambda: {"logits": logits},
        }[self.kind]()


def loss_in(output):
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict):
        return output["loss"]
    return output[0] if isinstance(output, tuple) else output.loss


def batches(count, size=4):
    return [torch.randint(0, 11, (size, 9), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def pair(**options):
    """The same model twice, for a closure and for backward."""
    torch.manual_seed(0)
    first = Scored(dropout=options.pop("dropout", 0.0)).train()
    second = copy.deepcopy(first)
    cls = options.pop("cls", LOZO)
    options = {"lr": 1e-4, "seed": 5, "interval": 4} | options
    if cls is MeZO:
        del options["interval"]
    return (first, cls(first, **options)), (second, cls(second, drive="backward", **options))


def backward_step(model, optimizer, *some):
    for tokens in some:
        (loss_in(model(tokens)) / len(some)).backward()
    loss = optimizer.step()
    optimizer.zero_grad()
    return loss


def distance(a, b):
    a, b = weights(a), weights(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


VARIANTS = {
    "lozo": {},
    "lozo-m": {"momentum": 0.8},
    "mezo": {"cls": MeZO},
    "directions": {"directions": 3},
    "one-sided": {"two_sided": False, "directions": 2},
    "decay": {"weight_decay": 0.1},
    "probe": {"placement": "probe"},
    "probe-m": {"placement": "probe", "momentum": 0.8, "directions": 2},
    "scratch": {"placement": "probe", "side": "scratch"},
    "dropout": {"dropout": 0.3},
    "auto": {"placement": "auto"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_the_run_of_a_closure(variant):
    (a, closing), (b, driven) = pair(**VARIANTS[variant])
    start = weights(a)
    for tokens in batches(10):
        torch.manual_seed(1)
        first = closing.step(lambda tokens=tokens: a(tokens)["loss"])
        torch.manual_seed(1)
        second = backward_step(b, driven, tokens)
        assert float(first) == pytest.approx(float(second), rel=1e-5)
        assert torch.allclose(closing.info.loss_plus, driven.info.loss_plus, rtol=1e-5)
    assert driven.steps_done == 10 and int(driven.info.skipped_total) == 0
    closing.handle.restore()
    driven.handle.restore()
    assert distance(a, b) < 1e-5 < max((weights(a)[n] - start[n]).abs().max() for n in start)
    if "probe" in variant or variant == "scratch":  # no rounding of perturbations that could differ
        assert same(weights(a), weights(b))


def test_500_steps():
    (a, closing), (b, driven) = pair(lr=1e-4, interval=50)
    for tokens in batches(20) * 25:
        closing.step(lambda tokens=tokens: a(tokens)["loss"])
        backward_step(b, driven, tokens)
    closing.handle.restore()
    driven.handle.restore()
    assert distance(a, b) < 1e-5


@pytest.mark.parametrize("kind", ["dict", "tuple", "named tuple", "object", "tensor"])
def test_kinds_of_output(kind):
    model = Scored(kind).train()
    (tokens,) = batches(1)
    with torch.no_grad():
        at_rest = loss_in(model(tokens))
    optimizer = LOZO(model, lr=1e-3, drive="backward")
    output = model(tokens)
    loss = loss_in(output)
    assert loss.shape == at_rest.shape and loss.requires_grad and torch.allclose(loss, at_rest, atol=1e-2)
    if kind != "tensor":
        logits = output[1] if isinstance(output, tuple) else output["logits"] if kind == "dict" else output.logits
        with pytest.raises(RuntimeError, match="only that loss is trained"):
            logits.sum().backward()
    loss.backward()
    c = optimizer.projected_gradient.clone()
    assert float(optimizer.step()) == pytest.approx(loss.item(), abs=1e-6)
    assert torch.equal(optimizer.info.c, c) and optimizer.projected_gradient is None


@pytest.mark.parametrize(("kind", "found"), [("no loss", "only logits"), ("logits", "a tensor of shape")])
def test_a_model_without_a_loss(kind, found):
    model = Scored(kind).train()
    before = weights(model)
    optimizer = LOZO(model, drive="backward")
    with pytest.raises(TypeError, match=f"must return its loss.*{found}"):
        model(*batches(1))
    optimizer.handle.restore()
    assert all(torch.allclose(p, before[name], atol=1e-6) for name, p in weights(model).items())


def test_micro_batches_are_one_batch():
    (a, closing), (b, driven) = pair(dropout=0.2)
    for i in range(6):
        first, second = batches(2, size=3) if i % 2 else batches(2, size=5)
        torch.manual_seed(i)
        closing.step([lambda x=x: a(x)["loss"] for x in (first, second)])
        torch.manual_seed(i)
        backward_step(b, driven, first, second)
        assert torch.allclose(closing.info.c, driven.info.c, atol=2e-3)
        assert torch.allclose(closing.info.loss_plus, driven.info.loss_plus, rtol=1e-5)
    driven.handle.restore()
    assert distance(a, b) < 1e-5


def test_nothing_advances_before_the_step():
    model = Scored().train()
    optimizer = LOZO(model, lr=1e-2, drive="backward", placement="probe")
    handle = optimizer.handle
    (tokens,) = batches(1)
    before = weights(model)
    losses = [model(tokens)["loss"] for _ in range(3)]
    assert losses[0] == losses[1] == losses[2] and optimizer.steps_done == 0
    losses[0].backward()
    c = optimizer.projected_gradient.clone()
    losses[1].backward()
    assert torch.equal(optimizer.projected_gradient, 2 * c)
    optimizer.zero_grad()
    assert optimizer.projected_gradient is None
    with torch.no_grad():
        assert torch.equal(model(tokens)["loss"], model.eval()(tokens)["loss"])  # at rest
    assert same(before, weights(model))
    assert optimizer.steps_done == 0 and handle_of(model) is handle


def test_order_of_calls():
    model = Scored().train()
    handle = patch(model, drive="backward")
    (tokens,) = batches(1)
    with pytest.raises(RuntimeError, match="has no optimiser"):
        model(tokens)
    optimizer = LOZO(handle, lr=1e-3)
    with pytest.raises(RuntimeError, match="no projected gradient"):
        optimizer.step()
    backward_step(model, optimizer, tokens)
    with pytest.raises(RuntimeError, match="no projected gradient"):
        optimizer.step()
    with pytest.raises(TypeError, match="called with its inputs"):
        optimizer.step(lambda x: x, tokens)
    assert optimizer.steps_done == 1


def test_a_closure_is_called_once_as_by_lightning():
    (a, plain), (b, driven) = pair()
    calls = []

    def closure():
        driven.zero_grad()
        loss = b(tokens)["loss"]
        loss.backward()
        calls.append(1)
        return loss

    for tokens in batches(3):
        plain.step(lambda tokens=tokens: a(tokens)["loss"])
        driven.step(closure)
    driven.handle.restore()
    assert len(calls) == 3 and distance(a, b) < 1e-5


def test_gradients_are_clipped_scaled_and_summed_without_effect():
    """What loops do to gradients, against a loop that does nothing: bit for bit."""
    (_, _), (a, plain) = pair(placement="probe")
    (_, _), (b, busy) = pair(placement="probe")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, [lambda t: 1 / (t + 1)]) for o in (plain, busy)]
    for tokens in batches(5):
        backward_step(a, plain, tokens)
        scaler.scale(b(tokens)["loss"]).backward()
        scaler.unscale_(busy)
        norm = torch.nn.utils.clip_grad_norm_(b.parameters(), 1.0)
        assert 0 < norm < 1e-6
        scaler.step(busy)
        scaler.update()
        b.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert plain.param_groups[0]["lr"] == busy.param_groups[0]["lr"] == 1e-4 / 6
    plain.handle.restore()
    busy.handle.restore()
    assert same(weights(a), weights(b))


def test_an_overflow_under_a_scaler_skips_the_step():
    model = Scored().train()
    optimizer = LOZO(model, lr=1e-3, drive="backward", placement="probe")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(model(*batches(1))["loss"] * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.steps_done == 2 and scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_losses_that_are_not_finite(placement):
    model = Scored().train()
    optimizer = LOZO(model, lr=1e-3, drive="backward", max_nonfinite=2, placement=placement)
    backward_step(model, optimizer, *batches(1))
    before = {name: optimizer.handle.model.get_parameter(name).clone() for name in optimizer.handle.names}
    with pytest.warns(UserWarning, match="update skipped"):
        (model(*batches(1))["loss"] * float("nan")).backward()
        optimizer.step()
    assert bool(optimizer.info.skipped) and optimizer.info.c.item() == 0
    for name, value in before.items():
        assert torch.allclose(model.get_parameter(name), value, atol=1e-6)
    with pytest.raises(NonFiniteLossError):
        (model(*batches(1))["loss"] * float("inf")).backward()
        optimizer.step()


def test_an_exception_in_the_forward_leaves_the_weights():
    model = Scored().train()
    optimizer = LOZO(model, lr=1e-3, drive="backward")
    before = {name: model.get_parameter(name).clone() for name in optimizer.handle.names}
    calls = []
    hook = model.norm.register_forward_hook(lambda *_: calls.append(1) or (1 / 0 if len(calls) == 2 else None))
    with pytest.raises(ZeroDivisionError):
        model(*batches(1))
    hook.remove()
    for name, value in before.items():
        assert torch.allclose(model.get_parameter(name), value, atol=1e-6)
    backward_step(model, optimizer, *batches(1))


def test_both_evaluations_draw_the_same_dropout():
    model = Scored(dropout=0.5).train()
    seen = []
    model.drop.register_forward_hook(lambda _, args, out: seen.append((out == 0).clone()))
    optimizer = LOZO(model, eps=1e-6, drive="backward", directions=2)
    backward_step(model, optimizer, *batches(2))
    first, second = seen[:4], seen[4:]
    assert all(torch.equal(mask, first[0]) for mask in first) and all(torch.equal(mask, second[0]) for mask in second)
    assert not torch.equal(first[0], second[0])


def test_checkpoints_do_not_have_the_parameter():
    plain = Scored()
    model = copy.deepcopy(plain).train()
    optimizer = LOZO(model, drive="backward", directions=2)
    assert model.state_dict().keys() == plain.state_dict().keys()
    result = model.load_state_dict(plain.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["projected_gradient.value"] == list(dict(model.named_parameters()))[-1:]
    for refused in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="driven model cannot be"):
            refused(model)
    optimizer.handle.restore()
    optimizer.handle.restore()
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in plain.named_parameters()
    ]
    model(*batches(1))["loss"].backward()
    assert model.up.weight.grad is not None and "_call_impl" not in copy.deepcopy(model).__dict__


def test_only_training_calls_are_driven():
    model = Scored().train()
    signature = inspect.signature(model.forward)
    optimizer = LOZO(model, drive="backward", include="up.*")
    assert inspect.signature(model.forward) == signature
    (tokens,) = batches(1)
    with pytest.raises(RuntimeError, match="from a call of Linear"):
        model.up(torch.randn(2, 5)).sum().backward()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not model(tokens)["loss"].requires_grad
    with pytest.raises(RuntimeError, match="in eval mode"):
        model.eval()(tokens)["loss"].backward()
    assert optimizer.projected_gradient is None
    assert model.train()(tokens)["loss"].requires_grad


def test_casts_keep_the_parameter_exact():
    model = Scored().train()
    optimizer = LOZO(model, drive="backward", lr=1e-3)
    model.to(torch.bfloat16)
    value = optimizer.handle.backward.value
    assert value.dtype == torch.float64 and next(model.parameters()).dtype == torch.bfloat16
    model(*batches(1))["loss"].backward()
    assert value.grad[0].item() / SHRINK == optimizer.projected_gradient.item()
    optimizer.step()


def test_autocast_around_both_evaluations():
    """The context caches casts of weights that require a gradient, which must not be those of the first evaluation."""
    found = []
    for drive in ("backward", "closure"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0), Mean()).train()
        optimizer = LOZO(model, eps=1e-1, drive=drive)
        found.append(autocast_step(model, optimizer, torch.randn(16, 6)))
    assert found[0] == found[1] != 0


def autocast_step(model, optimizer, x):
    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    if hasattr(model, "projected_gradient"):  # which a Sequential runs through
        loss().backward()
        optimizer.step()
    else:
        optimizer.step(loss)
    return optimizer.info.c.item()


class Mean(nn.Module):
    def forward(self, x):
        return x.square().mean()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"placement": "probe", "side": "scratch", "momentum": 0.9}], ids=str)
def test_resumes_bit_for_bit_whichever_way_it_is_driven(options):
    options = {"lr": 1e-3, "interval": 4, "seed": 5, "weight_decay": 0.01} | options
    torch.manual_seed(0)
    start = Scored().state_dict()

    def run(optimizer, model, some):
        for tokens in some:
            backward_step(model, optimizer, tokens)

    whole = Scored().train()
    whole.load_state_dict(start)
    optimizer = LOZO(whole, drive="backward", **options)
    run(optimizer, whole, batches(10)[:6])
    memory = io.BytesIO()
    torch.save((whole.state_dict(), optimizer.state_dict()), memory)
    run(optimizer, whole, batches(10)[6:])

    memory.seek(0)
    saved, state = torch.load(memory, weights_only=True)
    resumed = Scored().train()
    resumed.load_state_dict(saved)
    again = LOZO(resumed, drive="backward", **options)
    again.load_state_dict(state)
    run(again, resumed, batches(10)[6:])
    closing = LOZO(Scored(), **options)
    closing.load_state_dict(state)  # the same format
    for each in (optimizer, again):
        each.handle.restore()
    assert same(weights(whole), weights(resumed)) and closing.steps_done == 6


def test_groups_and_their_decay():
    (a, closing), (b, driven) = pair()
    for optimizer in (closing, driven):
        optimizer.handle.restore()
    made = []
    for model, drive in ((a, "closure"), (b, "backward")):
        handle = patch(model, seed=5, drive=drive)
        two = [p for p in handle.parameters if p.dim() > 1], [p for p in handle.parameters if p.dim() < 2]
        groups = [{"params": two[0], "weight_decay": 0.1}, {"params": two[1], "lr": 1e-3}]
        made.append(LOZO(handle, groups, lr=1e-4))
    closing, driven = made
    for tokens in batches(5):
        closing.step(lambda tokens=tokens: a(tokens)["loss"])
        backward_step(b, driven, tokens)
    assert driven.state_dict()["param_groups"] == closing.state_dict()["param_groups"]
    driven.handle.restore()
    assert distance(a, b) < 1e-5


@pytest.mark.parametrize("when", ["before", "around"])
def test_compiled_models(when):
    """Compiled before patching, its evaluations are; a compiler around a driven model leaves it alone."""
    (a, plain), (b, compiled) = pair(placement="probe", side="activation")
    compiled.handle.restore()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if when == "before":
        b.compile(backend=backend)
    compiled = LOZO(b, lr=1e-4, seed=5, interval=4, drive="backward", placement="probe", side="activation")
    called = torch.compile(b, backend=backend) if when == "around" else b
    for tokens in batches(3):
        backward_step(called, compiled, tokens)
        plain.step(lambda tokens=tokens: a(tokens)["loss"])
    for optimizer in (plain, compiled):
        optimizer.handle.restore()
    assert distance(a, b) < 1e-6 and bool(graphs) == (when == "before")
    assert (b._compiled_call_impl is not None) == (when == "before") and b(*batches(1))["loss"].requires_grad


def test_gradient_checkpointing_is_switched_off():
    class Checkpointing(Scored):
        is_gradient_checkpointing = True

        def gradient_checkpointing_disable(self):
            self.is_gradient_checkpointing = False

    model = Checkpointing().train()
    optimizer = LOZO(model, drive="backward")
    with pytest.warns(UserWarning, match="checkpointing was switched off"):
        backward_step(model, optimizer, *batches(1))
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fuse_steps": True}, ValueError, "fuse_steps leaves weights perturbed"),
        ({"evaluation": "batched", "placement": "probe"}, ValueError, "needs the loss of each example"),
        ({"drive": "sideways"}, ValueError, "drive is one of"),
    ],
)
def test_what_does_not_go_together(options, error, message):
    model = Scored()
    with pytest.raises(error, match=message):
        LOZO(model, **{"drive": "backward"} | options)
    assert handle_of(model) is None and [n for n, p in model.named_parameters() if not p.requires_grad] == ["frozen"]
    assert not hasattr(model, "projected_gradient")


def test_wrapped_and_clashing_models():
    model = Scored()
    with pytest.raises(TypeError, match=r"patch model\.module before"):
        patch(nn.DataParallel(model), drive="backward")
    optimizer = LOZO(model, drive="backward")
    with pytest.raises(RuntimeError, match="start one process per device"):
        model.projected_gradient._replicate_for_data_parallel()
    optimizer.handle.restore()
    model.projected_gradient = nn.Identity()
    with pytest.raises(ValueError, match="of its own"):
        patch(model, drive="backward")
    assert handle_of(model) is None and model.up.weight.requires_grad
