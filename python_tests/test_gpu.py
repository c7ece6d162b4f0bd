"""What only a GPU can show: nothing waits, streams and devices are respected, and a run is the CPU's bit for bit."""

import copy

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, Draw, MeZO, TensorTable, capture_step
from lozo_kernels.bench.cases import as_bits
from lozo_kernels.kernels import ops
from lozo_kernels.kernels.registry import backend_names, choose_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def gpu_backends():
    if not torch.cuda.is_available():
        return ["triton", "cuda"]
    return [n for n in backend_names() if n != "eager" and serves(n)]


def serves(name):
    try:
        choose_backend("cuda", name)
    except RuntimeError:
        return False
    return True


@pytest.fixture(params=gpu_backends())
def name(request):
    return request.param


@pytest.fixture
def no_waiting():
    """Any synchronisation inside the test raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def small_model(dtype=torch.float32):
    """One matrix is large enough for the kernels with 128-bit access, the others share the safe one."""
    return nn.Sequential(nn.Linear(64, 2048), nn.Tanh(), nn.Linear(2048, 2048), nn.Tanh(), nn.Linear(2048, 7)).to("cuda", dtype)


def closure(model, device="cuda"):
    x = torch.randn(32, 64, device=device, dtype=model[0].weight.dtype)
    return lambda: model(x).square().mean()


@pytest.mark.parametrize("options", [{}, {"fuse_steps": True}, {"momentum": 0.9}, {"weight_decay": 0.1, "directions": 2}], ids=str)
@pytest.mark.parametrize("method", [LOZO, MeZO])
def test_a_step_waits_for_nothing(name, method, options, request):
    model = small_model(torch.bfloat16)
    optimizer = method(model, lr=1e-3, interval=5, backend=name, **options)
    loss = closure(model)
    optimizer.step(loss)  # compiles and allocates
    optimizer.step(loss)
    request.getfixturevalue("no_waiting")
    for _ in range(12):  # across windows
        optimizer.step(loss)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("fuse_steps", [False, True])
def test_a_captured_step_waits_for_nothing(name, fuse_steps, directions, request):
    model = small_model(torch.bfloat16)
    optimizer = LOZO(model, lr=1e-3, interval=5, backend=name, fuse_steps=fuse_steps, directions=directions)
    step = capture_step(optimizer, closure(model))
    for _ in range(6):
        step()
    request.getfixturevalue("no_waiting")
    for _ in range(12):
        step()
    assert optimizer.steps_done == 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_run_of_given_losses_has_the_bits_of_the_cpu(name, dtype):
    """The forward pass aside, training on a GPU and on a CPU is the same computation."""
    losses = [0.5, 0.25, 1.5, 1.0, 0.125, 0.75, 0.5, 0.0]
    results = []
    for device, backend in (("cuda", name), ("cpu", None)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 200), nn.Linear(2048, 2048), nn.Linear(200, 33)).to(dtype).to(device)
        given = iter(losses)
        optimizer = LOZO(model, lr=1e-1, eps=1e-2, rank=4, interval=2, momentum=0.9, weight_decay=0.1, backend=backend)
        for _ in range(4):
            optimizer.step(lambda given=given, device=device: torch.tensor(next(given), device=device))
        results.append([p.detach().cpu() for p in model.parameters()])
    for gpu, cpu in zip(*results, strict=True):
        assert torch.equal(as_bits(gpu), as_bits(cpu))


def test_on_a_side_stream(name):
    """Work is put on the current stream: a pass waits for what was queued there before, and nothing else."""
    x = torch.zeros(1, 512, 1024, device="cuda")
    table = TensorTable([x], [7])
    stream = torch.cuda.Stream()
    backend = choose_backend("cuda", name).backend
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(1.0)
        ops.dense_update_(table, seed=1, draws=[Draw(0)], scales=0.5, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    expected = torch.ones(1, 512, 1024)
    ops.dense_update_(TensorTable([expected], [7]), seed=1, draws=[Draw(0)], scales=0.5)
    assert torch.equal(x.cpu(), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_model_on_two_devices(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 8))
    together = copy.deepcopy(model).to("cuda:0")
    model[0].to("cuda:0")
    model[1].to("cuda:1")
    x = torch.randn(16, 64, device="cuda:0")
    first, second = LOZO(together, lr=1e-2, backend=name), LOZO(model, lr=1e-2, backend=name)
    for _ in range(3):
        first.step(lambda: together(x).square().mean())
        second.step(lambda: model[1](model[0](x).to("cuda:1")).square().mean())
    for p, q in zip(together.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p.cpu(), q.cpu(), atol=1e-6)


def test_the_current_device_need_not_be_the_table_s(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is no second GPU")
    x = torch.zeros(1, 64, 64, device="cuda:1")
    with torch.cuda.device("cuda:0"):
        backend = choose_backend("cuda:1", name).backend
        ops.dense_update_(TensorTable([x], [7]), seed=1, draws=[Draw(0)], scales=0.5, backend=backend)
    assert torch.isfinite(x).all() and x.any()


def test_under_inference_mode(name):
    model = small_model()
    before = model[0].weight.detach().clone()
    optimizer = LOZO(model, lr=1e-2, backend=name)
    with torch.inference_mode():
        optimizer.step(closure(model))
    assert not torch.equal(before, model[0].weight)


def test_a_late_look_at_non_finite_losses(name):
    """Nobody waits for the loss, so the warning comes some steps late; the update was skipped all the same."""
    model = small_model()
    optimizer = LOZO(model, lr=1e-2, backend=name)
    optimizer.step(lambda: model(torch.full((1, 64), float("nan"), device="cuda")).sum())
    torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="update skipped"):
        for _ in range(3):
            optimizer.step(closure(model))
            torch.cuda.synchronize()
    assert int(optimizer.info.skipped_total) == 1
