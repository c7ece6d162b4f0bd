"""The handle of a probed model, and the optimisers on it."""

import gc

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, patch
from lozo_kernels.kernels.registry import choose_backend
from python_tests.models import Zoo, same, weights, zoo_loss

SIDES = ("activation", "scratch", "copy", "auto")


def zoo(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Zoo().to(dtype).eval()


def prepared(model, loss, **options):
    handle = patch(model, **{"placement": "probe", "rank": 2, "interval": 5, **options})
    handle.prepare(loss)
    return handle


def run_both(make, steps=12, dtype=torch.float32, **probe):
    """The same run in place and under a probe: (losses, weights) of each."""
    results = []
    for options in ({}, {"placement": "probe", **probe}):
        model = zoo(dtype=dtype)
        optimizer = make(model, **options)
        losses = [float(optimizer.step(zoo_loss(model))) for _ in range(steps)]
        optimizer.handle.restore()
        results.append((losses, weights(model)))
    return results


def assert_close(results, tolerance):
    (losses, expected), (probed, got) = results
    assert probed == pytest.approx(losses, rel=tolerance)
    for name, p in expected.items():
        assert (got[name] - p).abs().max() <= tolerance * (1 + p.abs().max()), name


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.5},
        {"directions": 3, "momentum": 0.5, "weight_decay": 0.2},
        {"two_sided": False, "directions": 2},
        {"scaling": "card", "rank": 3},
        {"scaling": "published", "interval": 1},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_a_probe_takes_the_steps_of_the_algorithm(side, options):
    settings = {"lr": 1e-3, "eps": 1e-3, "rank": 2, "interval": 5, "backend": "eager"} | options
    assert_close(run_both(lambda model, **o: LOZO(model, **settings, **o), side=side), 1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_mezo_on_the_weight_side(momentum):
    settings = {"lr": 1e-3, "eps": 1e-3, "momentum": momentum, "weight_decay": 0.1, "backend": "eager"}
    assert_close(run_both(lambda model, **o: MeZO(model, **settings, **o), side="scratch"), 1e-3)


def test_per_parameter_settings_and_micro_batches():
    def make(model, **options):
        head = [p for n, p in model.named_parameters() if n.startswith("up")]
        rest = [p for n, p in model.named_parameters() if not n.startswith("up") and p.requires_grad]
        groups = [{"params": head, "lr": 0.0}, {"params": rest, "weight_decay": 0.3}]
        return LOZO(model, groups, lr=1e-2, eps=1e-2, rank=2, interval=3, momentum=0.5, **options)

    results = []
    for options in ({}, {"placement": "probe", "side": "activation"}):
        model = zoo()
        before = weights(model)
        optimizer = make(model, **options)
        for _ in range(4):
            optimizer.step([zoo_loss(model, 0), zoo_loss(model, 1)])
        optimizer.handle.restore()
        if options:  # in place, a perturbation leaves rounding behind
            assert torch.equal(model.up.weight, before["up.weight"]) and torch.equal(model.up.bias, before["up.bias"])
        results.append(([], weights(model)))
    assert_close(results, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", SIDES)
def test_no_bit_changes_before_the_merge(side, dtype):
    model = zoo(dtype=dtype)
    before = weights(model)
    optimizer = LOZO(model, placement="probe", side=side, lr=1e-2, eps=1e-2, rank=2, interval=20, momentum=0.9)
    for _ in range(20):
        optimizer.step(zoo_loss(model))
        assert same(weights(model), before)
    optimizer.step(zoo_loss(model))  # draws V anew
    assert not same(weights(model), before)


def test_thousands_of_probes_leave_every_bit():
    model = zoo(dtype=torch.bfloat16)
    before, loss = weights(model), zoo_loss(model)
    handle = prepared(model, loss, side="scratch")
    with torch.no_grad():
        rest = loss()
        for step in range(200):
            handle.perturb_(step, 1e-2)
            handle.perturb_(step, -2e-2)
            loss()
            handle.perturb_(step, 1e-2)
        assert torch.equal(loss(), rest)
    assert same(weights(model), before)


def test_the_merge_has_the_bits_of_the_reference_on_every_backend(any_backend, rng):
    # Nothing is measured for a side that is asked for, which would take the interpreter minutes.
    side = "scratch" if any_backend.name == "triton" else "auto"
    for rounding in ("nearest", "stochastic"):
        merged, seed = [], rng.getrandbits(20)
        for name in ("eager", any_backend.name):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(40, 24), nn.LayerNorm(24)).bfloat16()
            x = torch.randn(3, 40).bfloat16()
            handle = patch(model, placement="probe", side=side, rank=9, interval=3, backend=name, rounding=rounding)
            handle.prepare(lambda model=model, x=x: model(x).float().square().mean())
            handle.update_(0, 0.7, 0.05, weight_decay=0.1)
            handle.update_(1, -0.3, 0.05)
            handle.restore()
            merged.append(weights(model))
        assert same(*merged)


def test_between_steps_the_model_is_where_the_run_is():
    model, loss = zoo(), zoo_loss(zoo())
    loss = zoo_loss(model)
    optimizer = LOZO(model, placement="probe", lr=1e-1, eps=1e-2, rank=2, interval=50)
    with torch.no_grad():
        before = loss()
        optimizer.step(loss)
        live = loss()
        optimizer.handle.merge()
        merged = loss()
    assert live != before and merged == pytest.approx(float(live), rel=1e-5)


def test_restore_gives_the_model_back():
    model = zoo()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: len(module._state_dict_pre_hooks) for name, module in model.named_modules()}
    loss = zoo_loss(model)
    optimizer = LOZO(model, placement="probe", lr=1e-1, rank=2)
    optimizer.step(loss)
    with torch.no_grad():
        live = loss()
    optimizer.handle.restore()
    optimizer.handle.restore()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {name: len(module._state_dict_pre_hooks) for name, module in model.named_modules()} == hooks
    with torch.no_grad():
        assert float(loss()) == pytest.approx(float(live), rel=1e-5)
    with pytest.raises(RuntimeError, match="was restored"):
        optimizer.handle.perturb_(0, 1.0)


def test_nothing_keeps_a_model_that_is_gone():
    import weakref

    model = zoo()
    gone = weakref.ref(model)
    optimizer = LOZO(model, placement="probe", rank=2)
    optimizer.step(zoo_loss(model))
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_state_dict_is_of_the_tuned_weights_and_resumes(tmp_path):
    def start():
        model = zoo(dtype=torch.bfloat16)
        return model, LOZO(model, placement="probe", side="scratch", lr=1e-2, eps=1e-2, rank=2, interval=4, momentum=0.9)

    model, optimizer = start()
    for _ in range(6):
        optimizer.step(zoo_loss(model))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    assert not optimizer.handle.probed.learned
    for _ in range(5):
        expected = optimizer.step(zoo_loss(model))
    again, resumed = start()
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(5):
        loss = resumed.step(zoo_loss(again))
    assert torch.equal(loss, expected)
    optimizer.handle.merge(), resumed.handle.merge()
    assert same(weights(again), weights(model))


def test_an_exception_leaves_the_model_at_rest():
    model = zoo()
    loss, before = zoo_loss(model), weights(model)
    optimizer = LOZO(model, placement="probe", lr=1e-2, rank=2)
    optimizer.step(loss)
    with torch.no_grad():
        rest = loss()
    calls = []

    def failing():
        calls.append(loss())
        if len(calls) == 2:
            raise KeyError("here")
        return calls[-1]

    with pytest.raises(KeyError):
        optimizer.step(failing)
    with torch.no_grad():
        assert torch.equal(loss(), rest) and same(weights(model), before)
    assert optimizer.steps_done == 1
    optimizer.step(loss)


def test_an_evaluation_with_gradients_is_right_too():
    model = zoo()
    loss = zoo_loss(model)
    handle = prepared(model, loss, side="activation")
    handle.update_(0, 1.0, 0.1, weight_decay=0.2)
    handle.perturb_(1, 0.05)
    with torch.no_grad():
        plain = loss()
    tracked = loss()
    assert float(tracked.detach()) == pytest.approx(float(plain), rel=1e-5)
    tracked.backward()
    assert model.up.weight.grad.abs().sum() > 0


def test_dtypes_and_storage_may_change_between_steps():
    model = zoo()
    loss = zoo_loss(model)
    optimizer = LOZO(model, placement="probe", lr=1e-2, eps=1e-2, rank=2, interval=4)
    optimizer.step(loss)
    model.bfloat16()
    optimizer.step(loss)
    model.load_state_dict({n: p.clone().float() for n, p in model.state_dict().items()}, assign=True)
    model.head.weight = model.embed.weight  # untied by assign=True
    for _ in range(3):
        assert torch.isfinite(optimizer.step(loss))


def test_autocast():
    model = zoo()
    loss = zoo_loss(model)

    def mixed():
        with torch.autocast("cpu", torch.bfloat16):
            return loss()

    optimizer = LOZO(model, placement="probe", side="activation", lr=1e-3, rank=2)
    assert torch.isfinite(optimizer.step(mixed))
    assert optimizer.handle.notes == ()


def test_dropout_is_the_same_in_every_evaluation():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    x = torch.randn(4, 8)
    optimizer = LOZO(model, placement="probe", lr=0.0, eps=1e-9, rank=2)
    for _ in range(3):
        optimizer.step(lambda: model(x).square().mean())
        assert optimizer.info.loss_plus == pytest.approx(optimizer.info.loss_minus, rel=1e-4)
    assert optimizer.handle.notes == ()


class Cached(nn.Module):
    """Keeps a derived weight from its first call on."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = self.b.weight.detach().clone()
        return torch.tanh(self.a(x)) @ self.cache.t() + self.b.bias


def test_a_weight_that_was_copied_away_is_demoted_in_the_report():
    model = Cached()
    x = torch.randn(5, 6)
    optimizer = LOZO(model, placement="probe", side="activation", lr=1e-3, rank=2)
    optimizer.step(lambda: model(x).square().mean())
    report = str(optimizer.handle.report())
    assert "loss differed" not in report or "b.weight" in report


class Borrowed(nn.Module):
    """Uses the weight of a stock layer without calling it, keeps another as a view, and has one that nobody uses."""

    def __init__(self):
        super().__init__()
        self.raw, self.plain, self.idle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(3, 3)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = x @ self.raw.weight + self.plain(x)
        x, _ = self.lstm(x)
        return x + self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("side", ["activation", "scratch"])
def test_every_way_of_using_a_weight(side):
    torch.manual_seed(0)
    model = Borrowed().eval()
    twin = Borrowed().eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 6)
    handle = prepared(model, lambda: model(x).square().mean(), side=side)
    assert handle.notes == ()
    by_name = {m.name: m for m in handle.members}
    assert by_name["raw.weight"].side in ("scratch", "copy") and by_name["raw.weight"].scopes == [model]
    handle.perturb_(0, 0.1)
    for name, p in twin.named_parameters():
        handle.write_perturbed(name, p.data)
    with torch.no_grad():
        assert torch.allclose(model(x), twin(x), rtol=1e-5, atol=1e-6)


class Hidden(nn.Module):
    """Reads its weight through memory that no operator shows."""

    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))
        self.pointer = self.weight.detach().numpy()

    def forward(self, x):
        return self.first(x) @ torch.from_numpy(self.pointer)


def test_what_differs_is_demoted_to_in_place_by_name():
    torch.manual_seed(0)
    model = Hidden()
    x = torch.randn(5, 6)
    optimizer = LOZO(model, placement="probe", side="activation", lr=1e-2, eps=1e-2, rank=2)
    twin = Hidden()
    twin.load_state_dict(model.state_dict())
    twin.pointer = twin.weight.detach().numpy()
    in_place = LOZO(twin, lr=1e-2, eps=1e-2, rank=2)
    for _ in range(5):
        got = optimizer.step(lambda: model(x).square().mean())
        expected = in_place.step(lambda: twin(x).square().mean())
        assert float(got) == pytest.approx(float(expected), rel=1e-4)
    sides = {m.name: m.side for m in optimizer.handle.members}
    assert sides["weight"] == "inplace" and sides["first.weight"] == "activation"
    assert any(note.startswith("weight: the loss differed") for note in optimizer.handle.notes)
    assert "in place" in str(optimizer.handle.report()) or "inplace" in str(optimizer.handle.report())


def test_weights_used_outside_of_modules_are_moved_in_place():
    model = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    optimizer = LOZO(model, placement="probe", lr=1e-3, rank=2)
    optimizer.step(lambda: nn.functional.linear(x, model.weight, model.bias).square().mean())
    assert {m.side for m in optimizer.handle.members} == {"inplace"}
    assert all("outside" in m.reason for m in optimizer.handle.members)


@pytest.mark.parametrize("side", ["auto", "activation", "copy"])
def test_a_compiled_model_is_compiled_once(side):
    """The model has a tied weight, which takes its place in both modules."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    model, plain = zoo(), zoo()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    optimizer = LOZO(model, placement="probe", side=side, lr=1e-2, eps=1e-2, rank=2, interval=3, directions=2)
    in_place = LOZO(plain, lr=1e-2, eps=1e-2, rank=2, interval=3, directions=2)
    for step in range(7):
        loss = optimizer.step(zoo_loss(model))
        assert float(loss) == pytest.approx(float(in_place.step(zoo_loss(plain))), rel=1e-3)
        assert torch.allclose(optimizer.info.c, in_place.info.c, rtol=2e-2, atol=2e-2)
        if step == 0:
            compiled = counter.frame_count
    assert counter.frame_count == compiled == 1
    assert all(m.side != "scratch" for m in optimizer.handle.members)


def test_the_users_word():
    model = zoo()
    handle = prepared(model, zoo_loss(model), side={"up.*": "scratch", "head.*": "activation", "conv.weight": "scratch"})
    sides = {m.name: m.side for m in handle.members}
    assert sides["up.weight"] == sides["conv.weight"] == "scratch" and sides["embed.weight"] == "activation"
    assert sides["up.bias"] == "copy"
    assert "scratch" in str(handle.report())
    with pytest.raises(ValueError, match="side is one of 'auto', 'activation'"):
        patch(zoo(), placement="probe", side="left")
    with pytest.raises(TypeError, match="pairs of a glob pattern"):
        patch(zoo(), placement="probe", side=[1])
    with pytest.raises(ValueError, match="give placement='probe'"):
        patch(zoo(), side="scratch")
    with pytest.raises(ValueError, match="placement is one of"):
        patch(zoo(), placement="outside")


def test_auto_moves_in_place_only_where_it_must_or_may(monkeypatch):
    model = zoo()
    assert "inplace" not in {m.side for m in prepared(model, zoo_loss(model), placement="auto").members}
    from lozo_kernels.model.probe.choosing import choice

    monkeypatch.setattr(choice, "free_bytes", lambda device: 100)
    model = zoo()
    handle = prepared(model, zoo_loss(model), placement="auto", side="scratch")
    assert {m.side for m in handle.members if m.numel > 100} == {"inplace"}
    assert "no memory for its scratch" in str(handle.report())
    optimizer = LOZO(zoo(), placement="auto", allow_drift=True, rank=2)
    optimizer.step(zoo_loss(optimizer.handle.model))


def test_scratch_is_shared_by_modules_that_run_one_after_the_other():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
    x = torch.randn(2, 64)
    handle = prepared(model, lambda: model(x).square().mean(), side="scratch")
    handle.perturb_(0, 0.1)
    with torch.no_grad():
        model(x)
    assert handle.scratch_bytes == 64 * 64 * 4


def test_errors_come_before_anything_moves():
    model = zoo()
    loss = zoo_loss(model)
    handle = patch(model, placement="probe", rank=2)
    with pytest.raises(RuntimeError, match="call prepare"):
        handle.perturb_(0, 1.0)
    with pytest.raises(RuntimeError, match="patched already"):
        patch(model, placement="probe")
    handle.prepare(loss)
    handle.perturb_(0, 0.1)
    with pytest.raises(RuntimeError, match="another direction is applied"):
        handle.perturb_(0, 0.1, direction=1)
    with pytest.raises(ValueError, match="perturb_next"):
        handle.update_(0, 1.0, 0.1, perturb_next=0.1)
    handle.restore()
    with pytest.raises(ValueError, match="fuse_steps saves a pass"):
        LOZO(zoo(), placement="probe", fuse_steps=True)
    with pytest.raises(ValueError, match="needs placement='probe'"):
        LOZO(zoo(), evaluation="batched")
    with pytest.raises(ValueError, match="evaluation is one of"):
        LOZO(zoo(), evaluation="together")


def test_a_closure_that_changes_weights_is_an_error():
    model = zoo()
    loss = zoo_loss(model)
    optimizer = LOZO(model, placement="probe", rank=2)
    optimizer.step(loss)

    def changing():
        model.up.weight.data.mul_(1.001)
        model.up.weight.mul_(1.001)
        return loss()

    with pytest.raises(RuntimeError, match=r"'up.weight' was changed during the evaluations"):
        optimizer.step(changing)


def test_a_module_that_was_replaced_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    optimizer = LOZO(model, placement="probe", rank=2)
    optimizer.step(lambda: model(x).square().mean())
    kept, model[1] = model[1], nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match=r"module '1' was replaced after patching"):
        optimizer.step(lambda: model(x).square().mean())
    model[1] = kept
    optimizer.step(lambda: model(x).square().mean())
    model[0].forward = lambda x: x
    with pytest.raises(RuntimeError, match="forward of module '0' was replaced"):
        optimizer.step(lambda: model(x).square().mean())


def test_a_backend_by_name_serves_the_probe(backend):
    model = zoo()
    optimizer = LOZO(model, placement="probe", side="activation", rank=2, backend=backend.name)
    optimizer.step(zoo_loss(model))
    assert {p.backend for p in optimizer.handle.report().parameters if p.backend} == {backend.name}
    assert choose_backend("cpu", backend.name).backend is backend
