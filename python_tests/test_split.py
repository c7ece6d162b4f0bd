"""``evaluation="split"``: each direction on a part of the batch of its own, in two forward passes."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from lozo_kernels import AGZO, LOZO, BatchSplitError, MeZO, SubZero, ZOMuon, cli
from lozo_kernels.errors import InputError
from lozo_kernels.hf.finetune import finetune
from lozo_kernels.hf.settings import Settings
from lozo_kernels.journal import Journal, JournalError, read_journal
from python_tests.models import Zoo, losses_of, same, weights
from python_tests.parallel_helpers import Batched, finish, logs, start
from python_tests.parts import check_the_mean_estimate, check_the_mean_loss

pytestmark = pytest.mark.filterwarnings("ignore:not guided by inputs")
SPLIT = {"placement": "probe", "evaluation": "split"}


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def tokens(count, step=None):
    return torch.randint(0, 11, (count, 9), generator=None if step is None else torch.Generator().manual_seed(step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["activation", "scratch", "copy"])
@pytest.mark.parametrize("kind", [LOZO, MeZO, SubZero, AGZO, ZOMuon])
def test_each_part_is_evaluated_along_its_own_direction(rng, kind, side, dtype):
    """Against the weights changed by hand, on every kind of layer, also where something was learned in the window before."""
    if kind is ZOMuon and dtype == torch.bfloat16:
        pytest.skip("the same path")
    torch.manual_seed(rng.getrandbits(32))
    model, parts, eps = Zoo().to(dtype).eval(), 3, 0.02
    shape = {} if kind is MeZO else {"rank": 2, "interval": 5}
    more = {"two_sided": True} if kind is ZOMuon else {}
    optimizer = kind(model, lr=1e-3, eps=eps, directions=parts, side=side, seed=rng.getrandbits(64), **SPLIT, **shape, **more)
    for _ in range(3):
        optimizer.step(losses_of(model), tokens(6))
    rows, handle = tokens(6), optimizer.handle
    learned = {name: p.clone() for name, p in model.state_dict().items()}  # which merges
    optimizer.step(losses_of(model), rows)
    by_hand = Zoo().to(dtype).eval()
    for side_of, found in ((eps, optimizer.info.loss_plus), (-eps, optimizer.info.loss_minus)):
        for i in range(parts):
            by_hand.load_state_dict(learned)
            with torch.no_grad():
                for name, p in trained(by_hand):
                    p.copy_(p.float() + side_of * handle.materialize(name, 3, direction=i))
                expected = losses_of(by_hand)(rows[2 * i : 2 * i + 2]).mean()
            close = {"rel": 1e-5} if dtype == torch.float32 else {"rel": 2e-2}
            assert float(found[i]) == pytest.approx(float(expected), **close)


def test_two_forward_passes_whatever_the_number_of_directions():
    model = Zoo().eval()
    calls, losses = [], losses_of(model)

    def counting(rows):
        calls.append(len(rows))
        return losses(rows)

    for directions in (2, 12):
        optimizer = LOZO(model, rank=2, directions=directions, **SPLIT)
        optimizer.step(counting, tokens(12))
        calls.clear()
        optimizer.step(counting, tokens(12))
        assert calls == [12, 12] and optimizer.info.c.shape == (directions,)
        optimizer.handle.restore()


def test_the_mean_of_the_parts_is_the_loss_of_the_batch():
    model = Zoo().eval()
    check_the_mean_loss(model, LOZO(model, directions=2, lr=0.0, eps=1e-7, **SPLIT), tokens, places=8)


def test_the_mean_of_estimates_is_the_gradient(rng):
    check_the_mean_estimate(LOZO, rng, **SPLIT)


def test_a_rate_that_finds_itself_costs_one_forward_pass_where_it_measures():
    """F(0), of both halves of each part, which give c a product without the noise of either."""
    model = nn.Linear(6, 3, bias=False)
    x, y = torch.randn(12, 6), torch.randn(12, 3)
    calls = []

    def losses(batch):
        calls.append(len(batch[0]))
        return (model(batch[0]).double() - batch[1]).square().sum(1)

    optimizer = LOZO(model, lr="auto", rank=2, eps=1e-3, directions=3, **SPLIT)
    optimizer.step(losses, (x, y))
    calls.clear()
    optimizer.step(losses, (x, y))
    assert calls == [12] * 3
    calls.clear()
    for _ in range(7):
        optimizer.step(losses, (x, y))
    assert sum(calls) == 12 * (6 * 3 + 2) and optimizer.learning_rates[0] > 0
    recent = optimizer.stepper.finder.state()["recent"]
    direction = optimizer.handle.materialize("weight", 7, direction=1).double()
    halves = []
    for rows in (slice(4, 6), slice(6, 8)):  # weights did not move before the eighth measurement
        residual = x[rows].double() @ model.weight.detach().double().T - y[rows].double()
        halves.append(float(2 * (residual * (x[rows].double() @ direction.T)).sum(1).mean()))
    _, square, product, bend = recent[7 * 3 + 1]
    assert square == pytest.approx((sum(halves) / 2) ** 2, rel=1e-3) and product == pytest.approx(halves[0] * halves[1], rel=1e-3)
    assert bend == pytest.approx(float(2 * (x[4:8].double() @ direction.T).square().sum(1).mean()), rel=1e-2)
    with pytest.raises(ValueError, match="lr='auto' needs both halves of the 3 parts of a batch, of which one has 9 examples"):
        optimizer.step(losses, (x[:9], y[:9]))


def split_work(rank, ranks, folder):
    found = {}
    for lr in (1e-2, "auto"):
        model = Batched()
        optimizer = LOZO(model, lr=lr, eps=1e-2, interval=3, rank=2, seed=9, directions=2, parallel="examples", **SPLIT)
        for step in range(10):
            optimizer.step(model, tokens(8, step)[4 * rank : 4 * rank + 4])
        optimizer.handle.merge()
        found[lr] = weights(model), optimizer.learning_rates
    torch.save(found, folder / f"{rank}.pt")


def test_two_processes_have_the_same_bits(tmp_path):
    """And those of one up to rounding, whose parts have the examples of both."""
    assert finish(start(2, tmp_path, split_work)) == [0, 0], logs(tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for lr, (found, rates) in first.items():
        assert same(found, second[lr][0]) and rates == second[lr][1] and rates[0] > 0
    model = Batched()
    optimizer = LOZO(model, lr=1e-2, eps=1e-2, interval=3, rank=2, seed=9, directions=2, **SPLIT)
    for step in range(10):
        optimizer.step(model, tokens(8, step)[[0, 1, 4, 5, 2, 3, 6, 7]])
    optimizer.handle.merge()
    assert all(torch.allclose(p, first[1e-2][0][name], atol=1e-4) for name, p in weights(model).items())


class Mixing(nn.Module):
    """A model that looks at the whole batch."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.up(x)
        return self.head(torch.tanh(h - h.mean(0)))


def test_refusals():
    model = Zoo()
    before = weights(model)
    for options, text in (
        ({}, "give directions=2 or more"),
        ({"directions": 2, "two_sided": False}, "leave two_sided=False out"),
        ({"directions": 2, "placement": "inplace"}, "evaluation='split' needs placement='probe'"),
        ({"directions": 2, "drive": "backward"}, "evaluation='split' needs the loss of each example"),
        ({"directions": 2, "parallel": "directions"}, "use parallel='examples'"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            LOZO(model, **(SPLIT | options))
    optimizer = LOZO(model, directions=4, **SPLIT)
    for call, kind, text in (
        (lambda: optimizer.step(lambda: 1.0), TypeError, "evaluation='split' needs step(closure, inputs)"),
        (lambda: optimizer.estimate(lambda: 1.0), TypeError, "a closure that takes the inputs and returns one loss for each"),
        (lambda: optimizer.step(losses_of(model), tokens(6)), ValueError, "6 examples does not divide into directions=4 equal"),
        (lambda: optimizer.step(lambda b: losses_of(model)(b).mean(), tokens(8)), TypeError, "one loss for each of the 8 examples"),
        (lambda: optimizer.step([losses_of(model)] * 2, [tokens(8), tokens(4)]), ValueError, "one number of examples"),
    ):
        with pytest.raises(kind, match=re.escape(text)):
            call()
    assert same(weights(model), before) and optimizer.steps_done == 0
    optimizer.step(losses_of(model), tokens(8))


def test_a_model_that_mixes_examples_is_refused():
    model = Mixing()
    before = weights(model)
    optimizer = LOZO(model, directions=2, **SPLIT)
    with pytest.raises(BatchSplitError, match="mixes the examples of a batch; use evaluation='sequential'"):
        optimizer.step(lambda x: model(x).square().sum(1), torch.randn(4, 4))
    assert same(weights(model), before)


def test_a_journal_of_another_evaluation_is_told_apart(tmp_path):
    model = Zoo()
    optimizer = LOZO(model, directions=2, **SPLIT)
    with Journal.create(tmp_path / "run", optimizer):
        optimizer.step(losses_of(model), tokens(4))
    assert read_journal(tmp_path / "run").header.settings["evaluation"] == "split"
    again = Zoo()
    with pytest.raises(JournalError, match=r"evaluation is .split. there and .batched. here"):
        Journal.resume(tmp_path / "run", LOZO(again, directions=2, placement="probe", evaluation="batched"))


def test_the_command(tmp_path):
    """Its defaults, its forward passes, its rate, and a run that goes on from its journal."""
    settings = Settings(method="agzo-split", steps=60, batch_size=16, eval_size=8, lr=3e-4, output=str(tmp_path / "run"))
    found = settings.resolved()
    assert (found.rank, found.directions, found.evaluation, found.placement) == (4, 8, "split", "probe")
    summary = finetune(settings, quiet=True)
    assert summary["two_forwards_ms"] == pytest.approx(summary["forwards_ms"])
    steps = [row for row in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if row["kind"] == "step"]
    assert all(len(row["c"]) == 8 for row in steps)
    assert summary["evaluations"][-1]["loss"] < summary["evaluations"][0]["loss"]
    assert cli.main(["verify", "--journal", str(tmp_path / "run"), "--checkpoint", str(tmp_path / "run")]) == 0
    for change, text in (
        ({"batch_size": 12}, "--directions 8: it divides the --batch-size, 12, into equal parts"),
        ({"batch_size": 8, "model": "someone/model", "task": "sst2", "lr": None}, "and without --lr these into halves"),
        ({"placement": "inplace"}, "--evaluation split needs --placement probe"),
        ({"one_sided": True}, "leave out --one-sided"),
        ({"directions": 1}, "give --directions 2 or more"),
        ({"parallel": "directions"}, "leave out --parallel directions"),
        ({"compare_steps": 3}, "--compare-steps: the published code has no"),
    ):
        with pytest.raises(InputError, match=re.escape(text)):
            dataclasses.replace(settings, **change).resolved()
    other = Settings(
        method="lozo", evaluation="split", directions=4, placement="probe", steps=3, eval_size=8, output=str(tmp_path / "x")
    )
    assert finetune(other, quiet=True)["steps_done"] == 3
    replayed = read_journal(next((tmp_path / "x").glob("*journal*")))
    assert replayed.header.settings["directions"] == 4
