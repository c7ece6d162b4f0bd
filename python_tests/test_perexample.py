"""GRZO: a direction for each part of a batch, from the noise to runs, journals and refusals."""

import copy
import re

import pytest
import torch
from torch import nn

from lozo_kernels import GRZO, LOZO, BatchSplitError, Draw, TensorTable, capture_step, export_lora, ops, patch
from lozo_kernels.journal import Journal, replay
from lozo_kernels.kernels import noise
from lozo_kernels.model.losses import count_examples
from python_tests.models import Zoo, losses_of, same, weights
from python_tests.parallel_helpers import finish, logs, start
from python_tests.parts import check_the_mean_estimate, check_the_mean_loss


class Conv1D(nn.Module):
    """The layer of GPT-2, which computes x W."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) * 0.3), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Small(nn.Module):
    """An embedding that is tied to the head, one of positions that all examples share, both kinds of layers, and a norm."""

    def __init__(self):
        super().__init__()
        self.embed, self.places = nn.Embedding(13, 8), nn.Embedding(6, 8)
        self.up, self.norm, self.down = nn.Linear(8, 10), nn.LayerNorm(10), Conv1D(8, 10)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]).unsqueeze(0))
        return self.head(h + self.down(torch.tanh(self.norm(self.up(h)))))


def tokens_of(count, generator=None):
    return torch.randint(0, 13, (count, 7), generator=generator)


def simulate(weights, losses, *, steps, rank, interval, eps, lr, parts, seed):
    """GRZO in fp64 as its paper has it but for 1 / (2 eps): matrices along diag(r_i) U V^T diag(s_i), vectors along one Z.

    Only the noise is shared with the library. ``losses`` are those of the parts, at one set of weights for each. Returns the loss
    before each step.
    """
    x = {name: w.double() for name, w in weights.items()}
    found = []
    for t in range(steps):
        found.append(losses([x] * parts).mean().item())
        z = [{} for _ in range(parts)]
        for name, w in x.items():
            tid = noise.tensor_id(name)
            if w.dim() == 1:
                one = noise.dense(seed, w.numel(), tid, t).double()
                for own in z:
                    own[name] = one
                continue
            u = noise.factor(seed, w.shape[0], rank, tid, t).double()
            v = noise.factor(seed, w.shape[1], rank, tid, t // interval, stream="V").double()
            r, s = (
                noise.part_signs(seed, parts, size, tid, t, stream=stream).double()
                for size, stream in zip(w.shape, ("row signs", "column signs"), strict=True)
            )
            for i, own in enumerate(z):
                own[name] = torch.diag(r[i]) @ u @ v.T @ torch.diag(s[i])
        plus, minus = (losses([{n: w + side * own[n] for n, w in x.items()} for own in z]) for side in (eps, -eps))
        a = (plus - minus) / (plus - minus).std()
        for name, w in x.items():
            mean = sum(a[i] * z[i][name] for i in range(parts)) / parts
            x[name] = w - lr * mean / (1 if w.dim() == 1 else rank)
    return found


@torch.no_grad()
def test_trajectory_is_that_of_the_paper(rng):
    """On every backend, over 150 steps in which V is drawn anew three times."""
    seed, parts = rng.getrandbits(64), 4
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4))
    x, y = torch.randn(16, 12), torch.randint(0, 4, (16,))

    def losses(at):
        w = {name: torch.stack([one[name] for one in at]) for name in at[0]}
        h = torch.tanh(x.double().view(parts, -1, 12) @ w["0.weight"].mT + w["0.bias"].unsqueeze(1))
        logits = h @ w["2.weight"].mT + w["2.bias"].unsqueeze(1)
        return nn.functional.cross_entropy(logits.flatten(0, 1), y, reduction="none").view(parts, -1).mean(1)

    settings = {"rank": 3, "interval": 40, "eps": 3e-2, "lr": 3e-3, "seed": seed}
    expected = simulate({k: w.clone() for k, w in model.named_parameters()}, losses, steps=150, parts=parts, **settings)
    assert expected[-1] < expected[0]
    for name in ("native", "eager"):
        own = copy.deepcopy(model)
        optimizer = GRZO(own, directions=parts, backend=name, **settings)
        for step in range(149):
            optimizer.step(lambda b, own=own: nn.functional.cross_entropy(own(b[0]), b[1], reduction="none"), (x, y))
            if step + 1 in (40, 80, 120, 149):
                copied = {k: w.double() for k, w in copy.deepcopy(own).named_parameters()}
                ours, theirs = losses([copied] * parts).mean().item(), expected[step + 1]
                assert abs(ours - theirs) <= 1e-5 * theirs, f"{name}, step {step + 1}: {ours} against {theirs}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_each_part_is_evaluated_at_its_own_weights(rng, dtype):
    """Against copies whose weights are changed by hand, on every kind of layer; and what is updated is what was evaluated."""
    model, parts, eps, step = Small().to(dtype), 3, 0.05, 7
    optimizer = GRZO(model, rank=2, interval=5, directions=parts, seed=rng.getrandbits(64), lr=0.0)
    losses, batch, handle = losses_of(model), tokens_of(6), optimizer.handle
    optimizer.step(losses, batch)
    assert {row.side for row in handle.report().parameters} == {"activation", "shift", "copy"}
    handle.spread_(step, [(0, eps)], 6, parts)
    found = losses(batch)
    handle.rest_()
    for i in range(parts):
        by_hand = Small().to(dtype)
        by_hand.load_state_dict(model.state_dict())
        for name, p in by_hand.named_parameters():
            p.copy_(p.float() + eps * handle.materialize(name, step, direction=i))
        own = slice(2 * i, 2 * i + 2)
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
        assert torch.allclose(found[own], losses_of(by_hand)(batch[own]), **close)
        handle.perturb_(step, eps, direction=i)  # and the whole batch at the point of one part
        assert torch.allclose(found[own], losses(batch)[own], rtol=1e-5 if dtype == torch.float32 else 5e-2)
        handle.rest_()
    before, c = weights(model), torch.randn(parts, dtype=torch.float64).tolist()
    handle.update_(step, c, 0.1)
    handle.merge()
    for name, was in before.items():
        if name == "head.weight":
            continue
        scale = 1 if was.dim() == 1 else 0.5
        moved = sum(one * handle.materialize(name, step, direction=i) for i, one in enumerate(c)) * -0.1 * scale / parts
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        assert torch.allclose(dict(model.named_parameters())[name].float(), was.float() + moved, **close), name


def test_the_mean_of_estimates_is_the_gradient(rng):
    """Without normalising."""
    check_the_mean_estimate(GRZO, rng, normalise=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "rounding": "stochastic", "scaling": "card"}])
def test_a_journal_replays_and_goes_on(tmp_path, rng, dtype, options):
    """In the bits of the run, on another backend too; and a run that was stopped goes on in them, from its journal or its state."""
    torch.manual_seed(rng.getrandbits(32))
    base = Small().to(dtype)
    batches = [tokens_of(8) for _ in range(9)]

    def run(path, first, steps, state=None, model=None):
        model = copy.deepcopy(base) if model is None else model
        optimizer = GRZO(model, lr=1e-2, eps=1e-2, interval=4, directions=4, **options)
        if state is not None:
            optimizer.load_state_dict(state)
        elif path is not None and path.exists():
            assert Journal.resume(path, optimizer, upto=first) == first
        elif path is not None:
            Journal.create(path, optimizer)
        for step in range(first, steps):
            optimizer.step(losses_of(model), batches[step])
        state = optimizer.state_dict() if path is None else optimizer.journal.finish()
        optimizer.handle.restore()
        return model, state

    whole = weights(run(tmp_path / "whole", 0, 9)[0])
    for backend in (None, "eager"):
        model = copy.deepcopy(base)
        assert replay(model, tmp_path / "whole", backend=backend).agrees and same(weights(model), whole)
    run(tmp_path / "parts", 0, 5)
    assert same(weights(run(tmp_path / "parts", 5, 9)[0]), whole)
    if dtype == torch.float32:  # saving merges, which rounds once more
        model, state = run(None, 0, 4)
        assert same(weights(run(None, 4, 9, state, model)[0]), weights(run(None, 0, 9)[0]))


def test_sums_and_weights_and_micro_batches():
    model = Small()
    check_the_mean_loss(model, GRZO(model, directions=2, lr=0.0, eps=1e-7), tokens_of, places=6)


def test_refusals_of_the_op():
    """And scales of every form: for each part and tensor, for each part, and for one part."""
    x, v = torch.randn(1, 5, 9), torch.ones(1, 2, 9, dtype=torch.float16)
    table = TensorTable([x, x.clone()], [1, 2], v=[v, v.clone()])
    before = [t.clone() for t in table.x]
    call = {"seed": 3, "draws": [Draw(4)]}
    for more, kind, text in (
        ({"scales": torch.ones(257, 1)}, ValueError, "parts less 1 is 0 to 255, not 256"),
        ({"scales": []}, ValueError, "does not broadcast"),
        ({"scales": torch.ones(0, 2)}, ValueError, "parts less 1 is 0 to 255, not -1"),
        ({"scales": torch.ones(2, 3)}, ValueError, "does not broadcast"),
        ({"scales": 1.0, "draws": [Draw(4), Draw(5)]}, ValueError, "takes 1 to 1 draws, not 2"),
        ({"scales": torch.ones(2, 1), "draws": [Draw(4, 2**24 - 1)]}, ValueError, "parts less 1 is 0 to 0, not 1"),
    ):
        with pytest.raises(kind, match=re.escape(text)):
            ops.lowrank_signed_update_(table, **(call | more))
    assert all(torch.equal(a, b) for a, b in zip(table.x, before, strict=True))
    for scales in ([[1.0, 1.0], [0.5, 0.5]], torch.tensor([[-1.0], [-0.5]])):
        ops.lowrank_signed_update_(table, scales=scales, **call)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(table.x, before, strict=True))
    ops.lowrank_signed_update_(table, scales=1.0, **call)
    once = [t.clone() for t in table.x]
    ops.lowrank_signed_update_(table, scales=[-1.0, 0.0], **call)
    assert torch.allclose(table.x[0], before[0], atol=1e-5) and torch.equal(table.x[1], once[1])


def test_refusals_of_settings():
    model = Small()
    before = weights(model)
    for options, text in (
        ({"momentum": 0.9}, "momentum is not for directions per example"),
        ({"two_sided": False}, "two_sided=False is not for directions per example"),
        ({"evaluation": "batched"}, "evaluation='batched' is not for directions per example"),
        ({"drive": "backward"}, "drive is not for directions per example"),
        ({"parallel": "directions"}, "parallel='directions' is not for directions per example"),
        ({"lr": "auto"}, "lr='auto' is not for directions per example"),
        ({"fuse_steps": True}, "fuse_steps saves a pass"),
        ({"placement": "inplace"}, "placement='inplace' is not for directions per example"),
        ({"placement": "auto"}, "placement='auto' is not for directions per example"),
        ({"keep_factors": True}, "keep_factors is not for directions per example"),
        ({"directions": 257}, "at most 256, not 257"),
        ({"directions": 1}, "give directions=2 or more"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            GRZO(model, **options)
    handle = patch(model, estimator="perexample", placement="probe")
    with pytest.raises(ValueError, match="LOZO needs a handle with estimator='lowrank'"):
        LOZO(handle)
    handle.restore()
    assert same(weights(model), before)


def test_refusals_of_batches_and_closures():
    model = Small()
    before = weights(model)
    optimizer = GRZO(model, directions=4)
    for call, kind, text in (
        (lambda: optimizer.step(lambda: 1.0), TypeError, "needs a closure that takes the inputs and returns one loss for each"),
        (lambda: optimizer.estimate(lambda: 1.0), TypeError, "needs a closure that takes the inputs and returns one loss for each"),
        (lambda: optimizer.step(losses_of(model), tokens_of(6)), ValueError, "6 examples does not divide into directions=4 equal"),
        (
            lambda: optimizer.step(lambda b: losses_of(model)(b).mean(), tokens_of(8)),
            TypeError,
            "one loss for each of the 8 examples",
        ),
        (lambda: optimizer.step([losses_of(model)] * 2, [tokens_of(8), tokens_of(4)]), ValueError, "one number of examples"),
        (lambda: capture_step(optimizer, losses_of(model), tokens_of(8)), ValueError, "cannot be captured"),
    ):
        with pytest.raises(kind, match=re.escape(text)):
            call()
    assert same(weights(model), before) and optimizer.steps_done == 0
    optimizer.step(losses_of(model), tokens_of(8))
    with pytest.raises(ValueError, match="GRZO"):
        export_lora(optimizer.handle, "nowhere")


def test_refusals_of_weights(rng):
    """By name, before a weight is touched: what is no matrix of a layer, and what only the weight side could evaluate."""
    for options, name in (({}, "'experts'"), ({"exclude": "experts"}, "'conv.weight'")):
        model = Zoo().eval()
        before = weights(model)
        optimizer = GRZO(model, directions=2, **options)
        with pytest.raises(RuntimeError, match=rf"{name} cannot have a direction for each example \(not the matrix .*exclude it"):
            optimizer.step(losses_of(model), tokens_of(4) % 11)
        assert same(weights(model), before)
    model = Zoo().eval()
    optimizer = GRZO(model, directions=2, exclude=["conv.weight", "experts"])
    optimizer.step(losses_of(model), tokens_of(4) % 11)
    model = Small()
    optimizer = GRZO(model, directions=2, side={"up.weight": "scratch"})
    with pytest.raises(
        RuntimeError, match=r"'up.weight' cannot have a direction for each example \(side='scratch' was asked for\)"
    ):
        optimizer.step(losses_of(model), tokens_of(4))


def test_a_model_that_mixes_examples_is_refused():
    model = Small()

    def mixed(tokens):
        losses = losses_of(model)(tokens)
        return losses * losses.mean()

    with pytest.raises(BatchSplitError, match=r"mixes the examples of a batch; GRZO cannot train it"):
        GRZO(model, directions=4).step(mixed, tokens_of(8))


def test_two_forward_passes_a_step_and_none_between():
    model, calls = Small(), []
    optimizer = GRZO(model, directions=4)
    losses = losses_of(model)

    def counted(tokens):
        calls.append(count_examples(tokens))
        return losses(tokens)

    optimizer.step(counted, tokens_of(8))
    calls.clear()
    optimizer.step(counted, tokens_of(8))
    assert calls == [8, 8]
    with torch.no_grad():
        found, tokens = losses(tokens_of(3)), tokens_of(3)
        assert found.shape == (3,)
        plain = losses(tokens)
        optimizer.handle.restore()
        assert torch.allclose(losses(tokens), plain, rtol=1e-5)


def test_it_learns(rng):
    """A text of one token: the loss falls."""
    model = Small()
    tokens = torch.full((8, 7), 3)
    optimizer = GRZO(model, lr=3e-3, directions=4, seed=rng.getrandbits(64))
    first = float(optimizer.step(losses_of(model), tokens))
    for _ in range(60):
        last = float(optimizer.step(losses_of(model), tokens))
    assert last < first


def in_ranks(rank, ranks, folder):
    """Three steps of one process, with its share of the examples of both parts."""
    torch.manual_seed(1)
    model = Small()
    optimizer = GRZO(model, lr=1e-2, eps=1e-2, interval=2, directions=2, parallel="examples" if ranks > 1 else None)
    for step in range(3):
        tokens = tokens_of(8, torch.Generator().manual_seed(step)).view(2, ranks, 4 // ranks, 7)[:, rank].flatten(0, 1)
        optimizer.step(losses_of(model), tokens)
    torch.save((optimizer.info.c, model.state_dict()), folder / f"{ranks}-{rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is missing")
def test_processes_share_the_examples_of_each_part(tmp_path):
    started = start(2, tmp_path, in_ranks)
    in_ranks(0, 1, tmp_path)
    assert finish(started) == [0, 0], logs(tmp_path)
    (c, alone), *both = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert same(both[0][1], both[1][1])
    assert torch.allclose(both[0][0], c, rtol=1e-2, atol=1e-2)  # the losses' rounding over eps
    assert all(torch.allclose(both[0][1][name], p, rtol=1e-3, atol=1e-4) for name, p in alone.items())
