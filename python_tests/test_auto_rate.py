"""lr="auto": a rate from forward passes alone, the same bits after kill and resume."""

import copy
import json

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, SubZero, capture_step, handle_of, patch
from lozo_kernels.hf.finetune import finetune
from lozo_kernels.hf.settings import Settings
from lozo_kernels.journal import Journal, read_journal, replay
from lozo_kernels.optim.rate_finder import WARM_UP, Measured, RateFinder, measure

OPTIONS = [
    {},
    {"fuse_steps": True},
    {"momentum": 0.9},
    {"two_sided": False},
    {"two_sided": False, "fuse_steps": True, "directions": 3, "rounding": "stochastic"},
    {"placement": "probe"},
    {"placement": "probe", "two_sided": False, "directions": 3},
    {"placement": "probe", "evaluation": "batched", "directions": 2},
    {"placement": "probe", "evaluation": "split", "directions": 4},
]


class Quadratic:
    """Least squares, whose curvature is known: a batch has noise of its own."""

    def __init__(self, noise=0.1):
        self.model = nn.Linear(12, 5, bias=False)
        self.truth, self.noise = torch.randn(5, 12), noise

    def batch(self, examples=16):
        x = torch.randn(examples, 12)
        return x, x @ self.truth.T + self.noise * torch.randn(examples, 5)

    def losses(self, batch):
        return (self.model(batch[0]) - batch[1]).square().sum(1) / 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [LOZO, MeZO])
def test_a_run_learns_without_a_rate(kind, options):
    problem = Quadratic()
    optimizer = kind(problem.model, lr="auto", eps=1e-3, **options)
    before = float(problem.losses(problem.batch(512)).mean())
    for step in range(250):
        optimizer.step(problem.losses, problem.batch())
        assert (optimizer.learning_rates[0] == 0) == (step + 1 < WARM_UP)
    optimizer.flush()
    assert float(problem.losses(problem.batch(512)).mean()) < 0.9 * before


def test_steps_that_measure_at_the_start_move_nothing():
    problem = Quadratic()
    optimizer = LOZO(problem.model, lr="auto", placement="probe", weight_decay=0.1)
    before = problem.model.weight.clone()
    for _ in range(WARM_UP):
        optimizer.step(problem.losses, problem.batch())
    optimizer.handle.merge()
    assert torch.equal(problem.model.weight, before)


def test_the_rate_is_that_of_the_formula():
    """On a loss whose c and h are the same everywhere, and whose noise is known."""
    finder, again = RateFinder(0.5, 1), RateFinder(0.5, 1)
    for _ in range(WARM_UP):
        finder.add([Measured(loss=1e6, square=4.0, product=2.0, curvature=8.0)])
        again.add([Measured(loss=1e-3, square=4.0, product=2.0, curvature=8.0)])
    assert finder.rate == pytest.approx(0.2 * (2.0 / 4.0) / 8.0 / 0.5)
    assert again.rate == pytest.approx(0.01 * 1e-3 / 2.0 / 0.5)  # a step may not take more than that off the loss
    finder.add([Measured(float("nan"), 1.0, 1.0, 1.0)])
    assert finder.rate == pytest.approx(0.2 * 0.5 / 8.0 / 0.5)


def test_curvature_that_is_noise_bounds_the_rate():
    finder = RateFinder(1.0, 1)
    for i in range(WARM_UP):
        finder.add([Measured(1.0, 1.0, 1.0, 100.0 * (-1) ** i)])
    assert 0 < finder.rate <= 0.01


def test_a_measurement_is_that_of_a_parabola():
    eps, slopes, bends = 1e-2, torch.tensor([1.0, 3.0], dtype=torch.float64), torch.tensor([2.0, 6.0], dtype=torch.float64)
    rest = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plus, minus = (rest + s * eps * slopes + eps**2 * bends / 2 for s in (1, -1))
    found = measure(rest, plus, minus, eps=eps)
    assert found == pytest.approx((1.5, 4.0, 3.0, 4.0), rel=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_goes_on_from_its_state_and_from_its_journal(options, tmp_path):
    first = Quadratic()
    base = first.model.weight.detach().clone()
    # Few bits, so that products are exact in every order: a matrix product may sum otherwise at another address.
    batches = [(x.half().float(), y) for x, y in (first.batch() for _ in range(40))]

    def make():
        model = nn.Linear(12, 5, bias=False)
        with torch.no_grad():
            model.weight.copy_(base)
        return model, LOZO(model, lr="auto", eps=1e-3, interval=15, **options)

    def losses(model):
        return lambda batch: (model(batch[0]).double() - batch[1]).square().sum(1) / 2

    def take(model, optimizer, some):
        for batch in some:
            optimizer.step(losses(model), batch)

    model, optimizer = make()
    with Journal.create(tmp_path / "run.journal", optimizer):
        take(model, optimizer, batches[:20])
        state = copy.deepcopy(optimizer.state_dict())
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        take(model, optimizer, batches[20:])
    expected = model.state_dict()["weight"].clone()
    again, other = make()
    again.load_state_dict(weights)
    other.load_state_dict(state)
    take(again, other, batches[20:])
    assert other.learning_rates == optimizer.learning_rates
    assert torch.equal(again.state_dict()["weight"], expected)
    run = read_journal(tmp_path / "run.journal")
    replayed, _ = make()
    _.handle.restore()
    assert replay(replayed, run).agrees
    assert torch.equal(replayed.weight, expected)
    for cut in (5, 20, 33):  # killed after so many steps
        part = tmp_path / f"{cut}.journal"
        part.write_bytes((tmp_path / "run.journal").read_bytes()[: run.ends[len(run.until(cut)) - 1][0]])
        model, optimizer = make()
        Journal.resume(part, optimizer)
        assert optimizer.steps_done == cut
        take(model, optimizer, batches[cut:20])
        if cut <= 20:
            optimizer.state_dict()
        take(model, optimizer, batches[max(cut, 20) :])
        optimizer.journal.finish()
        assert torch.equal(model.state_dict()["weight"], expected)


@pytest.mark.parametrize("fuse_steps", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
def test_a_measuring_step_that_fails_is_replayed(tmp_path, two_sided, fuse_steps):
    """Evaluations that were made before the closure failed rounded the weights, at F(-) too where a step measures."""
    problem = Quadratic()
    model, base = problem.model.to(torch.bfloat16), copy.deepcopy(problem.model)
    options = {"two_sided": two_sided, "fuse_steps": fuse_steps, "directions": 2}
    optimizer = LOZO(model, lr="auto", eps=1e-2, interval=5, **options)
    failing = iter([3, 5, 7, 4, 6, 9, 100])
    with Journal.create(tmp_path / "run.journal", optimizer):
        for step in range(20):
            calls, last = [], next(failing) if step % 3 == 0 and step < 16 else 100

            def losses(batch, calls=calls, last=last):
                calls.append(1)
                if len(calls) == last:
                    raise InterruptedError
                return (model(batch[0].bfloat16()).float() - batch[1]).square().sum(1)

            batch = problem.batch()
            try:
                optimizer.step(losses, batch)
            except InterruptedError:
                calls[:] = [1] * 200
                optimizer.step(losses, batch)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    again = copy.deepcopy(base)
    assert replay(again, tmp_path / "run.journal").agrees
    assert all(torch.equal(p, weights[name]) for name, p in again.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "fast"}, "'auto'"),
        ({"lr": "auto", "drive": "backward"}, "drive"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(options, message):
    model = nn.Linear(3, 2)
    with pytest.raises((TypeError, ValueError), match=message):
        LOZO(model, **options)
    patch(model).restore()  # the model is untouched


def test_a_batch_without_parts_is_refused():
    problem = Quadratic()
    optimizer = LOZO(problem.model, lr="auto")
    batch, before = problem.batch(), problem.model.weight.clone()
    with pytest.raises(TypeError, match=r"step\(closure, inputs\)"):
        optimizer.step(lambda: problem.losses(batch).mean())
    with pytest.raises(ValueError, match="two examples"):
        optimizer.step(problem.losses, problem.batch(1))
    assert torch.equal(problem.model.weight, before)
    optimizer.step([lambda: problem.losses(problem.batch(4)).mean()] * 2)
    with pytest.raises(ValueError, match="captured step"):
        capture_step(optimizer, lambda: problem.losses(batch).mean())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_a_step_needs_is_known_before_it(options):
    """The closures in which a batch has to come, and whether they have to tell examples apart."""
    problem = Quadratic()
    optimizer = LOZO(problem.model, lr="auto", seed=4, **options)
    needed = []
    for step in range(2 * WARM_UP):
        needed.append(optimizer.parts_next)
        assert (optimizer.parts_next == 2) == optimizer.measures_next == optimizer.stepper.finder.due(step)
        batch = problem.batch()
        if optimizer.by_example:
            optimizer.step(problem.losses, batch)
        else:
            halves = [tuple(x.chunk(optimizer.parts_next)[i] for x in batch) for i in range(optimizer.parts_next)]
            optimizer.step([lambda half=half: problem.losses(half).mean() for half in halves])
    assert {*needed} == {1, 2} and optimizer.by_example == (options.get("evaluation") in ("batched", "split"))
    assert LOZO(nn.Linear(3, 2)).parts_next == 1


@pytest.mark.parametrize("options", [{}, {"fuse_steps": True}, {"placement": "probe"}], ids=str)
def test_close_ends_the_run(options, tmp_path):
    problem = Quadratic()
    start = copy.deepcopy(problem.model)
    optimizer = LOZO(problem.model, lr=1e-2, seed=4, **options)
    Journal.create(tmp_path / "journal", optimizer)
    for _ in range(3):
        batch = problem.batch()
        optimizer.step(lambda batch=batch: problem.losses(batch).mean())
    optimizer.close()
    run = read_journal(tmp_path / "journal")
    assert handle_of(problem.model) is None and run.fingerprint is not None and run.steps == 3
    assert replay(start, run).agrees and torch.equal(start.weight, problem.model.weight)
    plain = LOZO(problem.model)
    plain.close()
    assert handle_of(problem.model) is None


def test_a_state_of_another_kind_of_rate_is_refused():
    one, two = LOZO(nn.Linear(3, 2), lr="auto"), LOZO(nn.Linear(3, 2), lr=1e-3)
    for a, b in ((one, two), (two, one)):
        with pytest.raises(ValueError, match="learning rate"):
            a.load_state_dict(b.state_dict())
    with pytest.raises(ValueError, match="no state of lr='auto'"):
        one.load_state_dict(one.state_dict() | {"rate": {"steps": 1}})


@pytest.mark.parametrize("kind", [LOZO, MeZO, SubZero])
def test_a_loss_that_never_varies_moves_nothing(kind):
    model = nn.Linear(4, 4)
    before = model.weight.clone()
    optimizer = kind(model, lr="auto")
    with pytest.warns(UserWarning):
        for _ in range(30):
            optimizer.step(lambda batch: batch[:, 0] * 0.0, torch.ones(4, 4))
    assert torch.allclose(model.weight, before, atol=1e-6) and optimizer.learning_rates == [0.0]


def test_metrics_hold_the_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(Settings, "_resolved_lr", lambda *_: None)
    summary = finetune(Settings(steps=20, eval_size=8, compare_steps=0, output=str(tmp_path)), quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["kind"] == "step"]
    assert not any(rates[:WARM_UP]) and all(rates[WARM_UP:]) and summary["settings"]["lr"] is None
