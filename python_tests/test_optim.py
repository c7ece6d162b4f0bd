"""The optimisers: their step against the formula, closures of every kind, failures, resume, and clean weights between steps."""

import copy
import io
import signal
import statistics
import warnings

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, NonFiniteLossError, handle_of, patch
from python_tests.models import Zoo, same, weights, zoo_loss

METHODS = {
    "lozo": (LOZO, {"rank": 3, "interval": 4}),
    "lozo-m": (LOZO, {"rank": 3, "interval": 4, "momentum": 0.8}),
    "mezo": (MeZO, {}),
    "mezo-m": (MeZO, {"momentum": 0.8}),
}
SHAPES = {
    "plain": {},
    "directions": {"directions": 3},
    "one-sided": {"two_sided": False},
    "fused": {"fuse_steps": True},
    "fused-directions": {"fuse_steps": True, "directions": 2},
    "fused-one-sided": {"fuse_steps": True, "two_sided": False},
    "decay": {"weight_decay": 0.1},
    "seven one-sided": {"two_sided": False, "directions": 7, "fuse_steps": True},
    "spread": {"two_sided": False, "directions": 3, "normalise": "spread"},
    "scalar": {"directions": 2, "normalise": "scalar"},
}


def make(method, model, **options):
    cls, defaults = METHODS[method]
    return cls(model, **{"lr": 1e-3, "seed": 5} | defaults | options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_step_follows_the_formula(backend, method, shape):
    """Every variant against a plain simulation with materialised directions."""
    options = SHAPES[shape]
    model = Zoo()
    simulated = copy.deepcopy(model)
    optimizer = make(method, model, backend=backend.name, **options)
    handle, lr, eps = optimizer.handle, 1e-3, 1e-3
    beta = optimizer.momentum
    loss, simulated_loss = zoo_loss(model), zoo_loss(simulated)
    q, two_sided, decay = options.get("directions", 1), options.get("two_sided", True), options.get("weight_decay", 0.0)
    m = {name: torch.zeros_like(p) for name, p in simulated.named_parameters()}
    v, weight = 0.0, 0.0
    with torch.no_grad():
        for step in range(3):  # within one window, where low-rank momentum is the dense one
            optimizer.step(loss)
            base, total, cs = weights(simulated), {}, []
            f0 = simulated_loss()
            for d in range(q):
                values = []
                directions = {name: handle.materialize(name, step, direction=d) for name in handle.names}
                for sign in (1, -1):
                    for name in handle.names:
                        simulated.get_parameter(name).copy_(base[name] + sign * eps * directions[name])
                    values.append(simulated_loss())
                cs.append(float(values[0] - values[1]) / (2 * eps) if two_sided else float(values[0] - f0) / eps)
            v, weight = 0.99 * v + 0.01 * statistics.mean(c * c for c in cs), 0.99 * weight + 0.01
            by = {"spread": lambda cs=cs: statistics.stdev(cs), "scalar": lambda v=v, w=weight: (v / w) ** 0.5}
            divisor = by.get(options.get("normalise"), lambda: 1.0)()
            for d, c in enumerate(cs):
                for name in handle.names:
                    z = handle.materialize(name, step, direction=d)
                    r = 3 if method.startswith("lozo") and z.dim() > 1 else 1
                    total[name] = total.get(name, 0) + c / divisor * z / r / q
            for name in handle.names:
                m[name] = beta * m[name] + (1 - beta) * total[name]
                simulated.get_parameter(name).copy_((1 - lr * decay) * base[name] - lr * m[name])
    optimizer.flush()
    for name, p in model.named_parameters():
        assert torch.allclose(p, simulated.get_parameter(name), atol=3e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_learns(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(64, 6)
    y = (x[:, 0] > 0).long()
    loss = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    start = loss().item()
    optimizer = make(method, model, lr=2e-2)
    for _ in range(150):
        optimizer.step(loss)
    assert loss().item() < 0.75 * start


def test_closures_of_every_kind():
    model = nn.Linear(3, 1)
    optimizer = make("lozo", model)
    x = torch.randn(8, 3)
    as_tensor = optimizer.step(lambda: (model(x) ** 2).mean())
    assert as_tensor.dtype == torch.float64 and as_tensor.dim() == 0 and not as_tensor.requires_grad
    optimizer.step(lambda: float((model(x) > 0).float().mean()))
    optimizer.step(lambda: (model(x) ** 2).mean(0))  # one element, any shape
    optimizer.step([lambda i=i: (model(x[i : i + 4]) ** 2).mean() for i in (0, 4)])
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.steps_done == 4


def test_micro_batches_equal_one_batch():
    first = nn.Linear(3, 1)
    second = copy.deepcopy(first)
    x = torch.randn(8, 3)
    one, several = make("lozo", first), make("lozo", second)
    for _ in range(5):
        one.step(lambda: (first(x).double() ** 2).mean())
        several.step([lambda i=i: (second(x[i : i + 2]).double() ** 2).mean() for i in range(0, 8, 2)])
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-7)


def test_both_evaluations_see_the_same_randomness():
    model = nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.5))
    seen = []

    def loss():
        seen.append(torch.rand(()).item())
        return model(torch.ones(4, 50)).pow(2).mean()

    optimizer = make("lozo", model, eps=1e-5)
    optimizer.step(loss)
    optimizer.step(loss)
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert optimizer.info.c.abs() < 1e3  # different dropout masks would divide their difference by 2e-5
    optimizer.common_random_numbers = False
    optimizer.step(loss)
    assert seen[4] != seen[5]


def test_parameter_groups_and_schedules():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": [("ignored name", model[1].weight), ("b", model[1].bias)], "weight_decay": 0.5},
    ]
    before = weights(model)
    optimizer = LOZO(model, groups, lr=1e-2, eps=1e-3)
    assert optimizer.param_groups[1]["param_names"] == ["1.weight", "1.bias"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    loss = lambda: model(torch.ones(1, 4)).pow(2).sum()  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.step(loss)
            scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.0025]
    assert torch.allclose(model[0].weight, before["0.weight"], atol=1e-6)
    assert not torch.allclose(model[1].weight, before["1.weight"], atol=1e-6)


def test_lr_may_be_a_tensor():
    model = nn.Linear(3, 3)
    before = weights(model)
    rate = torch.tensor(0.0)
    optimizer = make("lozo", model, lr=rate)
    loss = lambda: model(torch.ones(1, 3)).pow(2).sum()  # noqa: E731
    optimizer.step(loss)
    assert torch.allclose(model.weight, before["weight"], atol=1e-6)
    rate.fill_(1e-2)
    optimizer.step(loss)
    assert not torch.allclose(model.weight, before["weight"], atol=1e-5)


@pytest.mark.parametrize("shape", ["plain", "directions", "one-sided", "fused"])
@pytest.mark.parametrize("method", METHODS)
def test_resumes_bit_for_bit(backend, method, shape):
    """Saved through torch.save and loaded into a fresh model, at every step around a refresh of V."""
    options = SHAPES[shape] | {"rounding": "stochastic", "backend": backend.name}
    model = Zoo().to(torch.bfloat16)
    start = copy.deepcopy(model)
    optimizer = make(method, model, **options)
    checkpoints = []
    for step in range(10):
        optimizer.step(zoo_loss(model, step))
        buffer = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), buffer)
        checkpoints.append(buffer)
    expected = weights(model)
    for step in (0, 2, 3, 4, 8):
        fresh = copy.deepcopy(start)
        resumed = make(method, fresh, **options)
        checkpoints[step].seek(0)
        model_state, state = torch.load(checkpoints[step], weights_only=True)
        fresh.load_state_dict(model_state)
        resumed.load_state_dict(state)
        for later in range(step + 1, 10):
            resumed.step(zoo_loss(fresh, later))
            fresh.state_dict()  # the first run was looked at after each step; fused steps round where they are looked at
        assert same(weights(fresh), expected), f"resumed after step {step}"


def test_state_of_another_run_is_refused():
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    state = make("lozo", model).state_dict()
    for options, differing in (
        ({"rank": 4}, "rank"),
        ({"seed": 6}, "seed"),
        ({"eps": 1e-2}, "eps"),
        ({"momentum": 0.5}, "momentum"),
    ):
        optimizer = make("lozo", other, **options)
        with pytest.raises(ValueError, match=f"differing: {differing}"):
            optimizer.load_state_dict(state)
        optimizer.handle.restore()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"placement": "probe"}], ids=["plain", "momentum", "probe"])
def test_a_state_in_part_is_refused(options):
    model = nn.Linear(3, 3)
    optimizer = make("lozo", model, **options)
    loss = lambda: model(torch.ones(1, 3)).pow(2).sum()  # noqa: E731
    optimizer.step(loss)
    whole = copy.deepcopy(optimizer.state_dict())
    optimizer.step(loss)
    partial = [{k: v for k, v in whole.items() if k != key} for key in whole]
    if not options.get("placement"):  # of a probe alone
        partial = [state for state in partial if state.keys() >= {"past", "history"}]
    partial += [whole | {"param_groups": [{k: v for k, v in whole["param_groups"][0].items() if k != "lr"}]}]
    partial += [whole | {"state": {}}] if options.get("momentum") else []
    before = copy.deepcopy(optimizer.state_dict()), weights(model)
    for state in partial:
        with pytest.raises(ValueError, match="not all of what state_dict"):
            optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["step"] == 2 and after["param_groups"] == before[0]["param_groups"] and same(weights(model), before[1])
    optimizer.load_state_dict(whole)
    assert optimizer.steps_done == 1


def test_weight_decay_that_turns_signs_is_refused():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"lr \* weight_decay is 1\.5"):
        make("lozo", model, lr=0.5, weight_decay=3.0)
    with pytest.raises(ValueError, match=r"lr \* weight_decay is 2"):
        make("lozo", model, params=[{"params": list(model.parameters()), "weight_decay": 2.0}], lr=1.0)
    make("lozo", model, lr=0.5, weight_decay=2.0).handle.restore()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_leaves_the_model_as_it_was(method, shape):
    model = Zoo()
    optimizer = make(method, model, **SHAPES[shape])
    loss = zoo_loss(model)
    optimizer.step(loss)
    model.state_dict()
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    calls = []

    def failing(at):
        def closure():
            calls.append(1)
            if len(calls) == at:
                raise MemoryError("out of memory")
            return loss()

        return closure

    evaluations = 1 + optimizer.directions if not optimizer.two_sided else 2 * optimizer.directions
    for at in range(1, evaluations + 1):
        calls.clear()
        with pytest.raises(MemoryError):
            optimizer.step(failing(at))
        for name, p in model.named_parameters():
            assert torch.allclose(p, before[name], atol=1e-6), name
    assert optimizer.steps_done == 1
    after = optimizer.state_dict()
    assert after["step"] == state["step"]
    for name in state["state"]:
        assert torch.equal(after["state"][name]["momentum"], state["state"][name]["momentum"])
    optimizer.step(loss)
    assert optimizer.steps_done == 2


@pytest.mark.parametrize("fuse_steps", [False, True])
def test_ctrl_c_between_passes(fuse_steps, monkeypatch):
    """A signal that arrives within a weight pass is held back until the books are straight."""
    model = Zoo()
    optimizer = make("lozo", model, fuse_steps=fuse_steps)
    loss = zoo_loss(model)
    optimizer.step(loss)
    model.state_dict()
    before = weights(model)
    move = optimizer.handle.move

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        move(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(optimizer.handle, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(loss)
    monkeypatch.undo()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name], atol=1e-6), name
    optimizer.step(loss)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", ["plain", "fused", "one-sided", "decay"])
@pytest.mark.parametrize("method", METHODS)
def test_non_finite_losses_skip_and_then_stop(method, shape, bad):
    model = Zoo()
    optimizer = make(method, model, max_nonfinite=3, **SHAPES[shape])
    loss = zoo_loss(model)
    optimizer.step(loss)
    model.state_dict()
    before = weights(model)
    momentum = {k: v.clone() for k, v in optimizer.handle.momentum.items()}
    for _ in range(2):
        with pytest.warns(UserWarning, match="update skipped"):
            optimizer.step(lambda: bad)
        assert bool(optimizer.info.skipped)
    optimizer.step(loss)  # a good step in between starts the count anew
    assert int(optimizer.info.skipped_total) == 2 and not bool(optimizer.info.skipped)
    optimizer.flush()
    before = weights(model)
    momentum = {k: v.clone() for k, v in optimizer.handle.momentum.items()}
    with pytest.warns(UserWarning), pytest.raises(NonFiniteLossError, match="not finite 3 steps in a row"):
        for _ in range(3):
            optimizer.step(lambda: bad)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name], atol=1e-6), name
    # Low-rank momentum follows V; dense momentum must not have moved at all.
    for name in momentum:
        if method == "mezo-m":
            assert torch.equal(optimizer.handle.momentum[name], momentum[name])
    assert optimizer.state_dict()["skipped"] == [5, 3]


LOOKS = {
    "forward": lambda model: model(torch.zeros(1, 4, dtype=torch.long)),
    "submodule": lambda model: model.up(torch.zeros(1, 5)),
    "state_dict": lambda model: model.state_dict(),
    "submodule state_dict": lambda model: model.up.state_dict(),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("method", METHODS)
def test_nobody_sees_a_perturbed_weight_between_fused_steps(method, look):
    fused, plain = Zoo(), Zoo()
    plain.load_state_dict(fused.state_dict())
    a, b = make(method, fused, fuse_steps=True), make(method, plain)
    for step in range(9):
        a.step(zoo_loss(fused, step))
        b.step(zoo_loss(plain, step))
        if step in (1, 2, 6, 8):
            torch.testing.assert_close(LOOKS[look](fused), LOOKS[look](plain), atol=1e-4, rtol=1e-3)
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_loading_weights_between_fused_steps_keeps_them():
    model = Zoo()
    other = Zoo().state_dict()
    optimizer = make("lozo", model, fuse_steps=True)
    optimizer.step(zoo_loss(model))
    model.load_state_dict(other)
    assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items())


def test_restore_applies_what_is_pending_and_removes_the_hooks():
    model, plain = Zoo(), Zoo()
    plain.load_state_dict(model.state_dict())
    optimizer, reference = make("lozo", model, fuse_steps=True), make("lozo", plain)
    optimizer.step(zoo_loss(model))
    reference.step(zoo_loss(plain))
    optimizer.handle.restore()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    assert not any(m._forward_pre_hooks or m._state_dict_pre_hooks or m._load_state_dict_pre_hooks for m in model.modules())


def test_one_optimiser_per_guarded_handle():
    handle = patch(model := nn.Linear(2, 2))
    LOZO(handle, fuse_steps=True)
    with pytest.raises(RuntimeError, match="one optimiser per handle"):
        LOZO(handle, fuse_steps=True)
    assert handle_of(model) is handle


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr is a finite number at least 0, not -1.0"),
        ({"lr": float("nan")}, ValueError, "lr is a finite number"),
        ({"lr": "1e-3"}, TypeError, "lr is a number"),
        ({"eps": 0.0}, ValueError, "eps is a finite number above 0, not 0.0"),
        ({"eps": -1e-3}, ValueError, "eps is a finite number above 0"),
        ({"eps": float("inf")}, ValueError, "eps is a finite number above 0"),
        ({"momentum": 1.0}, ValueError, "momentum is a finite number at least 0 and below 1, not 1.0"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay is a finite number"),
        ({"directions": 0}, ValueError, "directions is at least 1"),
        ({"directions": 1.5}, TypeError, "directions is an integer"),
        ({"max_nonfinite": 0}, ValueError, "max_nonfinite is at least 1"),
        ({"rank": 0}, ValueError, "rank is at least 1"),
        ({"interval": 0}, ValueError, "interval is at least 1"),
        ({"rnak": 2}, TypeError, "unexpected keyword argument 'rnak'"),
        ({"params": []}, ValueError, "params is empty"),
        ({"params": [torch.ones(2)]}, ValueError, "is not trained by the handle"),
        ({"params": [{"params": [], "lr": 1.0}]}, ValueError, "a parameter group is empty"),
    ],
)
def test_bad_options_change_nothing(options, error, message):
    model = nn.Linear(3, 3)
    before = weights(model)
    with pytest.raises(error, match=message):
        LOZO(model, **options)
    assert handle_of(model) is None and same(weights(model), before)


def test_every_patched_parameter_needs_a_group():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"trains 1 parameters that are in no group, e.g. 'bias'"):
        LOZO(model, [model.weight])
    assert handle_of(model) is None


def test_misuse_of_a_handle():
    model = nn.Linear(3, 3)
    handle = patch(model)
    with pytest.raises(ValueError, match="MeZO needs a handle with estimator='dense'"):
        MeZO(handle)
    with pytest.raises(TypeError, match="configured already; give rank to patch"):
        LOZO(handle, rank=3)
    assert handle_of(model) is handle


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (None, "needs a closure"),
        ([], "needs a closure"),
        ([1], "needs a closure"),
        (lambda: None, "it returned NoneType"),
        (lambda: torch.ones(2), r"returned a tensor of shape \(2,\)"),
        (lambda: torch.ones((), dtype=torch.complex64), "complex64"),
        (lambda: "a", "it returned str"),
    ],
)
def test_bad_closures_change_nothing(closure, message):
    model = nn.Linear(3, 3)
    before = weights(model)
    optimizer = LOZO(model)
    with pytest.raises(TypeError, match=message):
        optimizer.step(closure)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name], atol=1e-6)
    assert optimizer.steps_done == 0
