"""The backend for new trainers: directions by seed, several at once, and back."""

import re
from itertools import starmap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lozo_kernels.adapters import DirectionBackend, PerturbationBackend
from lozo_kernels.kernels import noise
from python_tests.miniatures import TinyLM, copy_of


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def direction(name, p, seed, *, estimator, rank, v_seed=None, window=0):
    """D(seed), materialised; the tied weight is found by the name that comes first in the alphabet."""
    i = noise.tensor_id("decoder.weight" if name == "embed.weight" else name)
    if estimator == "dense" or p.dim() < 2:
        return noise.dense(seed, p.numel(), i, 0).view(p.shape)
    v = noise.factor(seed if v_seed is None else v_seed, p.shape[1], rank, i, window, stream="V")
    return noise.factor(seed, p.shape[0], rank, i, 0) @ v.T


def close(model, expected):
    return all((p - expected[name]).abs().max() < 1e-5 for name, p in model.named_parameters())


@pytest.mark.parametrize(("estimator", "v_seed"), (("dense", None), ("lowrank", None), ("lowrank", 7)))
def test_perturb_update_and_revert(rng, estimator, v_seed):
    model, rank, window = TinyLM(rng.choice((5, 9))), rng.choice((1, 3)), 4
    backend = DirectionBackend(model, estimator=estimator, rank=rank, v_seed=v_seed)
    assert isinstance(backend, PerturbationBackend) and "embed.weight" in backend.names and "frozen" not in backend.names
    if v_seed is not None:
        backend.enter_window(window)
    where = {"estimator": estimator, "rank": rank, "v_seed": v_seed, "window": window if v_seed is not None else 0}
    start, seeds = weights(model), [rng.getrandbits(63) for _ in range(4)]

    def along(seed, name):
        return direction(name, start[name], seed, **where) if name != "frozen" else 0.0

    backend.perturb(seeds[0], 0.01)
    assert close(model, {n: w + 0.01 * along(seeds[0], n) for n, w in start.items()})
    backend.perturb(seeds[0], -0.01)
    assert close(model, start)

    cs, lr, wd = [rng.gauss(0, 1) for _ in seeds], 0.02, 0.5
    backend.update(seeds, cs, lr, wd)
    share = {n: 1 / rank if estimator == "lowrank" and w.dim() > 1 else 1.0 for n, w in start.items()}
    decay = {n: 1.0 if n == "frozen" else 1 - lr * wd for n in start}
    moved = {
        n: decay[n] * w - lr * share[n] * sum(c * along(s, n) for s, c in zip(seeds, cs, strict=True)) for n, w in start.items()
    }
    assert close(model, moved) and not close(model, start)
    backend.revert(seeds, cs, lr, wd)
    assert close(model, start)


def test_clients_that_exchange_seeds_and_scalars_stay_equal(rng):
    """Federated: what a client sends is (seed, c); each applies all of them, whatever the order and container of its parameters."""
    model = TinyLM(tied=False)
    tensors = {name: p.detach().clone() for name, p in reversed(list(model.named_parameters())) if p.requires_grad}
    clients = [DirectionBackend(model), DirectionBackend(tensors.items())]
    log = [(np.random.default_rng(0).integers(1 << 30) + i, torch.tensor(rng.gauss(0, 1))) for i in range(3)]
    for client in clients:
        client.update([s for s, _ in log], [c / 3 for _, c in log], 0.1)
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_an_evolution_strategy_climbs(rng):
    model = nn.Linear(6, 5)
    target, backend = torch.randn(5, 6), DirectionBackend(model, rank=2)

    def reward():
        return -float((model.weight.detach() - target).square().sum())

    start, seed = reward(), rng.getrandbits(30)
    for _ in range(20):
        seeds = [seed := seed + 1 for _ in range(16)]
        rewards = []
        for s in seeds:
            backend.perturb(s, 0.02)
            rewards.append(reward())
            backend.perturb(s, -0.02)
        mean = sum(rewards) / len(rewards)
        backend.update(seeds, [-(r - mean) / (0.02 * len(seeds)) for r in rewards], 0.05)
    assert reward() < 0 and reward() > 0.5 * start


def test_storage_and_parameters_are_found_at_every_call(rng):
    model = TinyLM()
    twin = copy_of(model)
    moving, still = DirectionBackend(model), DirectionBackend(twin)
    for seed in range(3):
        for backend in (moving, still):
            backend.perturb(seed, 0.1)
        model.fc1.weight.data = model.fc1.weight.data.clone()
        model.fc2.weight = nn.Parameter(model.fc2.weight.detach().clone())
    assert all(starmap(torch.equal, zip(model.parameters(), twin.parameters(), strict=True)))


def test_inference_mode():
    model = TinyLM()
    before = weights(model)
    with torch.inference_mode():
        backend = DirectionBackend(model, backend="eager")
        backend.perturb(1, 0.1)
    backend.perturb(2, 0.1)
    backend.perturb(2, -0.1)
    backend.update([1], [1.0], 0.1, 0.0)
    backend.revert([1], [1.0], 0.1)
    backend.perturb(1, -0.1)
    assert close(model, before)


def test_stochastic_rounding_keeps_what_nearest_drops():
    for rounding, kept in (("nearest", False), ("stochastic", True)):
        weight = torch.ones(64, 64, dtype=torch.bfloat16)
        DirectionBackend([("weight", weight)], rounding=rounding).update([1, 2], [1.0, 1.0], 1e-4)
        assert bool((weight == 1.0).all()) != kept


@pytest.mark.parametrize(
    ("call", "error", "words"),
    (
        (lambda b: b.update([1, 2], [1.0], 0.1), ValueError, "2 seeds for 1 coefficients"),
        (lambda b: b.update([], [], 0.1), ValueError, "at least one"),
        (lambda b: b.update([1, -2], [1.0, 1.0], 0.1), ValueError, "seed is at least 0"),
        (lambda b: b.update([1.5], [1.0], 0.1), TypeError, "seed is an integer"),
        (lambda b: b.update([1], [float("nan")], 0.1), ValueError, "coefficient is a finite number"),
        (lambda b: b.update([1], [1.0], "0.1"), TypeError, "lr is a number"),
        (lambda b: b.revert([1], [1.0], 0.5, 2.0), ValueError, "nothing of the weights"),
        (lambda b: b.perturb(1, float("inf")), ValueError, "finite"),
        (lambda b: b.perturb(1 << 64, 0.1), ValueError, "seed is at least 0"),
        (lambda b: b.enter_window(1), RuntimeError, "v_seed"),
        (lambda b: DirectionBackend(nn.Linear(2, 2), estimator="subspace"), ValueError, "estimator is one of 'lowrank', 'dense'"),
    ),
)
def test_bad_input_changes_nothing(call, error, words):
    model = TinyLM()
    before, backend = weights(model), DirectionBackend(model)
    with pytest.raises(error, match=words):
        call(backend)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("parameters", "words"),
    (
        (None, "not NoneType"),
        (3, "not int"),
        (torch.ones(2, 2), "not Tensor"),
        ([1, 2], "one of the list is int"),
        ([torch.ones(2)], "one of the list is Tensor"),
        ([("a", 3.0)], "one of the list is tuple"),
        ([("a", torch.ones(2, 2)), ("b", torch.ones(2, dtype=torch.int64))], "'b' has torch.int64"),
    ),
)
def test_what_is_no_parameters_is_refused(parameters, words):
    with pytest.raises(TypeError, match=rf"takes a module or \(name, tensor\) pairs.*{words}"):
        DirectionBackend(parameters)


def test_the_example_of_the_documentation(rng):
    text = (Path(__file__).parent.parent / "docs" / "adapters.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "DirectionBackend" in block)
    model, batches = nn.Linear(4, 3), [torch.randn(8, 4) for _ in range(150)]

    def loss(model, batch):
        return model(batch).square().mean().detach()

    before = loss(model, batches[0])
    exec(example, {"model": model, "batches": batches, "loss": loss, "eps": 1e-3, "lr": 0.01})
    assert loss(model, batches[0]) < before
