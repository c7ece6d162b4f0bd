"""Steps whose weights are only read, and SubZero: on a GPU, and on the CPU by the native backend and in Triton's interpreter."""

import copy
from itertools import starmap

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, SubZero, capture_step, patch
from lozo_kernels.bench.cases import as_bits
from lozo_kernels.kernels.registry import choose_backend

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
PROBES = {
    "activation": {"placement": "probe", "side": "activation"},
    "scratch": {"placement": "probe", "side": "scratch"},
    "batched": {"placement": "probe", "evaluation": "batched"},
}
METHODS = {**{name: (LOZO, options) for name, options in PROBES.items()}, "subzero": (SubZero, {})}


def serves(device, name):
    try:
        choose_backend(device, name)
    except RuntimeError:
        return False
    return True


@pytest.fixture(params=["cpu native", *(pytest.param(f"cuda {name}", marks=GPU) for name in ("triton", "cuda"))])
def place(request):
    """A device, and a backend that has kernels for it."""
    device, name = request.param.split()
    if not serves(device, name):
        pytest.skip(f"{name} does not serve {device} here")
    return torch.device(device), name


class Model(nn.Module):
    """An embedding, layers with and without a bias, and a norm: what a probe treats in different ways."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.up = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.down = nn.Linear(24, 5, bias=False)

    def forward(self, ids):
        return self.down(self.norm(torch.tanh(self.up(self.embedding(ids)))))


class Small(nn.Module):
    """For the interpreter, which takes some 30 ms a program."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.table.weight.requires_grad_(False)
        self.up = nn.Linear(8, 5, bias=False)

    def forward(self, ids):
        return self.up(self.table(ids))


def made(device, dtype=torch.float32, model=Model):
    torch.manual_seed(0)
    return model().to(device, dtype).eval(), torch.randint(20, (4, 6)).to(device)


def losses_of(model):
    return lambda ids: model(ids).float().square().mean((1, 2))


@pytest.mark.parametrize(("dtype", "beta"), [(torch.bfloat16, None), (torch.float32, 0.9)], ids=["plain", "momentum"])
@pytest.mark.parametrize("side", ["activation", "scratch"])
def test_updates_of_a_probe_have_the_bits_of_the_cpu(place, side, beta, dtype):
    """The forward pass aside, learning in factors and merging them is the same computation everywhere."""
    learned_bits(place, dtype, side=side, beta=beta)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
def test_so_they_have_in_the_interpreter():
    """On the weight side, which is asked for: to measure both would take the interpreter minutes."""
    if not serves("cpu", "triton"):
        pytest.skip("triton is not installed")
    learned_bits((torch.device("cpu"), "triton"), torch.bfloat16, model=Small, steps=1, side="scratch")


def learned_bits(place, dtype, model=Model, steps=4, beta=None, **options):
    """Updates with given projected gradients, across a window, and merges. Compares the weights with those of eager on the CPU."""
    results = []
    for device, backend in (place, (torch.device("cpu"), "eager")):
        trained, ids = made(device, dtype, model)
        handle = patch(trained, placement="probe", rank=4, interval=2, backend=backend, **options)
        if beta is not None:
            handle.enable_momentum()
        with torch.no_grad():
            handle.prepare(lambda trained=trained, ids=ids: losses_of(trained)(ids).mean())
            for step in range(steps):
                handle.update_(step, 0.7 - 0.4 * step, 0.05, weight_decay=0.1, beta=beta)
        handle.restore()
        results.append({name: p.detach().cpu() for name, p in trained.named_parameters()})
    got, want = results
    assert not [name for name, p in got.items() if not torch.equal(as_bits(p), as_bits(want[name]))]


@pytest.mark.parametrize("side", ["activation", "scratch"])
def test_parts_of_a_batch_see_what_they_see_alone(place, side):
    """Each along its own direction, in the forward passes of all."""
    device, backend = place
    model, ids = made(device)
    options = {"placement": "probe", "side": side, "backend": backend, "evaluation": "split", "directions": 2}
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, rank=4, interval=2, **options)
    for _ in range(3):
        optimizer.step(losses_of(model), ids)
    handle = optimizer.handle
    for part in range(2):
        handle.perturb_(3, 1e-2, direction=part)
        alone = losses_of(model)(ids)[2 * part : 2 * part + 2].mean()
        handle.rest_()
        handle.spread_(3, [(0, 1e-2), (1, 1e-2)], 2)
        together = losses_of(model)(ids)[2 * part : 2 * part + 2].mean()
        handle.rest_()
        assert torch.allclose(alone, together, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_those_of_weights_that_eager_moves(place, method):
    """Both losses of a step, within the rounding of a forward pass, which on a GPU may use TF32 no more than elsewhere."""
    (device, backend), (make, options) = place, METHODS[method]
    infos = []
    for name, more in ((backend, options), ("eager", {})):
        model, ids = made(device)
        optimizer = make(model, lr=1e-2, eps=1e-2, rank=4, interval=1, backend=name, **more)
        for _ in range(2):
            optimizer.step(losses_of(model), ids)
            infos.append(torch.cat([optimizer.info.loss_plus.flatten(), optimizer.info.loss_minus.flatten()]).cpu())
        optimizer.handle.restore()
    assert torch.allclose(torch.stack(infos[:2]), torch.stack(infos[2:]), rtol=1e-4)


@pytest.mark.parametrize("side", ["activation", "scratch"])
def test_a_captured_probe_takes_the_steps_of_a_plain_one(place, side):
    """In the emulation of a capture on the CPU, bit for bit; on a GPU cuBLAS may give a forward pass other bits in a graph."""
    device, backend = place
    plain, ids = made(device)
    captured = copy.deepcopy(plain)
    optimizers = [LOZO(m, lr=1e-2, eps=1e-2, rank=4, interval=2, backend=backend, **PROBES[side]) for m in (plain, captured)]
    losses = [lambda model=model: losses_of(model)(ids).mean() for model in (plain, captured)]
    try:
        step = capture_step(optimizers[1], losses[1])
    except ValueError as e:
        if "a captured step moves weights" not in str(e):
            raise
        pytest.skip("probes are not captured")
    for _ in range(3):
        assert torch.allclose(optimizers[0].step(losses[0]), step(), rtol=1e-4)
    for optimizer in optimizers:
        optimizer.handle.restore()
    if device.type == "cpu":
        assert all(starmap(torch.equal, zip(plain.parameters(), captured.parameters(), strict=True)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_nothing(method):
    make, options = METHODS[method]
    model, ids = made("cuda", torch.bfloat16)
    optimizer = make(model, lr=1e-3, rank=4, interval=5, **options)
    for _ in range(6):  # compiles, allocates, prepares, and redraws V once
        optimizer.step(losses_of(model), ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step(losses_of(model), ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
