"""AGZO: V spans the inputs of layers, is the same in every way of taking steps, and is in journals and saved states."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lozo_kernels import AGZO, LOZO, TensorTable, capture_step, ops, patch
from lozo_kernels.journal import Flushed, Guides, Journal, JournalError, read_journal, replay
from lozo_kernels.journal.format import encode_header
from lozo_kernels.kernels import noise
from lozo_kernels.kernels.calls import Draw
from lozo_kernels.model.estimators.guided import as_factor
from python_tests.fuzz.journal_mutations import assemble, bodies, sample
from python_tests.models import Zoo, losses_of, same, weights, zoo_loss
from python_tests.parallel_helpers import EXAMPLES, Model, batch, finish, logs, start

pytestmark = pytest.mark.filterwarnings("ignore:not guided by inputs")
PLACEMENTS = [{}, {"placement": "probe"}]


def spread(rows, cols, ratio=0.5):
    """Inputs whose singular values fall by a ratio, in random directions."""
    left, right = (torch.linalg.qr(torch.randn(n, cols))[0] for n in (rows, cols))
    return left * ratio ** torch.arange(cols) * rows**0.5 @ right.T


def smallest_cosine(v, inputs):
    """Of the angles between the columns of V, (rank, columns), and the strongest directions of some inputs."""
    right = torch.linalg.svd(inputs.double(), full_matrices=False)[2][: len(v)]
    return float(torch.linalg.svdvals(right @ torch.linalg.qr(v.double().T)[0]).min())


def captured(v, inputs):
    """The share that V, (rank, columns), has of what so many directions can have of the squares of some inputs. The directions
    themselves are no measure of it: random inputs may be about as strong along two of them."""
    inputs = inputs.double()
    most = torch.linalg.svdvals(inputs)[: len(v)].square().sum()
    return float((inputs @ torch.linalg.qr(v.double().T)[0]).square().sum() / most)


@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_v_spans_the_strongest_inputs(rng, options):
    """Of all micro-batches, at the unperturbed weights of a window's begin. V has the length and the grid that kernels need."""
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 5))
    xs = spread(80, 24).split(30)
    optimizer = AGZO(model, lr=1e-2, rank=3, interval=2, **options)
    for step in range(12):
        if step % 2 == 0:
            seen = [copy.deepcopy(model[:2])(x).detach() for x in xs]
        optimizer.step([lambda x=x: model(x).square().mean() for x in xs])
    vs = optimizer.handle.guidance.vs
    assert smallest_cosine(vs["0.weight"], torch.cat(xs)) > 0.999 and captured(vs["2.weight"], torch.cat(seen)) > 0.99
    for v in vs.values():
        assert torch.allclose(v.double() @ v.double().T, v.shape[1] * torch.eye(3).double(), atol=0.02 * v.shape[1])
        assert torch.equal(v * 256, (v * 256).round())


def test_a_tied_head_is_guided_by_the_inputs_of_the_head():
    model = Zoo()
    handle = patch(model, estimator="guided", rank=2, interval=1)
    seen = []
    hook = model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 8)))
    for step in range(40):
        handle.guide(zoo_loss(model), step=step)
    hook.remove()
    assert captured(handle.guidance.vs["embed.weight"], seen[-1]) > 0.99
    assert handle.guidance.vs.keys() == {"embed.weight", "up.weight"}


def gram_schmidt(g):
    columns = []
    for column in g.T:
        for other in (*columns, *columns):  # twice is enough
            column = column - (column @ other) * other
        columns.append(column / column.norm())
    return torch.stack(columns, 1)


def guided(h, v):
    """One power step from V with the inputs H, and the grid."""
    a = gram_schmidt(v)
    product = h.T @ (h @ a)
    made = gram_schmidt(product + 1e-6 * product.norm() * a) * len(v) ** 0.5
    return (made * 256).round() / 256


def direction(v, w, tid, t, i, seed):
    """Direction i of a step: U V^T, or without V dense."""
    if v is None:
        return noise.dense(seed, w.numel(), tid, t, direction=i).double().view(w.shape)
    return noise.factor(seed, len(w), v.shape[1], tid, t, direction=i).double() @ v.T


def simulate(model, x, y, *, steps, rank, interval, eps, lr, seed, parts=1):
    """The method in fp64 as written, for linear layers in a row, with a direction for each of so many parts of the batch. Only the
    noise is shared. Returns the loss of each step."""
    at = {name: w.detach().double() for name, w in model.named_parameters()}
    ids = {name: noise.tensor_id(name) for name in at}

    def loss(p, part):
        return nn.functional.cross_entropy(functional_call(model, p, x.chunk(parts)[part]), y.chunk(parts)[part])

    def inputs(h):
        found = {}
        for i, layer in enumerate(model):
            if isinstance(layer, nn.Linear):
                found[f"{i}.weight"] = h
                h = h @ at[f"{i}.weight"].T + at[f"{i}.bias"]
            else:
                h = layer(h)
        return found

    v, losses = {}, []
    for t in range(steps):
        if t % interval == 0:
            for _ in range(1 if v else 3):
                seen = inputs(x)
                v = v or {n: noise.factor(seed, h.shape[1], rank, ids[n], 0, stream="V").double() for n, h in seen.items()}
                v = {name: guided(h, v[name]) for name, h in seen.items()}
        moved, seen = {name: torch.zeros_like(w) for name, w in at.items()}, 0.0
        for i in range(parts):
            d = {name: direction(v.get(name), w, ids[name], t, i, seed) for name, w in at.items()}
            plus, minus = (loss({name: w + scale * d[name] for name, w in at.items()}, i) for scale in (eps, -eps))
            c = (plus - minus) / (2 * eps) / parts
            seen += float(plus + minus) / 2 / parts
            moved = {name: m + c * d[name] / (rank if name in v else 1) for name, m in moved.items()}
        losses.append(seen)
        at = {name: w - lr * moved[name] for name, w in at.items()}
    return losses


SPLIT = {"placement": "probe", "evaluation": "split", "directions": 4}


@pytest.mark.parametrize(
    "options", [{"backend": "eager"}, {}, {"placement": "probe"}, SPLIT, SPLIT | {"backend": "eager"}], ids=str
)
def test_a_run_is_that_of_a_simulation_in_fp64(rng, options):
    """150 steps, V made four times."""
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4))
    x, y = spread(64, 12, 0.7).double(), torch.randint(0, 4, (64,))
    settings = {"rank": 3, "interval": 40, "eps": 1e-2, "lr": 3e-3, "seed": rng.getrandbits(64)}
    expected = simulate(model, x, y, steps=150, parts=options.get("directions", 1), **settings)
    optimizer = AGZO(model, **settings, **options)

    def losses_of_examples(rows):
        return nn.functional.cross_entropy(model(rows[0]).double(), rows[1], reduction="none")

    losses = [float(optimizer.step(losses_of_examples, (x.float(), y))) for _ in range(150)]
    assert losses[-1] < losses[0]
    for step, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
        assert abs(ours - theirs) <= 1e-5 * theirs, f"step {step}: {ours} against {theirs}"


@pytest.mark.parametrize(("cols", "rank"), [(4099, 2), (700, 64), (20_000, 3)])
def test_the_product_with_v_is_exact_where_inputs_are_strong_in_few_elements(rng, any_backend, cols, rank):
    """Such a V reaches sqrt(columns), far above the noise: the same bits on every backend, and those of an exact product."""
    a = torch.randn(cols, rank).double()
    a[7], a[cols - 1, 0] = 1e3 * torch.randn(rank), 3e3
    v = as_factor(torch.linalg.qr(a)[0]).unsqueeze(0)
    assert 8 < v.abs().max() < 128
    x = torch.randn(1, 3, cols)
    expected = x.clone()
    table = TensorTable([x], [5], v=[v])
    ops.lowrank_update_(table, seed=3, draws=[Draw(2)], scales=torch.full((1, 1), 0.5), backend=any_backend)
    u = noise.factor(3, 3, rank, 5, 2).double()
    product = u @ v[0].double()
    assert torch.equal(product.float().double(), product)
    assert torch.equal(x[0], expected[0] + 0.5 * product.float())


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_sums_of_products_with_v_have_24_bits(rank):
    """Whatever U is: it is below 4.9, in steps of 2**-8."""
    v = as_factor(torch.linalg.qr(torch.randn(700, rank).double())[0]).double()
    grid = max(2.0**-k for k in range(9) if torch.equal(v * 2.0**k, (v * 2.0**k).round()))
    assert v.abs().max() < 2048 * grid and v.abs().sum(0).max() * 4.9 * 256 < 1.01 * 2**24 * grid
    assert grid == 2.0**-8 or rank == 64


def test_inputs_of_low_rank_leave_the_rest_of_v_as_it_was():
    """Fewer tokens than the rank, none at all, or zeros; and a rank above the number of inputs."""
    model = nn.Sequential(nn.Linear(9, 2, bias=False), nn.Linear(2, 2, bias=False))
    handle = patch(model, estimator="guided", rank=4, interval=1)
    row = torch.zeros(1, 9)
    row[0, 3] = 2.0
    handle.guide(lambda: model(row).sum(), step=0)
    first, second = (handle.guidance.vs[name].double() for name in ("0.weight", "1.weight"))
    assert torch.allclose(first @ first.T, 9 * torch.eye(4).double(), atol=0.1) and smallest_cosine(first[:1], row) > 0.99
    assert torch.allclose(second[:2] @ second[:2].T, 2 * torch.eye(2).double(), atol=0.1) and not second[2:].any()
    handle.guide(lambda: model(0 * row).sum(), step=1)
    assert torch.allclose(handle.guidance.vs["0.weight"].double(), first, atol=0.02)


def tokens(step):
    return torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(step))


def ran(model, first=0, steps=9, optimizer=None, **options):
    """The weights after steps whose batches differ."""
    optimizer = optimizer or AGZO(model, **{"lr": 1e-3, "eps": 1e-2, "interval": 3, "seed": 5, **options})
    for step in range(first, steps):
        optimizer.step(losses_of(model), tokens(step))
    optimizer.flush()
    optimizer.handle.merge()
    return weights(model)


WAYS = [
    {"fuse_steps": True, "directions": 2},
    {"momentum": 0.9, "two_sided": False},
    {"placement": "probe", "momentum": 0.9},
    {"placement": "probe", "evaluation": "batched", "directions": 2},
    {"placement": "probe", "evaluation": "split", "directions": 4, "normalise": "spread"},
    {"lr": "auto", "placement": "probe"},
    {"lr": "auto", "placement": "probe", "evaluation": "split", "directions": 2},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("at", [3, 4])
def test_runs_go_on_from_states_and_replay(tmp_path, options, at):
    """From the middle of a window, and from its begin after a step that failed when V was there already."""
    base = Zoo()
    model, path = copy.deepcopy(base), tmp_path / "run"
    optimizer = AGZO(model, **{"lr": 1e-3, "eps": 1e-2, "interval": 3, "seed": 5, **options})
    with Journal.create(path, optimizer):
        ran(model, steps=at, optimizer=optimizer)
        if at == 3 and "momentum" in options:  # V of the window is there, and momentum is still in the V before
            optimizer.handle.guide(lambda: losses_of(model)(tokens(3)).mean(), step=3)
        elif at == 3:
            with pytest.raises(ZeroDivisionError):
                fails(optimizer, model)
        state, there = copy.deepcopy(optimizer.state_dict()), weights(model)
        whole = ran(model, first=at, optimizer=optimizer)
    assert [r.window for r in read_journal(path).records if isinstance(r, Guides)] == [0, 1, 2]
    other, again = copy.deepcopy(base), copy.deepcopy(base)
    other.load_state_dict(there, strict=False)
    second = AGZO(other, **{"lr": 1e-3, "eps": 1e-2, "interval": 3, "seed": 5, **options})
    second.load_state_dict(state)
    assert same(ran(other, first=at, optimizer=second), whole)
    assert replay(again, path).agrees is True and same(weights(again), whole)


def fails(optimizer, model):
    """A step whose first evaluation raises, after V was made."""

    def closure(rows):
        if optimizer.handle.guidance.window == optimizer.steps_done // 3:
            raise ZeroDivisionError
        return losses_of(model)(rows)

    optimizer.step(closure, tokens(optimizer.steps_done))


def test_a_state_goes_into_a_handle_that_went_elsewhere():
    """With a V of the same window that is another one, and what was learned since."""
    base = Zoo()
    first, second = (AGZO(m, lr=1e-3, interval=3, placement="probe") for m in (copy.deepcopy(base), copy.deepcopy(base)))
    ran(first.handle.model, steps=4, optimizer=first)
    state, there = copy.deepcopy(first.state_dict()), weights(first.handle.model)
    ran(second.handle.model, first=4, steps=9, optimizer=second)
    second.handle.model.load_state_dict(there, strict=False)
    second.load_state_dict(state)
    again = second.state_dict()
    assert again["window"] == state["window"] and same(again["guides"]["vs"], state["guides"]["vs"])
    assert same(ran(second.handle.model, 4, 9, second), ran(first.handle.model, 4, 9, first))
    before = second.handle.guidance.vs
    for change, message in (
        (lambda g: g["vs"].update(x=torch.zeros(2, 5).half()), "the V of 'x'"),
        (lambda g: g["vs"]["up.weight"].fill_(float("nan")), "a value that no V has"),
        (lambda g: g.update(window=2), "the state's guides is the V of window 1"),
        (lambda g: g.pop("window"), "the state's guides"),
    ):
        bad = copy.deepcopy(state)
        change(bad["guides"])
        with pytest.raises(ValueError, match=message):
            second.load_state_dict(bad)
    assert same(before, second.handle.guidance.vs) and second.steps_done == 9


@pytest.mark.parametrize("options", [{}, {"fuse_steps": True}, {"placement": "probe", "momentum": 0.9}], ids=str)
def test_captured_steps_have_the_bits_of_plain_ones(options):
    base, held = Zoo(), tokens(0)
    plain, captured = copy.deepcopy(base), copy.deepcopy(base)
    optimizer = AGZO(captured, lr=1e-3, eps=1e-2, interval=3, seed=5, **options)
    step = capture_step(optimizer, lambda: losses_of(captured)(held).mean())
    for i in range(9):
        held.copy_(tokens(i))
        step()
    optimizer.flush()
    optimizer.handle.merge()
    other = AGZO(plain, lr=1e-3, eps=1e-2, interval=3, seed=5, **options)
    for i in range(9):
        other.step(lambda i=i: losses_of(plain)(tokens(i)).mean())
    other.flush()
    other.handle.merge()
    assert same(weights(plain), weights(captured))


@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_backward_takes_the_steps_of_closures(options):
    class Scored(Zoo):
        def forward(self, rows):
            return losses_of(super().forward)(rows).mean()

    driven = Scored()
    plain = copy.deepcopy(driven)
    made = {"lr": 1e-3, "eps": 1e-2, "interval": 3, "seed": 5, **options}
    one, two = AGZO(driven, drive="backward", **made), AGZO(plain, **made)
    for i in range(7):
        driven.train()(tokens(i)).backward()
        one.step()
        two.step(lambda i=i: plain(tokens(i)))
    for optimizer in (one, two):
        optimizer.handle.restore()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(driven).values(), weights(plain).values(), strict=True))


class Stateful(nn.Module):
    """Dropout, and statistics that a forward pass changes."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.drop, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.up(x))))


@pytest.mark.parametrize("randomness", [True, False])
def test_forwards_that_make_v_leave_buffers_and_random_numbers_alone(rng, randomness):
    x, seed = torch.randn(16, 6), rng.getrandbits(32)
    base = Stateful().train()
    after = []
    for kind in (AGZO, LOZO):
        model = copy.deepcopy(base)
        optimizer = kind(model, lr=0.0, interval=2, common_random_numbers=randomness)
        torch.manual_seed(seed)
        for _ in range(3):
            optimizer.step(lambda model=model: model(x).square().mean())
        after.append((int(model.norm.num_batches_tracked), bytes(torch.get_rng_state().tolist())))
    assert after[0] == after[1]


def work(rank, ranks, folder):
    """One process of a run."""
    warnings.filterwarnings("ignore", "not guided by inputs")
    found = {}
    for mode, placement in (("examples", "probe"), ("examples", "inplace"), ("directions", "inplace")):
        model = Model()
        optimizer = AGZO(model, lr=1e-2, eps=1e-2, interval=3, rank=2, seed=9, parallel=mode, directions=2, placement=placement)
        for step in range(7):
            rows = batch(step).chunk(ranks)[rank] if mode == "examples" else batch(step)
            optimizer.step(model, rows)
        optimizer.handle.merge()
        found[mode, placement] = weights(model), optimizer.handle.guidance.vs
    torch.save(found, folder / f"{rank}.pt")


def test_two_processes_have_the_same_bits(tmp_path):
    """And those of one up to rounding, whose V is made from the inputs of all."""
    assert finish(start(2, tmp_path, work)) == [0, 0], logs(tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for mode, (found, vs) in first.items():
        assert same(found, second[mode][0]) and same(vs, second[mode][1])
        model = Model()
        optimizer = AGZO(model, lr=1e-2, eps=1e-2, interval=3, rank=2, seed=9, directions=2, placement=mode[1])
        for step in range(7):
            optimizer.step(model, batch(step))
        optimizer.handle.merge()
        assert all(torch.allclose(v, optimizer.handle.guidance.vs[name], atol=0.02) for name, v in vs.items())
        assert all(torch.allclose(p, found[name], atol=1e-3) for name, p in weights(model).items())
    assert EXAMPLES % 2  # the processes have different numbers of them


class Conv1D(nn.Module):
    """As transformers has it."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.up, self.conv = nn.Embedding(11, 6), Conv1D(5, 6), nn.Linear(5, 4), nn.Conv1d(4, 3, 1)
        self.spare = nn.Linear(5, 4)
        self.spare_runs = False

    def forward(self, rows):
        h = self.mix(self.embed(rows))
        h = self.up(input=h) + (self.spare(h) if self.spare_runs else 0.0)
        return self.conv(h.transpose(1, 2)).square().mean()


@pytest.mark.filterwarnings("default:not guided by inputs")
@pytest.mark.parametrize("options", PLACEMENTS, ids=str)
def test_what_is_not_guided_is_named_once_with_the_reason(options):
    model = Mixed()
    optimizer = AGZO(model, lr=1e-3, interval=1, seed=7, **options)
    with pytest.warns(UserWarning, match="not guided by inputs") as caught:
        optimizer.step(lambda: model(tokens(0)))
    (message,) = [str(w.message) for w in caught if "not guided" in str(w.message)]
    reasons = {
        "embed.weight": "an embedding looks rows up",
        "mix.weight": "Conv1D has its inputs in the rows",
        "conv.weight": "it is not the weight of a linear layer",
        "spare.weight": "no finite inputs reached its layer",
    }
    notes = {row.name: row.note for row in optimizer.handle.report().parameters}
    assert all(f"{name} ({why}" in message and why in notes[name] for name, why in reasons.items())
    assert "V of LOZO" not in notes["up.weight"] and "spare.weight" in str(optimizer.handle.report()).splitlines()[-1]
    square = patch(Mixed(), estimator="guided", square="spare.*").guidance
    assert "seen as another matrix" in square.reasons["spare.weight"]
    lozo = patch(copy.deepcopy(Mixed()), rank=2, interval=1, seed=7)
    optimizer.handle.enter_window(0)
    for name in reasons:
        assert torch.equal(optimizer.handle.materialize(name, 0), lozo.materialize(name, 0))
    assert not torch.equal(optimizer.handle.materialize("up.weight", 0), lozo.materialize("up.weight", 0))
    model.spare_runs = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: model(tokens(0)))
    assert "spare.weight" in optimizer.handle.guidance.vs and "spare.weight" not in optimizer.handle.guidance.reasons
    model.spare_runs = False
    before = optimizer.handle.guidance.vs["spare.weight"]
    optimizer.step(lambda: model(tokens(0)))
    assert torch.equal(before, optimizer.handle.guidance.vs["spare.weight"])  # a layer that ran once keeps its last V


def test_inputs_that_are_not_finite_make_no_v():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = AGZO(model, interval=1)
    x = torch.randn(5, 4)
    optimizer.step(lambda: model(x).sum())
    before = optimizer.handle.guidance.vs
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(lambda: model(x * float("nan")).sum())
    assert same(before, optimizer.handle.guidance.vs)


class Elsewhere(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


def test_what_cannot_be_guided_is_refused_before_a_weight_moves(tmp_path):
    with pytest.raises(ValueError, match=r"no trained parameter is the weight of one .*0.weight \(an embedding.*use LOZO"):
        AGZO(nn.Sequential(nn.Embedding(4, 3), Elsewhere(3, 2, bias=False)))
    with pytest.raises(ValueError, match="keep_factors needs the V of every window"):
        AGZO(Zoo(), placement="probe", keep_factors=True)
    for options in PLACEMENTS:
        model, other = Zoo(), Zoo()
        before = weights(model)
        optimizer = AGZO(model, **options)
        with pytest.raises(ValueError, match=r"none of the 2 linear layers that are trained .* was given finite inputs"):
            optimizer.step(zoo_loss(other))
        assert same(weights(model), before) and optimizer.steps_done == 0
        with pytest.raises(RuntimeError, match=r"V of window 0 is made from inputs.*call guide\(closure, step=...\)"):
            optimizer.handle.enter_window(0)
        optimizer.step(zoo_loss(model))
        with pytest.raises(RuntimeError, match="this handle has that of window 0"):
            optimizer.handle.materialize("up.weight", 50)


def test_a_v_that_cannot_be_recorded_is_not_used(tmp_path, monkeypatch):
    model = Zoo()
    base, optimizer = copy.deepcopy(model), AGZO(model, lr=1e-3, interval=2)
    journal = Journal.create(tmp_path / "run", optimizer)
    ran(model, 0, 2, optimizer)
    monkeypatch.setattr(journal, "_drain", lambda **_: (_ for _ in ()).throw(JournalError("the disk is full")))
    with pytest.raises(JournalError, match="full"):
        ran(model, 2, 3, optimizer)
    monkeypatch.undo()
    assert optimizer.handle.guidance.window == 0 and optimizer.steps_done == 2
    after = ran(model, 2, 5, optimizer)
    journal.finish()
    assert replay(base, tmp_path / "run").agrees is True and same(weights(base), after)


def test_an_update_that_is_pending_is_made_before_v(tmp_path):
    """In the pass of its own that it has in any case: nothing is flushed for it, and V is not that of perturbed weights."""
    base, vs = Zoo(), []
    for flushes in (False, True):
        model = copy.deepcopy(base)
        optimizer = AGZO(model, lr=1e-3, eps=0.3, interval=3, fuse_steps=True)
        with Journal.create(tmp_path / str(flushes), optimizer):
            for step in range(7):
                if flushes and step % 3 == 0:
                    optimizer.flush()
                optimizer.step(losses_of(model), tokens(step))
        vs.append(optimizer.handle.guidance.vs)
    assert same(*vs)
    assert not any(isinstance(r, Flushed) for r in read_journal(tmp_path / "False").records)


def test_a_journal_begun_in_the_middle_of_a_window_has_its_v(tmp_path):
    model = Zoo()
    optimizer = AGZO(model, lr=1e-3, interval=4)
    ran(model, 0, 2, optimizer)
    with Journal.create(tmp_path / "run", optimizer):
        ran(model, 2, 6, optimizer)
        with pytest.raises(JournalError, match="V of window 5 is asked for, and the next step that is recorded is in window 1"):
            optimizer.handle.guide(zoo_loss(model), step=20)
    assert [r.window for r in read_journal(tmp_path / "run").records if isinstance(r, Guides)] == [0, 1]


def test_records_of_v_are_checked(rng):
    header, records = sample(rng, 5, estimator="guided")
    first = next(r for r in records if isinstance(r, Guides))
    rest = [r for r in records if not isinstance(r, Guides)]
    wrong = [
        ([], "no V of its window, 0"),
        ([first, first], "no V of inputs here"),
        ([first._replace(window=3)], "the V of window 3, and the next step is in window 0"),
        ([first._replace(vs=((99, b""),))], "of no matrix of the run"),
        ([first._replace(vs=first.vs[::-1])], "of no matrix of the run"),
        ([first._replace(vs=((0, first.vs[0][1][:-2]),))], "is cut off"),
    ]
    for some, message in wrong:
        with pytest.raises(JournalError, match=rf"record \d+ .* is damaged: .*{message}"):
            read_journal(assemble(encode_header(header), bodies([records[0], *some, *rest[1:]])))
    header, records = sample(rng, 5, estimator="lowrank")
    with pytest.raises(JournalError, match="no V of inputs here"):
        read_journal(assemble(encode_header(header), bodies([records[0], first])))


def test_layers_with_nested_and_keyword_inputs_and_autocast():
    """The products are in fp32 whatever the forward pass computes in."""
    parts, found = spread(16, 6).half().split((7, 9)), []
    for low in (False, True):
        model = nn.Linear(6, 4).half()
        handle = patch(model, estimator="guided", rank=2)

        def loss(model=model, low=low):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                rest = model(torch.nested.nested_tensor([parts[1]])).to_padded_tensor(0.0)
                return model(input=parts[0]).float().sum() + rest.float().sum()

        for step in range(0, 400, 50):
            handle.guide(loss, step=step)
        found.append(handle.guidance.vs)
    assert same(*found) and smallest_cosine(found[0]["weight"], torch.cat(parts)) > 0.9999


def llama(vocabulary=17):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocabulary, **sizes)).eval()


def test_offloaded_weights_have_the_v_and_the_bits_of_resident_ones():
    accelerate = pytest.importorskip("accelerate")
    plain, away = llama(), llama()
    accelerate.cpu_offload(away, execution_device="cpu")
    rows, found = tokens(0), []
    for model in (plain, away):
        optimizer = AGZO(model, lr=1e-3, interval=2, placement="probe", side="scratch")
        for _ in range(5):
            optimizer.step(lambda model=model: model(input_ids=rows, labels=rows).loss)
        found.append((optimizer.handle.guidance.vs, optimizer.handle.factors))
        assert len(found[-1][0]) == 8  # seven projections and the head, but not the embedding
    assert same(found[0][0], found[1][0]) and same(found[0][1], found[1][1])


def test_quantised_layers_are_guided():
    quantization = pytest.importorskip("torchao.quantization")
    model, rows = llama(), tokens(0)
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    optimizer = AGZO(model, lr=1e-3, interval=2, placement="probe")
    for _ in range(5):
        optimizer.step(lambda: model(input_ids=rows, labels=rows).loss)
    vs, past = optimizer.handle.guidance.vs, optimizer.handle.past
    assert len(vs) == 8 and len(past) == 7 and all(p["v"].shape[0] == 4 for p in past.values())  # two windows of rank 2
    name = "model.layers.0.mlp.down_proj.weight"
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    optimizer.step(lambda: model(input_ids=rows, labels=rows).loss)
    assert torch.equal(optimizer.handle.past[name]["v"][:4], past[name]["v"])
    optimizer.handle.restore(discard=True)
