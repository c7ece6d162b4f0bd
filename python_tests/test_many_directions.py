"""Several directions of a step: one factor, one pass over the weights."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, SubZero, patch
from lozo_kernels.journal import Journal, read_journal, replay
from lozo_kernels.kernels import noise, reference
from lozo_kernels.kernels.registry import choose_backend
from lozo_kernels.model import passes
from lozo_kernels.model.contract import version_of
from python_tests.models import same, weights

RANK = 3


def model_of(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(37, 21), nn.Tanh(), nn.Linear(21, 5)).to(dtype)
    model.stack = nn.Parameter(torch.randn(3, 7, 9).to(dtype))
    return model


def loss_of(model):
    x, y = torch.randn(6, 37), torch.randn(6, 5)

    def loss():
        dtype = model[0].weight.dtype
        return nn.functional.mse_loss(model(x.to(dtype)).float(), y) + model.stack.float().square().mean()

    return loss


def factors(handle, name, step, count, interval):
    """U of every direction and V^T of a parameter, from the plain reference of the noise."""
    p, seed = handle.find(name), handle.config.seed
    batch, rows, cols = p.extent
    us = [noise.factor(seed, batch * rows, RANK, p.tensor_id, step, direction=d).view(batch, rows, RANK) for d in range(count)]
    v = noise.factor(seed, batch * cols, RANK, p.tensor_id, step // interval, stream="V").view(batch, cols, RANK)
    return us, v.transpose(1, 2)


def scalar(value):
    return torch.tensor(value, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [None, 0.75])
@pytest.mark.parametrize("count", [3, 6])
def test_an_update_is_one_factor_in_the_bits_of_the_reference(rng, any_backend, count, momentum, dtype):
    """X and N after two steps, with decay, a perturbation that is taken out and one that is put in."""
    model, interval, lr, decay, eps = model_of(dtype), 5, 2.0**-6, 0.5, 2.0**-5
    handle = patch(model, rank=RANK, interval=interval, seed=rng.getrandbits(64), backend=any_backend.name, scaling="published")
    if momentum is not None:
        handle.enable_momentum()
    names = [name for name in handle.names if handle.find(name).low_rank]
    x = {name: model.get_parameter(name).detach().clone().view(handle.find(name).extent) for name in names}
    n = {name: torch.zeros(*x[name].shape[:2], RANK) for name in names}
    for step in (5, 6):
        c = [2.0 ** rng.randint(-3, 2) * rng.choice((-1, 1)) for _ in range(count)]
        handle.update_(step, c, lr, weight_decay=decay, beta=momentum, applied=-eps, perturb_next=eps)
        for name in names:
            us, v = factors(handle, name, step, count, interval)
            (following,), _ = factors(handle, name, step + 1, 1, interval)
            keep, taken = 1 - lr * decay, eps * (1 - lr * decay)  # a perturbation decays with the weights
            if momentum is None:
                scales = [-lr * one / count for one in c]
                scales[-1] += taken
            else:
                scales = [0.0] * (count - 1) + [taken]
                coefficients = [(1 - momentum) * one / count for one in c] + [0.0]
                n[name] = reference.momentum(n[name], [*us, following], list(map(scalar, coefficients)), scalar(momentum))
            f = torch.zeros(*x[name].shape[:2], RANK)
            f = reference.factor_update(f, [*us, following], list(map(scalar, [*scales, eps])))
            if momentum is not None:
                f = f + n[name] * scalar(-lr)
            x[name] = reference.lowrank_merge(x[name], v, f, decay=scalar(keep)).to(dtype)
            assert torch.equal(model.get_parameter(name).detach().view(x[name].shape), x[name]), (name, step)
            if momentum is not None:
                assert torch.equal(handle.momentum_state[name].view(n[name].shape), n[name]), (name, step)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"rounding": "stochastic"}], ids=str)
@pytest.mark.parametrize("kind", [LOZO, SubZero])
def test_backends_agree_and_follow_a_simulation(rng, kind, options):
    """Seven one-sided directions with a refresh of V in between: the same bits everywhere, and the mean of the estimates."""
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    base = model_of(dtype)
    loss_seed, found = rng.getrandbits(30), {}
    for name in ("eager", "native"):
        if choose_backend("cpu", name).rejected.get(name):
            continue
        model = copy.deepcopy(base)
        torch.manual_seed(loss_seed)
        loss = loss_of(model)
        settings = {"lr": 1e-2, "eps": 1e-2, "interval": 2, "rank": RANK, "two_sided": False, "directions": 7, "seed": 5}
        optimizer = kind(model, backend=name, **settings, **options)
        for _ in range(5):
            optimizer.step(loss)
        found[name] = weights(model)
    assert len(found) == 1 or same(*found.values())
    assert not same(next(iter(found.values())), weights(base))


def passes_of(monkeypatch, optimizer, loss):
    """How many passes over low-rank weights one step makes."""
    counted = [0]
    real = passes.Group.apply

    def apply(self, *args, **kwargs):
        counted[0] += self.kind == "lowrank"
        return real(self, *args, **kwargs)

    optimizer.step(loss)
    monkeypatch.setattr(passes.Group, "apply", apply)
    optimizer.step(loss)
    return counted[0]


@pytest.mark.parametrize("kind", [LOZO, SubZero])
@pytest.mark.parametrize(("options", "most"), [({"two_sided": False}, 8), ({}, 15), ({"fuse_steps": True}, 14)], ids=str)
def test_passes_over_the_weights(monkeypatch, kind, options, most):
    """One for each evaluation at another point, and one for the update, which takes the last point out."""
    model = model_of()
    assert passes_of(monkeypatch, kind(model, directions=7, **options), loss_of(model)) == most


def test_a_run_is_replayed_and_names_its_version(tmp_path, rng):
    for kind, directions in itertools.product((LOZO, MeZO, SubZero), (1, 2, 4)):
        base = model_of()
        model = copy.deepcopy(base)
        loss, path = loss_of(model), tmp_path / f"{kind.__name__}{directions}"
        settings = {"lr": 1e-2, "two_sided": False, "directions": directions, "interval": 3}
        optimizer = kind(model, **settings)
        journal = Journal.create(path, optimizer)
        for _ in range(5):
            optimizer.step(loss)
        state = optimizer.state_dict()
        journal.finish()
        needed = {LOZO: 3 if directions > 2 else 1, MeZO: 1, SubZero: 3 if directions > 2 else 2}[kind]
        assert read_journal(path).header.noise_version == state["noise_version"] == needed
        replay(base, path)
        assert same(weights(base), weights(model))


def test_fused_steps_have_the_version_of_their_draws():
    config = patch(nn.Linear(3, 3)).config
    settings = {"momentum": 0.0, "directions": 2, "fuse_steps": False}
    assert version_of(config, settings) == 1
    assert version_of(config, settings | {"fuse_steps": True}) == noise.CONTRACT_VERSION
    assert version_of(config, settings | {"directions": 1, "fuse_steps": True}) == 1
