"""ZO-Muon: what it makes of N, whole runs against the algorithm as written in fp64, its parameter groups, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn

from lozo_kernels import MeZO, ZOMuon, capture_step, export_lora, patch
from lozo_kernels.kernels import noise
from lozo_kernels.kernels.registry import choose_backend
from lozo_kernels.model.config import PatchConfig
from lozo_kernels.model.estimators import ESTIMATORS, FactorSpec
from python_tests.models import Zoo, same, weights, zoo_loss
from python_tests.test_algorithms import problem
from python_tests.test_subzero import GRID, basis, seen_weights


def orthogonal(n, live):
    """N (N^T N)^(-1/2) by a singular value decomposition in fp64, of the columns that V has, on the grid."""
    found = torch.zeros_like(n, dtype=torch.float64)
    left, s, right = torch.linalg.svd(n[..., :live].double(), full_matrices=False)
    if n.any():
        found[..., :live] = left * (s > 1e-6 * s[..., :1]).unsqueeze(-2) @ right
    size = math.sqrt(max(n.shape[-2], live))
    return torch.round(found * size / GRID) * GRID / size


def simulate(start, objective, *, steps, rank, interval, eps, lr, beta, seed, directions):
    """ZO-Muon in fp64, one-sided: X -= lr orth(N) V^T. Returns the losses before each step."""
    x = {name: w.double() for name, w in start.items()}
    v, losses, n = {}, [], {name: torch.zeros(()) for name in x}
    for t in range(steps):
        losses.append(objective(x).item())
        if t % interval == 0:
            for name, w in x.items():
                if w.dim() == 2:
                    old, live = v.get(name), min(rank, w.shape[1])
                    v[name] = basis(seed, w.shape[1], rank, live, noise.tensor_id(name), t // interval, "V")
                    n[name] = n[name] if old is None else n[name] @ old.T @ v[name] / w.shape[1]
        mean = {name: torch.zeros(()) for name in x}
        for d in range(directions):
            left, direction = {}, {}
            for name, w in x.items():
                tid = noise.tensor_id(name)
                if w.dim() == 1:
                    left[name] = direction[name] = noise.dense(seed, w.numel(), tid, t, direction=d).double()
                else:
                    left[name] = noise.factor(seed, w.shape[0], rank, tid, t, direction=d).double()
                    direction[name] = left[name] @ v[name].T / rank**0.5
            c = (objective({name: w + eps * direction[name] for name, w in x.items()}) - objective(x)) / eps
            mean = {name: m + c / directions * left[name] for name, m in mean.items()}
        for name, w in x.items():
            n[name] = beta * n[name] + (1 - beta) * mean[name]
            if w.dim() == 1:
                x[name] = w - 1e-5 * lr * n[name]
            else:
                x[name] = w - lr * orthogonal(n[name], min(rank, w.shape[1])) @ v[name].T / w.shape[1] ** 0.5
    return losses


@pytest.mark.parametrize(
    "options",
    [{}, {"fuse_steps": True, "momentum": 0.8}, {"placement": "probe", "momentum": 0.8}],
    ids=str,
)
@torch.no_grad()
def test_trajectory_is_that_of_the_algorithm(rng, options):
    """Through three new V's. The last layer has fewer rows, and its bias fewer elements, than the rank."""
    seed = rng.getrandbits(64)
    model, objective = problem(torch.Generator().manual_seed(rng.getrandbits(32)))
    settings = {"rank": 5, "interval": 40, "eps": 1e-2, "lr": 1e-2, "seed": seed, "directions": 4}
    expected = simulate(weights(model), objective, steps=150, beta=options.get("momentum", 0.0), **settings)
    patched = copy.deepcopy(model)  # the objective puts weights of its own into the model
    optimizer = ZOMuon(patched, two_sided=False, **settings, **options)
    losses = []
    for _ in range(150):
        optimizer.flush()
        losses.append(objective(seen_weights(patched)).item())
        optimizer.step(lambda: objective(seen_weights(patched)))
    assert losses[-1] < 0.97 * losses[0]
    for step, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
        assert abs(ours - theirs) <= 1e-5 * theirs, f"step {step}: {ours} against {theirs}"


@pytest.mark.parametrize(("rows", "cols"), [(40, 17), (3, 50), (30, 4), (1, 9), (64, 64)])
def test_orth_is_that_of_a_singular_value_decomposition(rng, rows, cols):
    rank, batch, tid = 6, 3, 7
    estimator = ESTIMATORS["muon"](PatchConfig(estimator="muon", rank=rank))
    model = nn.Module()
    model.stack = nn.Parameter(torch.randn(batch, rows, cols))
    handle = patch(model, estimator="muon", rank=rank, seed=rng.getrandbits(64))
    handle.enter_window(0)
    estimator, tid = handle.estimator, noise.tensor_id("stack")
    n = torch.randn(batch, rows, rank) * 10.0 ** rng.randint(-20, 20)
    n[1, :, 1] = n[1, :, 0]  # of a smaller rank
    n[2] = 0.0
    (found,) = estimator.moved([n], [tid])
    expected = orthogonal(n, min(rank, cols)) / cols**0.5
    assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, rtol=2.0**-23, atol=0.0)
    gram = found[0].double().mT @ found[0].double() * cols
    if rows >= rank <= cols:
        assert (gram - torch.eye(rank)).abs().max() < 4 * GRID / rows**0.5
    assert not found[2].any()


def test_v_is_orthonormal_and_directions_have_unit_variance(rng):
    rows, cols, rank, draws = 40, 25, 6, 100
    model = nn.Linear(cols, rows, bias=False)
    handle = patch(model, estimator="muon", rank=rank, interval=10, seed=rng.getrandbits(64))
    cpu = torch.device("cpu")
    v = handle.estimator.right(FactorSpec(noise.tensor_id("weight"), (1, rows, cols), choose_backend(cpu).backend, cpu), 0)
    assert (v[0] @ v[0].T / cols - torch.eye(rank)).abs().max() < 4 * GRID / cols**0.5
    mean = sum(float(handle.materialize("weight", step).square().mean()) for step in range(draws)) / draws
    assert abs(mean - 1) < 5 * (2 / (rows * rank) / draws) ** 0.5 + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_the_same_on_every_backend(rng, any_backend, dtype):
    """Odd shapes, stacked experts, a vector; decay, one draw and four, a perturbation that is taken out and one that is put in."""
    seed = rng.getrandbits(64)
    shapes = {"a": (17, 33), "b": (3, 5, 9), "c": (13,)}
    start = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}

    def after(backend):
        model = nn.Module()
        for name, w in start.items():
            setattr(model, name, nn.Parameter(w.clone()))
        handle = patch(model, estimator="muon", rank=5, interval=3, seed=seed, backend=backend)
        handle.enable_momentum()
        handle.perturb_(3, 1e-2)
        handle.update_(3, 3.7, 1e-2, weight_decay=0.1, beta=0.0, applied=1e-2)
        handle.update_(4, [0.3, -2.0, 1.0, 0.1], 1e-2, beta=0.9, perturb_next=1e-2)
        return weights(model)

    found = after(any_backend.name)
    assert same(found, after("eager"))
    assert all(torch.isfinite(w).all() and not torch.equal(w, start[name]) for name, w in found.items())


def test_probe_leaves_the_weights_and_reads_them_beside_activations(rng):
    torch.manual_seed(rng.getrandbits(32))
    model = Zoo()
    twin, before = copy.deepcopy(model), weights(model)
    settings = {"rank": 3, "interval": 5, "lr": 1e-3, "eps": 1e-2, "directions": 2, "seed": rng.getrandbits(64)}
    settings["exclude"] = ["experts", "gain"]  # of which an adapter cannot be made
    probe, plain = ZOMuon(model, placement="probe", side="activation", keep_factors=True, **settings), ZOMuon(twin, **settings)
    a, b = zoo_loss(model), zoo_loss(twin)
    for _ in range(12):
        assert abs(float(probe.step(a)) - float(plain.step(b))) < 1e-5
    assert "activation" in {member.side for member in probe.handle.members}
    with pytest.warns(UserWarning, match="is tied to"):
        adapter = export_lora(probe.handle)
    a, b = (next(w for name, w in adapter.tensors.items() if f"up.lora_{side}" in name) for side in "AB")
    probe.handle.restore()
    expected = weights(twin)
    for name, w in weights(model).items():
        assert torch.allclose(w, expected[name], atol=1e-5), name
    assert torch.allclose(b @ a, expected["up.weight"] - before["up.weight"], atol=1e-5)


def test_batched_losses_are_the_sequential_ones(rng):
    torch.manual_seed(rng.getrandbits(32))
    model = nn.Sequential(nn.Embedding(11, 24), nn.Linear(24, 11))
    tokens, found = torch.randint(0, 11, (6,)), []
    for evaluation in ("sequential", "batched"):
        own = copy.deepcopy(model)
        optimizer = ZOMuon(own, rank=4, directions=3, two_sided=False, placement="probe", evaluation=evaluation)
        for _ in range(3):
            optimizer.step(lambda batch, own=own: nn.functional.cross_entropy(own(batch), batch, reduction="none"), tokens)
        found.append(torch.cat((optimizer.info.loss_plus, optimizer.info.loss_minus)))
    assert torch.allclose(*found, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_a_resumed_run_has_the_bits_of_the_whole(rng, placement, momentum):
    torch.manual_seed(rng.getrandbits(32))
    settings = {
        "rank": 3,
        "interval": 4,
        "momentum": momentum,
        "placement": placement,
        "directions": 3,
        "seed": rng.getrandbits(64),
    }
    model = Zoo()
    optimizer, loss = ZOMuon(model, weight_decay=0.1, **settings), zoo_loss(model)
    for _ in range(6):
        optimizer.step(loss)
    state = copy.deepcopy(optimizer.state_dict())
    saved = {name: p.clone() for name, p in model.state_dict().items()}
    for step in range(4):
        optimizer.step(loss if step else lambda: float("nan"))
    model.state_dict()
    other = Zoo()
    other.load_state_dict(saved)
    again, loss = ZOMuon(other, weight_decay=0.1, **settings), zoo_loss(other)
    again.load_state_dict(state)
    for step in range(4):
        again.step(loss if step else lambda: float("nan"))
    other.state_dict()
    assert same(weights(model), weights(other))


def test_vectors_follow_the_plain_rule_at_a_rate_of_their_own(rng):
    """They end where MeZO's do that sees the same c, in the rounding of fp32."""
    seed = rng.getrandbits(64)
    model, other = nn.Linear(6, 5), nn.Linear(6, 5)
    other.load_state_dict(model.state_dict())
    matrices, vectors = [model.weight], [("bias", model.bias)]
    optimizer = ZOMuon(model, [{"params": matrices}, {"params": vectors, "lr": 1e-2}], lr=0.5, seed=seed, directions=2)
    plain = MeZO(other, lr=1e-2, seed=seed, directions=2, include="bias")
    for _ in range(5):
        optimizer.step(lambda: model.weight.square().sum() + model.bias.sum())
        plain.handle.update_(plain.stepper.step, optimizer.info.c.tolist(), 1e-2)
        plain.stepper.step += 1
    assert torch.allclose(model.bias, other.bias, atol=1e-6) and not torch.equal(model.weight, other.weight)


def test_groups_without_a_rate_are_divided():
    model = Zoo()
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    for params in (None, trained.values(), list(trained.items())):
        optimizer = ZOMuon(model, params, lr=0.5)
        rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
        assert rates == {name: 0.5 if named[name].dim() > 1 else 0.5e-5 for name in optimizer.handle.names}
        optimizer.handle.restore()
    optimizer = ZOMuon(model, [{"params": trained.values(), "lr": 0.1, "weight_decay": 0.1}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    with pytest.raises(ValueError, match="a parameter group is empty"):
        ZOMuon(nn.Linear(3, 2), [{"params": []}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "auto"}, "lr='auto' is a rate for updates of c D, and those of ZO-Muon have one length: give a number"),
        ({"normalise": "scalar"}, "leave normalise out"),
        ({"scaling": "card"}, "directions of 'muon' have one scale"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    model = nn.Linear(6, 5)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        ZOMuon(model, **options)
    assert same(weights(model), before) and ZOMuon(model).param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_captures_and_updates_without_momentum_are_refused(placement):
    model = Zoo()
    before, loss = weights(model), zoo_loss(model)
    optimizer = ZOMuon(model, placement=placement)
    with pytest.raises(NotImplementedError, match="ZO-Muon cannot be captured"):
        capture_step(optimizer, loss)
    with pytest.raises(ValueError, match=r"made of momentum: give beta, 0\.0 for none"):
        optimizer.handle.update_(0, 1.0, 1e-2)
    assert same(weights(model), before)


def test_a_loop_that_back_propagates_takes_the_same_steps(rng):
    seed = rng.getrandbits(64)

    class Loss(nn.Sequential):
        def forward(self, x):
            return super().forward(x).square().mean()

    model, x = Loss(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 1)), torch.randn(20, 7)
    twin = copy.deepcopy(model)
    driven = ZOMuon(model, rank=3, interval=2, drive="backward", seed=seed)
    plain = ZOMuon(twin, rank=3, interval=2, seed=seed)
    for _ in range(5):
        model(x).backward()
        driven.step()
        driven.zero_grad()
        plain.step(lambda: twin(x))
    found = weights(model)  # with a parameter that the loop's gradient is of
    assert all(torch.allclose(w, found[name], atol=1e-4) for name, w in weights(twin).items())
