"""SubZero: its bases and cores, its directions, and whole runs against the algorithm as written, in fp64."""

import copy
from itertools import starmap

import pytest
import torch
from torch import nn

import lozo_kernels
from lozo_kernels import PatchConfig, SubZero, patch
from lozo_kernels.kernels import noise
from lozo_kernels.model.estimators import ESTIMATORS
from lozo_kernels.model.estimators.subspace import orthonormal
from lozo_kernels.model.layout import most_square
from python_tests.models import Zoo, same, weights, zoo_loss
from python_tests.test_algorithms import problem

GRID = 2.0**-8


def basis(seed, rows, rank, filled, tid, window, stream):
    """Independent of the estimator but for the noise: orthonormal columns by Gram-Schmidt in fp64, scaled and on the grid."""
    g = noise.factor(seed, rows, rank, tid, window, stream=stream).double()
    q = torch.zeros(rows, rank, dtype=torch.float64)
    for k in range(filled):
        column = g[:, k].clone()
        for _ in range(2):  # twice is enough
            column -= q[:, :k] @ (q[:, :k].T @ column)
        q[:, k] = column / column.norm()
    return torch.round(q * rows**0.5 / GRID) * GRID


def simulate(start, objective, *, steps, rank, interval, eps, lr, beta, seed):
    """SubZero as written, in fp64: X -= lr c U S V^T sqrt(mn) / r. Returns the losses before each step."""
    x = {name: w.double() for name, w in start.items()}
    u, v, losses, n = {}, {}, [], {name: torch.zeros(()) for name in x}
    for t in range(steps):
        losses.append(objective(x).item())
        direction, left = {}, {}
        for name, w in x.items():
            tid = noise.tensor_id(name)
            if w.dim() == 1:
                direction[name] = left[name] = noise.dense(seed, w.numel(), tid, t).double()
                continue
            r = min(rank, *w.shape)
            if t % interval == 0:
                old = v.get(name)
                u[name], v[name] = (basis(seed, w.shape[i], rank, r, tid, t // interval, "UV"[i]) for i in (0, 1))
                if old is not None and beta:
                    n[name] = n[name] @ old.T @ v[name] / w.shape[1]
            s = noise.factor(seed, rank, rank, tid, t, stream="S").double()
            left[name] = u[name] @ s / r
            direction[name] = left[name] @ v[name].T
        sides = ({name: w + side * direction[name] for name, w in x.items()} for side in (eps, -eps))
        plus, minus = map(objective, sides)
        c = (plus - minus) / (2 * eps)
        for name, w in x.items():
            n[name] = beta * n[name] + (1 - beta) * c * left[name]
            x[name] = w - lr * (n[name] if w.dim() == 1 else n[name] @ v[name].T)
    return losses


@pytest.mark.parametrize("placement", ["inplace", "probe"])
@pytest.mark.parametrize("beta", [0.0, 0.9], ids=["plain", "momentum"])
@torch.no_grad()
def test_trajectory_is_that_of_the_algorithm(rng, backend, placement, beta):
    seed = rng.getrandbits(64)
    model, objective = problem(torch.Generator().manual_seed(rng.getrandbits(32)))
    settings = {"rank": 5, "interval": 20, "eps": 1e-2, "lr": 3e-3, "seed": seed}
    expected = simulate(weights(model), objective, steps=60, beta=beta, **settings)
    patched = copy.deepcopy(model)  # the objective puts weights of its own into the model
    optimizer = SubZero(patched, momentum=beta, placement=placement, backend=backend.name, **settings)
    losses = []
    for _ in range(60):
        losses.append(objective(seen_weights(patched)).item())
        optimizer.step(lambda: objective(seen_weights(patched)))
    assert losses[-1] < losses[0]
    for step, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
        assert abs(ours - theirs) <= 1e-5 * theirs, f"step {step}: {ours} against {theirs}"


def seen_weights(model):
    """The weights that a forward pass sees, which a probe puts there for its time."""
    seen, hooks = {}, []

    def look(module, *_):
        prefix = names[module]
        seen.update({f"{prefix}.{name}": p.detach().clone() for name, p in module._parameters.items()})

    names = {module: name for name, module in model.named_modules()}
    hooks = [module.register_forward_hook(look) for module in model if isinstance(module, nn.Linear)]
    model(torch.zeros(1, 12))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("rows", "cols"), [(40, 7), (3, 50), (1, 9), (64, 64)])
def test_factors_are_orthonormal_and_on_the_grid(rng, rows, cols):
    config = PatchConfig(estimator="subspace", rank=6, interval=4, seed=rng.getrandbits(64))
    estimator = ESTIMATORS["subspace"](config)
    model = nn.Linear(cols, rows, bias=False)
    handle = patch(model, **config.to_dict())
    tid, r = noise.tensor_id("weight"), min(6, rows, cols)
    handle.enter_window(9)
    v = handle._v["weight"][0].float().T
    assert torch.equal(v.double(), basis(config.seed, cols, 6, r, tid, 2, "V"))
    gram = (v.T @ v / cols)[:r, :r]
    assert (gram - torch.eye(r)).abs().max() < 4 * GRID / cols**0.5
    assert not v[:, r:].any()
    assert torch.equal(v, torch.round(v / GRID) * GRID)
    assert type(estimator) is type(handle.estimator)


def test_signs_of_columns_are_not_the_librarys():
    g = torch.randn(1, 30, 4)
    sides = (orthonormal(g, 4).double().transpose(1, 2) @ g.double()).diagonal(dim1=-2, dim2=-1)
    assert (sides > 0).all()


def test_cores_are_those_of_the_noise(rng):
    seed, owners = rng.getrandbits(64), [(rng.getrandbits(32), b) for b in (0, 0, 3)]
    many = noise.cores(seed, 6, owners, 17, direction=2)
    for s, (tid, b) in zip(many, owners, strict=True):
        assert torch.equal(s, noise.factor(seed, 6, 6, tid, 17, stream="S", row_offset=6 * b, direction=2))


def test_directions_have_unit_variance_and_the_stated_rank(rng):
    """E of a squared element of U S V^T sqrt(mn) / r is 1; over n draws the mean square misses it by what r^2 normals allow."""
    rows, cols, rank, draws = 40, 25, 6, 200
    model = nn.Linear(cols, rows, bias=False)
    handle = patch(model, estimator="subspace", rank=rank, interval=10, seed=rng.getrandbits(64))
    squares = []
    for step in range(draws):
        d = handle.materialize("weight", step)
        assert torch.linalg.matrix_rank(d) <= rank
        squares.append(d.square().mean().item())
    # The mean square is |S|^2 / r^2, of variance 2 / r^2.
    assert abs(sum(squares) / draws - 1) < 5 * (2 / rank**2 / draws) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bits_are_the_same_on_every_backend(rng, any_backend, dtype, rounding):
    """The pass over the weights, given the factors: odd shapes, stacked experts, a vector."""
    seed = rng.getrandbits(64)
    shapes = {"a": (17, 33), "b": (3, 5, 9), "c": (13,)}
    start = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}

    def after(backend):
        model = nn.Module()
        for name, w in start.items():
            setattr(model, name, nn.Parameter(w.clone()))
        handle = patch(model, estimator="subspace", rank=5, interval=3, seed=seed, rounding=rounding, backend=backend)
        handle.perturb_(4, 1e-2)
        handle.shift_(4, (0, 1e-2), (0, -1e-2))
        handle.update_(4, 3.7, 1e-2, weight_decay=0.1, applied=-1e-2)
        return weights(model)

    found = after(any_backend.name)
    assert same(found, after("eager"))
    assert all(torch.isfinite(w).all() and not torch.equal(w, start[name]) for name, w in found.items())


def test_probe_leaves_the_weights_and_follows_the_run_in_place(rng):
    seed = rng.getrandbits(64)
    torch.manual_seed(rng.getrandbits(32))
    model = Zoo()
    twin = Zoo()
    twin.load_state_dict(model.state_dict())
    before = weights(model)
    settings = {"rank": 3, "interval": 50, "lr": 1e-4, "eps": 1e-2, "seed": seed}
    probe, plain = SubZero(model, placement="probe", **settings), SubZero(twin, **settings)
    a, b = zoo_loss(model), zoo_loss(twin)
    for _ in range(12):
        assert abs(float(probe.step(a)) - float(plain.step(b))) < 1e-5
    assert same(weights(model), before)
    sides = {member.side for member in probe.handle.members}
    assert sides <= {"scratch", "copy"}, "SubZero's directions are written into weights"
    probe.handle.restore()
    expected = weights(twin)
    for name, w in weights(model).items():
        assert torch.allclose(w, expected[name], atol=2e-6), name


def test_batched_losses_are_the_sequential_ones(rng):
    torch.manual_seed(rng.getrandbits(32))
    model = nn.Sequential(nn.Embedding(11, 24), nn.Linear(24, 11))
    tokens = torch.randint(0, 11, (6,))

    def losses(batch):
        return nn.functional.cross_entropy(model(batch), batch, reduction="none")

    found = []
    for evaluation in ("sequential", "batched"):
        optimizer = SubZero(model, rank=4, seed=3, lr=0.0, directions=2, placement="probe", evaluation=evaluation)
        optimizer.step(losses, tokens)
        found.append(torch.cat((optimizer.info.loss_plus, optimizer.info.loss_minus)))
        optimizer.handle.restore()
    assert torch.allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_a_resumed_run_has_the_bits_of_the_whole(rng, placement):
    torch.manual_seed(rng.getrandbits(32))
    settings = {"rank": 3, "interval": 4, "lr": 1e-3, "momentum": 0.9, "placement": placement, "seed": rng.getrandbits(64)}
    model = Zoo()
    optimizer, loss = SubZero(model, **settings), zoo_loss(model)
    for _ in range(8):
        optimizer.step(loss)
    state = copy.deepcopy(optimizer.state_dict())
    saved = {name: p.clone() for name, p in model.state_dict().items()}
    for _ in range(3):
        optimizer.step(loss)
    model.state_dict()
    other = Zoo()
    other.load_state_dict(saved)
    again, loss = SubZero(other, **settings), zoo_loss(other)
    again.load_state_dict(state)
    for _ in range(3):
        again.step(loss)
    other.state_dict()
    assert same(weights(model), weights(other))


@pytest.mark.parametrize(("numel", "expected"), [(64, (8, 8)), (12, (3, 4)), (13, (1, 13)), (2 * 4096, (64, 128)), (1, (1, 1))])
def test_most_square(numel, expected):
    assert most_square(numel) == expected


def test_tensors_of_adapters_are_seen_as_square():
    model = nn.Module()
    model.lora_A = nn.Linear(64, 4, bias=False)
    model.base = nn.Linear(64, 4, bias=False)
    handle = patch(model, estimator="subspace", rank=3)
    extents = {p.name: p.extent for p in handle.trained}
    assert extents == {"lora_A.weight": (1, 16, 16), "base.weight": (1, 4, 64)}
    direction = handle.materialize("lora_A.weight", 0)
    assert direction.shape == (4, 64)
    assert torch.linalg.matrix_rank(direction.view(16, 16)) == 3
    before = model.lora_A.weight.detach().clone()
    handle.perturb_(0, 0.5)
    assert torch.allclose(model.lora_A.weight, before + 0.5 * direction, atol=1e-6)
    handle.restore()
    assert patch(model, estimator="subspace", rank=3, square=()).trained[0].layout.form == "matrix"


@pytest.mark.parametrize(
    "settings", [{"rank": 8, "interval": 1000, "lr": 1e-2}, {"rank": 24, "interval": 1000, "lr": 1e-2, "eps": 1e-2}]
)
def test_published_settings_learn(settings):
    """PEERS: rank 8, or 24 for prompts, U and V for 1000 steps; the learning rate of this toy is its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
    x, y = torch.randn(64, 20), torch.randint(0, 3, (64,))
    optimizer = SubZero(model, **settings)
    losses = [float(optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))) for _ in range(150)]
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])


@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_the_published_interval_ends_at_step_1000(rng, placement):
    """Rank 8, interval 1000: 1,003 steps, after which directions are those of the bases of the second window."""
    seed, rows, cols, rank = rng.getrandbits(64), 11, 12, 8
    torch.manual_seed(rng.getrandbits(32))
    model = nn.Linear(cols, rows, bias=False)
    target = torch.randn(rows, cols)
    optimizer = SubZero(model, rank=rank, interval=1000, lr=1e-4, eps=1e-2, seed=seed, placement=placement)
    handle, tid = optimizer.handle, noise.tensor_id("weight")
    bases = [[basis(seed, n, rank, rank, tid, window, stream) for n, stream in ((rows, "U"), (cols, "V"))] for window in (0, 1)]
    assert not any(starmap(torch.equal, zip(*bases, strict=True)))
    known = {}
    for step in range(1003):
        optimizer.step(lambda: (model.weight - target).square().mean())
        v = handle._v["weight"][0].double().T
        assert torch.equal(v, bases[step // 1000][1]), step
        if step in (0, 1, 999, 1000, 1001, 1002):
            u, v = bases[step // 1000]
            s = noise.factor(seed, rank, rank, tid, step, stream="S").double()
            known[step] = (u @ s / rank @ v.T).float()
            assert torch.allclose(handle.materialize("weight", step), known[step], atol=1e-5), step
    assert len(known) == 6 and optimizer.steps_done == 1003


def test_what_does_not_fit_is_refused():
    model = nn.Linear(6, 5)
    with pytest.raises(ValueError, match="scaling='published' is about LOZO"):
        SubZero(model, scaling="published")
    plain = patch(model)
    with pytest.raises(ValueError, match="needs a handle with estimator='subspace'"):
        SubZero(plain)
    plain.restore()
    handle = patch(model, estimator="subspace")
    handle.enter_window(0)
    with pytest.raises(NotImplementedError, match="SubZero cannot be captured"):
        handle.perturb_(torch.tensor(0), 1e-3)


def test_config_names_the_estimators():
    assert list(ESTIMATORS) == lozo_kernels.model.config.ESTIMATORS
