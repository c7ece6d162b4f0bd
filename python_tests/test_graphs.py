"""Captured steps: the same bits as plain ones, with no value read on the host."""

import copy
import warnings
from itertools import starmap

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lozo_kernels import LOZO, MeZO, capture_step
from lozo_kernels.bench.step import same_in_capture
from lozo_kernels.kernels.backends.launches import device_table

METHODS = [
    (LOZO, {}),
    (LOZO, {"fuse_steps": True}),
    (LOZO, {"momentum": 0.9}),
    (LOZO, {"momentum": 0.9, "fuse_steps": True, "weight_decay": 0.1}),
    (LOZO, {"directions": 3, "fuse_steps": True}),
    (LOZO, {"two_sided": False, "fuse_steps": True}),
    (MeZO, {}),
    (MeZO, {"momentum": 0.9, "directions": 2}),
    (MeZO, {"rounding": "stochastic"}),
]
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])]


def make_model(device, dtype=torch.float32):
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(device, dtype)


def make_loss(device, dtype=torch.float32):
    x, y = torch.randn(64, 16, device=device, dtype=dtype), torch.randn(64, 4, device=device, dtype=dtype)
    return lambda model: nn.functional.mse_loss(model(x), y)


def same_weights(a, b):
    return all(starmap(torch.equal, zip(a.parameters(), b.parameters(), strict=True)))


class NoReads(TorchDispatchMode):
    """Fails where a program would wait for a device: a value that is read on the host, a shape that depends on one."""

    FORBIDDEN = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split(".")[0] not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class NoUploads(TorchFunctionMode):
    """Fails where a captured graph would copy from host memory that holds something else by then."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), f"{func} makes a tensor of host memory"
        return func(*args, **(kwargs or {}))


def sum_of_squares(model):
    """A loss without products of matrices, for which cuBLAS may choose another algorithm inside a graph."""
    return sum(p.float().square().mean() for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_what_cublas_does_in_a_capture_is_reported(rng, device):
    """Other bits of a forward pass are no fault of a step, so they fail nothing."""
    model, loss = make_model(device), make_loss(device)
    if not same_in_capture(lambda: loss(model)):
        warnings.warn("cuBLAS computes a forward pass with other bits inside of a CUDA graph", stacklevel=1)
    assert same_in_capture(lambda: sum_of_squares(model))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
def test_same_bits_as_plain_steps(rng, device, method, options):
    """Across windows, with a learning rate that changes; plain steps in between are fine."""
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    plain = make_model(device, dtype)
    loss = make_loss(device, dtype) if device == "cpu" else sum_of_squares
    captured, before = copy.deepcopy(plain), copy.deepcopy(plain)
    first, second = (method(m, lr=1e-2, interval=4, **options) for m in (plain, captured))
    step = capture_step(second, lambda: loss(captured))
    assert same_weights(captured, before)
    for i in range(11):
        expected = first.step(lambda: loss(plain))
        got = second.step(lambda: loss(captured)) if i == 5 else step()
        assert torch.equal(expected, got)
        if i == 6:
            for optimizer in (first, second):
                optimizer.param_groups[0]["lr"] = 5e-3
        assert second.info.step == i
    assert first.steps_done == second.steps_done == 11
    first.flush()
    second.flush()
    assert same_weights(plain, captured)
    assert not same_weights(plain, before)


@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
def test_no_value_is_read(rng, method, options):
    """The body of a captured step, as it would be recorded on a GPU."""
    model, loss = make_model("cpu"), make_loss("cpu")
    optimizer = method(model, lr=1e-2, interval=4, backend="eager", **options)
    step = capture_step(optimizer, lambda: loss(model))
    for _ in range(3):
        step()
    with NoReads():
        step._from_rest()
        if step._from_pending is not None:
            step._from_pending()


@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
def test_the_warm_up_makes_every_pass(rng, monkeypatch, method, options):
    """A capture finds all kernels compiled and all headers uploaded that a step needs."""
    host = pytest.importorskip("bench.host")
    model, loss = make_model("cpu"), make_loss("cpu")
    rounding = {"rounding": options["rounding"]} if "rounding" in options else {}
    estimator = "dense" if method is MeZO else "lowrank"
    with host.stubbed_handle(model, estimator=estimator, interval=100, **rounding) as (handle, _):
        optimizer = method(handle, lr=1e-2, **{k: v for k, v in options.items() if k not in rounding})
        step = capture_step(optimizer, lambda: loss(model))

        def prepared():
            return [set(device_table(group.table).headers._kept) | set(group.table.cache) for group in handle.groups]

        before = prepared()
        for _ in range(3):
            step()
        assert prepared() == before


PROBES = [
    (LOZO, {"side": "activation"}),
    (LOZO, {"side": "activation", "momentum": 0.9, "weight_decay": 0.1}),
    (LOZO, {"side": "scratch", "weight_decay": 0.1}),
    (LOZO, {"side": "copy", "directions": 3}),
    (LOZO, {"two_sided": False}),
    (LOZO, {"rounding": "stochastic"}),
    (MeZO, {"momentum": 0.9}),
    (LOZO, {"evaluation": "batched", "directions": 2, "weight_decay": 0.1}),
    (LOZO, {"evaluation": "batched", "directions": 2, "side": "scratch"}),
    (LOZO, {"evaluation": "batched", "two_sided": False, "side": "copy", "momentum": 0.9}),
    (LOZO, {"evaluation": "split", "directions": 4, "momentum": 0.9}),
    (MeZO, {"evaluation": "split", "directions": 2, "normalise": "spread"}),
]


def probe_step(method, options, dtype=torch.float32, device="cpu"):
    """A model, what makes an optimiser that probes a model, and what gives the arguments of its step."""
    x, y = torch.randn(16, 16, device=device, dtype=dtype), torch.randn(16, 4, device=device, dtype=dtype)

    def arguments(model):
        if "evaluation" in options:
            return lambda pair: (model(pair[0]).float() - pair[1]).pow(2).mean(1), (x, y)
        return (lambda: (model(x).float() - y).pow(2).mean(),)

    def optimizer(model):
        return method(model, lr=1e-2, placement="probe", **({"interval": 3} | options))

    return make_model(device, dtype), optimizer, arguments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("method", "options"), PROBES, ids=str)
def test_a_probe_has_the_bits_of_plain_steps(rng, device, method, options):
    """Across windows, whose ends merge; with a plain step, an evaluation and a merge in between, and a rate that changes."""
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    plain, make, arguments = probe_step(method, options, dtype, device)
    captured, before = copy.deepcopy(plain), copy.deepcopy(plain)
    first, second = make(plain), make(captured)
    inputs = torch.randn(5, 16, device=device, dtype=dtype)
    for _ in range(2):  # what the capture finds was learned already
        assert torch.equal(first.step(*arguments(plain)), second.step(*arguments(captured)))
    step = capture_step(second, *arguments(captured))
    for i in range(2, 12):
        expected = first.step(*arguments(plain))
        got = second.step(*arguments(captured)) if i == 6 else step()
        assert torch.equal(expected, got) and torch.equal(first.info.c, second.info.c)
        assert second.info.step == i
        if i == 7:
            assert torch.equal(plain(inputs), captured(inputs))
            for optimizer in (first, second):
                optimizer.param_groups[0]["lr"] = 5e-3
        if i == 9:
            for optimizer in (first, second):
                optimizer.handle.merge()
    for optimizer in (first, second):
        optimizer.handle.merge()
    assert same_weights(plain, captured) and not same_weights(plain, before)


@pytest.mark.parametrize(("method", "options"), PROBES, ids=str)
def test_no_value_of_a_probe_is_read(rng, method, options):
    """Nor is anything uploaded, and the points stay where they are, for the graph has their addresses."""
    model, make, arguments = probe_step(method, options | {"backend": "eager"})
    optimizer, before = make(model), copy.deepcopy(model)
    step = capture_step(optimizer, *arguments(model))
    assert optimizer.steps_done == 0 and not optimizer.handle.probed.learned
    assert same_weights(model, before)
    step()
    runtime = optimizer.handle.probed.runtime

    def addresses():
        return [[t.data_ptr() for kept in points._kept.values() for t in kept] for points in runtime._devices.values()]

    at = addresses()
    with NoReads(), NoUploads():
        step._from_rest()
    assert addresses() == at


def test_weights_that_a_probe_moves_are_put_back_after_the_warm_up(rng):
    """A closure that reads a weight outside of its module sees it perturbed only in its place."""
    plain, make, _ = probe_step(LOZO, {}, torch.bfloat16)
    captured, before = copy.deepcopy(plain), copy.deepcopy(plain)
    first, second = make(plain), make(captured)
    x = torch.randn(16, 16, dtype=torch.bfloat16)

    def closure(model):
        return lambda: model(x).float().square().mean() + model[0].weight.float().square().mean()

    step = capture_step(second, closure(captured))
    assert second.handle.moves_weights and same_weights(captured, before)
    for _ in range(5):
        assert torch.equal(first.step(closure(plain)), step())
    for optimizer in (first, second):
        optimizer.handle.merge()
    assert same_weights(plain, captured) and not same_weights(plain, before)


def test_a_batched_step_is_captured_with_its_inputs(rng):
    model, make, arguments = probe_step(LOZO, {"evaluation": "batched"})
    optimizer = make(model)
    closure, inputs = arguments(model)
    with pytest.raises(TypeError, match="a closure that takes the inputs"):
        capture_step(optimizer, closure)
    step = capture_step(optimizer, closure, inputs)
    other = make(copy.deepcopy(model))
    new = torch.randn_like(inputs[0])
    expected = other.step(lambda pair: (other.handle.model(pair[0]).float() - pair[1]).pow(2).mean(1), (new, inputs[1]))
    inputs[0].copy_(new)
    assert torch.equal(step(), expected)


def test_the_reader_of_values_is_caught():
    with NoReads(), pytest.raises(AssertionError, match="waits for the device"):
        float(torch.ones(()))


def test_non_finite_losses_are_skipped_and_counted(rng):
    model, loss = make_model("cpu"), make_loss("cpu")
    bad = torch.tensor(1.0)
    optimizer = LOZO(model, lr=1e-2)
    step = capture_step(optimizer, lambda: loss(model) * bad)
    step()
    before = copy.deepcopy(model)
    bad.fill_(float("nan"))
    with pytest.warns(UserWarning, match="update skipped"):
        step()
    assert int(optimizer.info.skipped_total) == 1
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    bad.fill_(1.0)
    step()
    assert [int(optimizer.info.skipped_total), int(optimizer.info.skipped_in_a_row)] == [1, 0]


def test_parameter_groups_and_tensor_learning_rates(rng):
    plain, loss = make_model("cpu"), make_loss("cpu")
    captured = copy.deepcopy(plain)
    steps, rates = [], []
    for model in (plain, captured):
        rate = torch.tensor(1e-2)
        groups = [{"params": list(model[0].parameters()), "lr": rate}, {"params": list(model[2].parameters()), "lr": 1e-3}]
        optimizer = LOZO(model, groups, interval=3)
        rates.append(rate)
        steps.append(
            capture_step(optimizer, lambda m=model: loss(m))
            if model is captured
            else (lambda m=model, o=optimizer: o.step(lambda: loss(m)))
        )
    for i in range(6):
        assert torch.equal(*(step() for step in steps))
        if i == 2:
            for rate in rates:
                rate.fill_(3e-3)
    assert same_weights(plain, captured)


def test_what_cannot_be_captured_is_refused(rng):
    model, loss = make_model("cpu"), make_loss("cpu")
    model.insert(1, nn.Dropout())
    before = copy.deepcopy(model)
    optimizer = LOZO(model)
    with pytest.raises(ValueError, match="draws random numbers"):
        capture_step(optimizer, lambda: loss(model))
    assert same_weights(model, before) and optimizer.steps_done == 0
    model.eval()
    step = capture_step(optimizer, lambda: loss(model))
    optimizer.eps = 1e-2
    with pytest.raises(RuntimeError, match="changed since the capture"):
        step()
    optimizer.eps = 1e-3
    model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(RuntimeError, match="storage of the model moved"):
        step()
