"""normalise="spread" and "scalar": what the formulas say, independence of the loss's scale, journals, states, captures."""

import copy

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, SubZero, capture_step
from lozo_kernels.errors import JournalError
from lozo_kernels.journal import Journal, replay
from lozo_kernels.optim.normalise import BETA, no_moment, normalised
from python_tests.models import same, weights

KINDS = {
    "spread": {"normalise": "spread", "directions": 4, "two_sided": False},
    "spread, two-sided": {"normalise": "spread", "directions": 3, "momentum": 0.9},
    "scalar": {"normalise": "scalar", "fuse_steps": True},
    "scalar, probe": {"normalise": "scalar", "placement": "probe", "directions": 2},
}


def model_of():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))


def loss_of(model, scale=1.0):
    x, y = torch.randn(12, 6), torch.randn(12, 2)
    return lambda: (model(x).double() - y).square().mean() * scale


def test_spread_is_that_of_the_losses():
    """FZOO divides F(+) - F(0) by the standard deviation of F(+); the formula of its paper."""
    eps, rest = 1e-2, torch.randn((), dtype=torch.float64)
    plus = torch.randn(6, dtype=torch.float64)
    found, moment = normalised("spread", (plus - rest) / eps, no_moment())
    assert torch.allclose(found, (plus - rest) / plus.std(), rtol=1e-12)
    assert torch.equal(moment, no_moment())


def test_scalar_is_a_corrected_running_mean(rng):
    moment, v = no_moment(), 0.0
    for t in range(1, 20):
        c = torch.randn(rng.randint(1, 4), dtype=torch.float64)
        v = BETA * v + (1 - BETA) * float((c * c).mean())
        found, moment = normalised("scalar", c, moment)
        assert torch.allclose(found, c / (v / (1 - BETA**t)) ** 0.5, rtol=1e-12)


@pytest.mark.parametrize("kind", ["spread", "scalar"])
def test_no_difference_is_no_step(kind):
    found, _ = normalised(kind, torch.zeros(3, dtype=torch.float64), no_moment())
    assert torch.equal(found, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", [LOZO, MeZO, SubZero])
def test_the_scale_of_the_loss_changes_nothing(method, name):
    """A power of two, so that no bit of a loss changes."""
    one, two = model_of(), model_of()
    two.load_state_dict(one.state_dict())
    seed = torch.random.initial_seed()
    for model, scale in ((one, 1.0), (two, 64.0)):
        torch.manual_seed(seed)
        loss, optimizer = loss_of(model, scale), method(model, lr=1e-2, interval=3, **KINDS[name])
        before = float(loss())
        for _ in range(30):
            optimizer.step(loss)
        optimizer.flush()
        optimizer.handle.merge()
        assert float(loss()) < before and not bool(optimizer.info.skipped)
    assert same(weights(one), weights(two))


@pytest.mark.parametrize("name", KINDS)
def test_a_run_goes_on_from_its_state_and_is_replayed(tmp_path, name):
    base = model_of()
    model, path = copy.deepcopy(base), tmp_path / "run"
    loss, poison = loss_of(model), [False]

    def closure():
        return loss() * (float("nan") if poison[0] else 1.0)

    optimizer = LOZO(model, lr=1e-2, interval=3, **KINDS[name])
    with Journal.create(path, optimizer), pytest.warns(UserWarning, match="update skipped"):
        for step in range(12):
            poison[0] = step == 4
            optimizer.step(closure)
            if step == 6:
                state, there = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(weights(model))
    after = weights(model)
    replayed = copy.deepcopy(base)
    assert replay(replayed, path).agrees and same(weights(replayed), after)
    optimizer.handle.restore()
    model.load_state_dict(there)
    optimizer = LOZO(model, lr=1e-2, interval=3, **KINDS[name])
    optimizer.load_state_dict(state)
    for _ in range(5):
        optimizer.step(loss)
    optimizer.flush()
    optimizer.handle.merge()
    assert same(weights(model), after)


@pytest.mark.parametrize("name", KINDS)
def test_captured_steps_have_the_same_bits(name):
    plain = model_of()
    captured = copy.deepcopy(plain)
    seed = torch.random.initial_seed()
    torch.manual_seed(seed)
    first_loss = loss_of(plain)
    torch.manual_seed(seed)
    second_loss = loss_of(captured)
    first, second = (LOZO(m, lr=1e-2, interval=4, **KINDS[name]) for m in (plain, captured))
    for _ in range(3):
        first.step(first_loss)
        second.step(second_loss)
    step = capture_step(second, second_loss)
    for i in range(9):
        expected, got = first.step(first_loss), second.step(second_loss) if i == 5 else step()
        assert torch.equal(expected, got) and torch.equal(first.info.moment, second.info.moment)
    for optimizer in (first, second):
        optimizer.flush()
        optimizer.handle.merge()
    assert same(weights(plain), weights(captured))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "max"}, "'spread', 'scalar' or None, not 'max'"),
        ({"normalise": "spread"}, "directions=2 or more"),
        ({"normalise": "scalar", "lr": "auto"}, "leave normalise out"),
    ],
)
def test_what_cannot_be(options, message):
    model = model_of()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        LOZO(model, **options)
    assert same(weights(model), before)


def test_states_and_journals_of_other_settings_are_refused(tmp_path):
    model = model_of()
    loss = loss_of(model)
    optimizer = LOZO(model, lr=1e-2, normalise="scalar")
    optimizer.step(loss)
    with pytest.raises(JournalError, match="mean of c"):
        Journal.create(tmp_path / "late", optimizer)
    plain = LOZO(model_of(), lr=1e-2)
    with pytest.raises(ValueError, match="other settings"):
        plain.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="other settings"):
        optimizer.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="moment"):
        optimizer.load_state_dict(optimizer.state_dict() | {"moment": [1.0]})
