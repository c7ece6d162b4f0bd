"""Runs whose dense directions are random signs: they are followed in fp64, recorded, replayed, saved and killed; other laws are
refused."""

import copy
import math
import os
import time

import pytest
import torch
from torch import nn

import lozo_kernels
from lozo_kernels import LOZO, Draw, MeZO, SubZero, TensorTable
from lozo_kernels.journal import Journal, JournalError, diff, read_journal, replay
from lozo_kernels.kernels import noise, ops
from python_tests import noise_spec
from python_tests.journal_helpers import recorded, zoo
from python_tests.models import same, weights, zoo_loss
from python_tests.processes import forked

SIGNS = {"directions_law": "rademacher"}


def signs_of(handle, name, p, step, seed, direction=0):
    """The direction of a dense parameter by the specification, in fp64."""
    z = noise_spec.dense(seed, p.numel(), handle.find(name).tensor_id, step, direction=direction, law="rademacher")
    return torch.from_numpy(z.copy()).double().view(p.shape)


@pytest.mark.parametrize("placement", ["inplace", "probe"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_mezo_follows_signs(rng, placement, momentum):
    """Each step's loss and weights are those of Algorithm 1 of MeZO, in fp64, with the signs of the specification."""
    seed, lr, eps, decay, q = rng.getrandbits(64), 1e-2, 1e-3, 0.1, 2
    torch.manual_seed(rng.getrandbits(32))
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.randn(20, 7), torch.randint(3, (20,))
    twin = copy.deepcopy(model).double()
    options = {"momentum": momentum, "weight_decay": decay, "directions": q, "placement": placement, "seed": seed}
    optimizer = MeZO(model, lr=lr, eps=eps, **options, **SIGNS)
    carried = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step in range(8):
        optimizer.step(lambda: nn.functional.cross_entropy(model(x).double(), y))
        base = {name: p.detach().clone() for name, p in twin.named_parameters()}
        mean = {name: torch.zeros_like(p) for name, p in base.items()}
        with torch.no_grad():
            for d in range(q):
                z = {name: signs_of(optimizer.handle, name, p, step, seed, d) for name, p in base.items()}
                values = []
                for side in (eps, -eps):
                    for name, p in twin.named_parameters():
                        p.copy_(base[name] + side * z[name])
                    values.append(nn.functional.cross_entropy(twin(x.double()), y))
                for name, m in mean.items():
                    m += (values[0] - values[1]) / (2 * eps) * z[name] / q
            for name, p in twin.named_parameters():
                carried[name] = momentum * carried[name] + (1 - momentum) * mean[name]
                p.copy_((1 - lr * decay) * base[name] - lr * carried[name])
    optimizer.handle.merge()
    for name, p in model.named_parameters():
        assert torch.allclose(p.double(), twin.get_parameter(name), atol=2e-5), name


@pytest.mark.parametrize("kind", [LOZO, MeZO, SubZero])
def test_directions_of_a_handle(rng, kind):
    """Signs for dense tensors, in place of Z; matrices of LOZO and SubZero do not change with the law."""
    model = zoo(torch.float32)
    found = {}
    for law in noise.LAWS:
        handle = lozo_kernels.patch(model, estimator=kind.estimator, seed=5, directions_law=law)
        found[law] = {name: handle.materialize(name, 9, direction=2) for name in handle.names}
        dense = [name for name in handle.names if not handle.find(name).low_rank]
        handle.restore()
    assert dense and (len(dense) == len(found["normal"])) == (kind is MeZO)
    for name, z in found["rademacher"].items():
        if name in dense:
            assert (z.abs() == 1).all() and not torch.equal(z, found["normal"][name])
        else:
            assert torch.equal(z, found["normal"][name])


def test_squared_length_is_the_number_of_weights(rng):
    """E|(g.z) z|^2 = d |g|^2 follows, where normal numbers have (d + 2) |g|^2. The mean and neighbours show nothing."""
    n = 1 << 18
    z = noise.dense(rng.getrandbits(64), n, rng.getrandbits(32), 3, offset=rng.getrandbits(40), law="rademacher").double()
    assert float(z @ z) == n
    assert abs(float(z.mean())) < 6 / math.sqrt(n)
    for lag in (1, 7, 8, 32, 128, 1024):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 6 / math.sqrt(n - lag), lag
    assert abs(z.var().item() - 1) < 1e-3


OPTIONS = [
    {"fuse_steps": True},
    {"momentum": 0.9, "rounding": "stochastic", "directions": 3},
    {"placement": "probe", "momentum": 0.5},
    {"placement": "probe", "side": "scratch", "two_sided": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [LOZO, MeZO])
def test_a_run_is_replayed(tmp_path, rng, kind, options):
    path, model = tmp_path / "run", zoo()
    base, trained = recorded(path, model, optimizer=kind, odd=True, seed=rng.getrandbits(64), **options, **SIGNS)
    replayed = replay(base, path)
    assert replayed.agrees and same(weights(base), weights(trained))


def run(path, steps, first=0, state=None, kind=MeZO, die=None):
    """Takes steps with a journal, from the beginning, a state, or where the journal ends. Returns model and optimiser."""
    torch.manual_seed(3)
    model = zoo()
    optimizer = kind(model, lr=1e-2, eps=1e-2, momentum=0.5, seed=8, **SIGNS)
    if state is not None:
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["state"])
    elif path.exists():
        first = Journal.resume(path, optimizer)
    else:
        Journal.create(path, optimizer)
    for step in range(first, steps):
        if step == die:
            path.with_suffix(".reached").touch()
            time.sleep(60)
        optimizer.step(zoo_loss(model, step))
    return model, optimizer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed that was forked")
def test_a_run_goes_on_after_a_kill_and_from_its_state(tmp_path):
    model, optimizer = run(tmp_path / "whole", 9)
    whole = weights(model)
    optimizer.journal.finish()

    reached = tmp_path / "killed.reached"
    assert not forked(lambda: run(tmp_path / "killed", 9, die=5), reached.exists)
    assert read_journal(tmp_path / "killed").steps == 5
    model, optimizer = run(tmp_path / "killed", 9)
    assert same(weights(model), whole)
    optimizer.journal.finish()
    assert diff(tmp_path / "killed", tmp_path / "whole") is None

    model, optimizer = run(tmp_path / "half", 4)
    state = copy.deepcopy({"weights": model.state_dict(), "state": optimizer.state_dict()})
    model, _ = run(tmp_path / "none", 9, first=4, state=state)
    assert same(weights(model), whole)


def test_the_law_is_part_of_a_run(tmp_path):
    """A state or a journal of one law is none of the other; without the field, as earlier versions wrote it, it is "normal"."""
    _, optimizer = run(tmp_path / "run", 3)
    optimizer.journal.finish()
    state = optimizer.state_dict()
    torch.manual_seed(3)
    other = MeZO(zoo(), lr=1e-2, eps=1e-2, momentum=0.5, seed=8)
    for wrong in (state, {**state, "patch": {**state["patch"], "directions_law": "normal"}}):
        target = other if wrong is state else optimizer
        target.journal = None
        with pytest.raises(ValueError, match="saved under other settings; differing: directions_law"):
            target.load_state_dict(wrong)
    with pytest.raises(JournalError, match="directions_law is 'rademacher' there and 'normal' here"):
        Journal.resume(tmp_path / "run", other)
    earlier = other.state_dict()
    del earlier["patch"]["directions_law"]
    other.load_state_dict(earlier)
    text = other.handle.config.to_json().replace('"directions_law": "normal"', '"rank": 2')
    assert "directions_law" not in text and type(other.handle.config).from_json(text) == other.handle.config


@pytest.mark.parametrize("law", ["gaussian", "Rademacher", "", None, 3, ["normal"]])
def test_another_law_is_refused_in_one_line(law):
    model = nn.Linear(3, 2)
    before, x = weights(model), torch.zeros(1, 1, 8)
    for attempt in (
        lambda: MeZO(model, directions_law=law),
        lambda: lozo_kernels.patch(model, directions_law=law),
        lambda: ops.dense_update_(TensorTable([x], [1]), seed=1, draws=[Draw(0)], scales=1.0, law=law),
        lambda: noise.dense(0, 4, 0, 0, law=law),
    ):
        with pytest.raises(ValueError, match="law is one of 'normal', 'rademacher', not ") as error:
            attempt()
        assert len(str(error.value).splitlines()) == 1
    assert same(weights(model), before) and not x.any()


def test_noise_with_factors_has_no_law():
    table = TensorTable([torch.zeros(1, 2, 8)], [1], v=[torch.zeros(1, 1, 8, dtype=torch.float16)])
    with pytest.raises(TypeError, match="law"):
        ops.lowrank_update_(table, seed=1, draws=[Draw(0)], scales=1.0, law="rademacher")
    with pytest.raises(ValueError, match="law='rademacher' is about dense noise, and that of lowrank_update_ is U"):
        ops.run(ops.OPS["lowrank_update_"], table, seed=1, draws=[Draw(0)], scales=1.0, law="rademacher")
