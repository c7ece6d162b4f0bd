"""Faults of single steps: casts that autocast keeps, losses that are finite only in fp64, steps within steps."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, SubZero, patch

PLACEMENTS = ["inplace", "probe"]
KINDS = [LOZO, MeZO, SubZero]


def make(dtype=torch.float32):
    return nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 3)).to(dtype)


def batch():
    return torch.randint(11, (6,)), torch.randint(3, (6,))


def loss_of(model, data):
    return nn.functional.cross_entropy(model(data[0]).float(), data[1])


@pytest.mark.parametrize("where", ["around the step", "in the closure"])
@pytest.mark.parametrize("options", [{}, {"directions": 2}, {"two_sided": False}, {"fuse_steps": True}], ids=str)
@pytest.mark.parametrize("placement", ["inplace", "activation", "scratch", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_sees_the_weights_of_each_evaluation(kind, placement, options, where):
    """Autocast keeps the casts of fp32 parameters until its block ends, so that an evaluation would see those of another point."""
    if placement != "inplace":
        options = {"placement": "probe", "side": placement} | {k: v for k, v in options.items() if k != "fuse_steps"}
    first, second = make(), make()
    second.load_state_dict(first.state_dict())
    data = batch()

    def inside(model):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, data)

    settings = {"lr": 1e-2, "eps": 0.1, "seed": 5, **options}
    one, two = kind(first, **settings), kind(second, **settings)
    for _ in range(3):
        one.step(lambda: inside(first))
        with torch.autocast("cpu", torch.bfloat16):
            two.step(lambda: inside(second) if where == "in the closure" else loss_of(second, data))
        assert float(one.info.c[0]) != 0.0
        assert torch.equal(one.info.c, two.info.c)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_autocast_around_passes_of_a_handle(placement):
    model, data = make(), batch()
    handle = patch(model, placement=placement)
    handle.prepare(lambda: loss_of(model, data))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rest = loss_of(model, data)
        handle.perturb_(0, 0.3)
        plus = loss_of(model, data)
        handle.perturb_(0, -0.3)
        assert plus != rest
        assert handle.moves_weights or loss_of(model, data) == rest


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"fuse_steps": True}, {"two_sided": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_fp32_cannot_take_is_skipped(kind, options):
    """A loss of 1e38 is finite, and so is c in fp64. In fp32, where weights are updated, it is not."""
    model, data = make(), batch()
    optimizer = kind(model, lr=1.0, eps=1e-3, **options)
    optimizer.step(lambda: loss_of(model, data) * 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(lambda: loss_of(model, data).double() * 1e38)
    assert bool(optimizer.info.skipped) and not optimizer.info.c.any()
    optimizer.flush()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(torch.allclose(p, b, atol=1e-5) or "fuse_steps" in options for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_within_a_step(placement):
    model, data = make(), batch()
    optimizer = LOZO(model, placement=placement)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        optimizer.step(lambda: loss_of(model, data))
        return loss_of(model, data)

    with pytest.raises(RuntimeError, match="under way: its closure calls step"):
        optimizer.step(closure)
    assert all(torch.allclose(p, b, atol=1e-6) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.step(lambda: loss_of(model, data))
    assert optimizer.steps_done == 1


def test_two_threads():
    model, data = make(), batch()
    optimizer = LOZO(model)
    entered, go_on = threading.Event(), threading.Event()

    def closure():
        entered.set()
        go_on.wait()
        return loss_of(model, data)

    thread = threading.Thread(target=lambda: optimizer.step(closure))
    thread.start()
    entered.wait()
    try:
        with pytest.raises(RuntimeError, match="two threads"):
            optimizer.step(lambda: loss_of(model, data))
    finally:
        go_on.set()
        thread.join()
    assert optimizer.steps_done == 1


@pytest.mark.parametrize("placement", ["activation", "scratch", "copy"])
@pytest.mark.parametrize("kind", [LOZO, SubZero])
def test_all_losses_of_a_one_sided_step_see_the_same_merged_weights(kind, placement):
    """Where a window begins, a merge rounds bf16 weights: F(+) after it less F(0) before it would be mostly the rounding."""
    model, data = make(torch.bfloat16), batch()
    optimizer = kind(model, lr=0.1, eps=1e-2, interval=2, placement="probe", side=placement, two_sided=False)
    windows = []

    def closure():
        windows.append(optimizer.handle.window)  # entering one merges what was learned in the one before
        return loss_of(model, data)

    for step in range(5):
        windows.clear()
        optimizer.step(closure)
        assert windows[-2:] == [step // 2] * 2


@pytest.mark.parametrize("options", [{"placement": "inplace", "fuse_steps": True}, {"placement": "probe"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_a_restored_optimiser_does_not_wait_for_the_garbage_collector(kind, options):
    model, data = make(), batch()
    optimizer = kind(model, lr=1e-3, momentum=0.9, **options)
    optimizer.step(lambda: loss_of(model, data))
    gone = [weakref.ref(optimizer), weakref.ref(optimizer.handle), weakref.ref(optimizer.stepper)]
    gc.collect()
    gc.disable()
    try:
        optimizer.handle.restore()
        del optimizer
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()
