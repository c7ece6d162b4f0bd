"""The algorithms of the paper: an independent simulation in fp64, and the estimator against the true gradient."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lozo_kernels import LOZO, MeZO
from lozo_kernels.kernels import noise


def simulate(weights, objective, *, steps, rank, interval, eps, lr, beta, seed):
    """Algorithms 1 (beta = 0) and 2 of the paper, in fp64, as written; one-dimensional tensors get dense noise.

    Independent of the engine and the ops: only the noise is shared. Returns the loss at the weights before each step.
    """
    x = {name: w.double() for name, w in weights.items()}
    n = {name: torch.zeros(()) for name in x}
    v, losses = {}, []
    for t in range(steps):
        losses.append(objective(x).item())
        direction, u = {}, {}
        for name, w in x.items():
            tid = noise.tensor_id(name)
            if w.dim() == 1:
                direction[name] = u[name] = noise.dense(seed, w.numel(), tid, t).double()
                continue
            u[name] = noise.factor(seed, w.shape[0], rank, tid, t).double()
            if t % interval == 0:
                old = v.get(name)
                v[name] = noise.factor(seed, w.shape[1], rank, tid, t // interval, stream="V").double()
                if old is not None and beta:
                    n[name] = n[name] @ old.T @ v[name] / w.shape[1]
            direction[name] = u[name] @ v[name].T
        plus = objective({name: w + eps * direction[name] for name, w in x.items()})
        minus = objective({name: w - eps * direction[name] for name, w in x.items()})
        c = (plus - minus) / (2 * eps)
        for name, w in x.items():
            if beta:
                n[name] = beta * n[name] + (1 - beta) * c * u[name]
                move = n[name] if w.dim() == 1 else n[name] @ (v[name] / rank).T
            else:
                move = c * (direction[name] if w.dim() == 1 else direction[name] / rank)
            x[name] = w - lr * move
    return losses


def problem(generator):
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3
    x = torch.randn(64, 12, generator=generator).double()
    y = torch.randint(0, 4, (64,), generator=generator)

    def objective(weights):
        """In fp64 whatever the weights' dtype, so that only the weights' own rounding differs."""
        return nn.functional.cross_entropy(functional_call(model, {k: w.double() for k, w in weights.items()}, x), y)

    return model, objective


@pytest.mark.parametrize("fuse_steps", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.9], ids=["lozo", "lozo-m"])
@torch.no_grad()
def test_trajectory_is_that_of_the_paper(rng, backend, beta, fuse_steps):
    seed = rng.getrandbits(64)
    model, objective = problem(torch.Generator().manual_seed(rng.getrandbits(32)))
    settings = {"rank": 3, "interval": 20, "eps": 1e-2, "lr": 3e-3, "seed": seed}
    expected = simulate({k: w.clone() for k, w in model.named_parameters()}, objective, steps=200, beta=beta, **settings)
    optimizer = LOZO(model, momentum=beta, fuse_steps=fuse_steps, backend=backend.name, **settings)
    losses = []
    for _ in range(200):
        optimizer.flush()
        losses.append(objective(dict(model.named_parameters())).item())
        optimizer.step(lambda: objective(dict(model.named_parameters())))
    assert losses[-1] < losses[0]
    for step, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
        assert abs(ours - theirs) <= 1e-5 * theirs, f"step {step}: {ours} against {theirs}"


@pytest.mark.parametrize(("scaling", "eps_factor", "lr_factor"), [("card", 3, 3), ("published", 1, 1 / 3)])
def test_scalings_convert_as_documented(scaling, eps_factor, lr_factor):
    first = nn.Linear(6, 5, bias=False)
    second = copy.deepcopy(first)
    x = torch.randn(8, 6)
    a = LOZO(first, lr=1e-2, eps=1e-3, rank=3)
    b = LOZO(second, lr=1e-2 * lr_factor, eps=1e-3 * eps_factor, rank=3, scaling=scaling)
    for _ in range(20):
        a.step(lambda: first(x).double().pow(2).mean())
        b.step(lambda: second(x).double().pow(2).mean())
    assert torch.allclose(first.weight, second.weight, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4])
def test_lge_averages_to_the_gradient(rng, rank):
    """LGE without the lazy V: the mean of S estimates misses the gradient by what S predicts, in size and direction.

    For an m x n gradient G, with Gaussian U and V, E |c U V^T / r|^2 = |G|^2 (mn + 2 (m + n + r + 1) / r) (fourth moments of
    Gaussians), so the mean of S estimates has the expected squared error |G|^2 (mn + 2 (m + n + r + 1) / r - 1) / S.
    """
    m, n, samples = 6, 9, 1500
    model = nn.Linear(n, m, bias=False)
    x, target = torch.randn(32, n).double(), torch.randn(32, m).double()

    def loss():
        return (x @ model.weight.double().T - target).pow(2).mean()

    loss().backward()
    gradient = model.weight.grad.double()
    model.weight.grad = None
    optimizer = LOZO(model, lr=0.0, eps=1e-3, rank=rank, interval=1, seed=rng.getrandbits(64))
    mean = torch.zeros(m, n, dtype=torch.float64)
    start = model.weight.detach().clone()
    for step in range(samples):
        model.weight.data.copy_(start)  # no drift of the expansion point
        optimizer.step(loss)
        mean += optimizer.info.c * optimizer.handle.materialize("weight", step) / rank / samples
    size = gradient.norm() ** 2
    predicted = size * (m * n + 2 * (m + n + rank + 1) / rank - 1) / samples
    error = (mean - gradient).norm() ** 2
    assert 0.2 * predicted < error < 3 * predicted
    cosine = (mean * gradient).sum() / mean.norm() / gradient.norm()
    assert cosine > 1 / (1 + 3 * predicted / size) ** 0.5


def test_mezo_averages_to_the_gradient(rng):
    """RGE: E |c Z|^2 = |G|^2 (d + 2) for d parameters."""
    d, samples = 40, 1500
    model = nn.Linear(d, 1, bias=False)
    x = torch.randn(16, d).double()

    def loss():
        return (x @ model.weight.double().T).sin().mean()

    loss().backward()
    gradient = model.weight.grad.double()
    optimizer = MeZO(model, lr=0.0, seed=rng.getrandbits(64))
    mean = torch.zeros(1, d, dtype=torch.float64)
    start = model.weight.detach().clone()
    for step in range(samples):
        model.weight.data.copy_(start)
        optimizer.step(loss)
        mean += optimizer.info.c * optimizer.handle.materialize("weight", step) / samples
    predicted = gradient.norm() ** 2 * (d + 1) / samples
    assert 0.2 * predicted < (mean - gradient).norm() ** 2 < 3 * predicted
