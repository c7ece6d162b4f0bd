"""Captured steps: the same bits as plain ones, with no value read on the host."""

import copy
import warnings
from itertools import starmap

import pytest
import torch
from torch import nn
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
