"""The estimators as functions: against differentiation, and against what the optimisers do."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from lozo_kernels import LOZO, MeZO, SubZero
from python_tests import gradients


def problem():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(16, 5).double(), torch.randint(0, 3, (16,))

    def loss(weights):
        return nn.functional.cross_entropy(functional_call(model, weights, x), y)

    return {name: p.detach() for name, p in model.named_parameters()}, loss


def close(a, b, rtol=1e-6):
    return all(torch.allclose(a[name], b[name], rtol=rtol, atol=1e-7) for name in a)


def test_coordinates_give_the_gradient(rng):
    at, loss = problem()
    assert close(gradients.cge(loss, at, 1e-5), grad(loss)(at))


def test_forward_gradient_is_the_projected_gradient_times_z(rng):
    at, loss = problem()
    z = {name: torch.randn_like(x) for name, x in at.items()}
    c = sum((g * z[name]).sum() for name, g in grad(loss)(at).items())
    found = gradients.forward_gradient(loss, at, z)
    assert close(found, {name: c * d for name, d in z.items()})
    assert close(gradients.rge(loss, at, z, 1e-5), found)


def test_subspace_and_lge_project_the_gradient(rng):
    at, loss = problem()
    true, r = grad(loss)(at), 2
    matrices = {name: x for name, x in at.items() if x.dim() == 2}
    u = {name: torch.randn(x.shape[0], r).double() if name in matrices else torch.randn_like(x) for name, x in at.items()}
    v = {name: torch.randn(x.shape[1], r).double() for name, x in matrices.items()}
    d = {name: u[name] @ v[name].T if name in v else u[name] for name in at}
    c = sum((true[name] * d[name]).sum() for name in at)
    assert close(gradients.lge(loss, at, u, v, 1e-5), {n: c * d[n] / (r if n in v else 1) for n in at})
    q = {name: torch.linalg.qr(f)[0] if name in v else f for name, f in u.items()}
    w = {name: torch.linalg.qr(f)[0] for name, f in v.items()}
    s = {name: torch.randn(r, r).double() for name in v}
    d = {n: q[n] @ s[n] @ w[n].T * at[n].numel() ** 0.5 / r if n in v else q[n] for n in at}
    c = sum((true[name] * d[name]).sum() for name in at)
    assert close(gradients.subspace(loss, at, q, s, w, 1e-5), {n: c * d[n] for n in at})


@pytest.mark.parametrize(("optimizer", "factor"), [(LOZO, 2), (MeZO, 1), (SubZero, 1)])
def test_optimisers_step_along_these_estimates(rng, optimizer, factor):
    """One step with learning rate 1 moves the weights by the estimate along the optimiser's own direction."""
    at, loss = problem()
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model.load_state_dict(at)
    start = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    options = {} if optimizer is MeZO else {"rank": 2}
    chosen = optimizer(model, lr=1.0, eps=1e-2, seed=rng.getrandbits(64), **options)
    d = {name: chosen.handle.materialize(name, 0).double() for name in start}
    expected = gradients.rge(loss, start, d, 1e-2)
    chosen.step(lambda: loss({name: p.double() for name, p in model.named_parameters()}))
    for name, p in model.named_parameters():
        share = factor if p.dim() == 2 else 1
        assert torch.allclose(start[name] - p.detach().double(), expected[name] / share, rtol=1e-3, atol=1e-4), name
