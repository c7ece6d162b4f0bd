"""Probes whose first losses prove nothing: no labels, constant losses, losses that are not the same twice."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm, weight_norm

from lozo_kernels import LOZO, BatchSplitError, MeZO, patch
from lozo_kernels.journal import Journal, read_journal, replay
from lozo_kernels.journal.format import Sides

warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated")
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
OPTIONS = {"lr": 1e-2, "eps": 1e-2, "rank": 2, "interval": 4}


class Hidden(nn.Module):
    """Reads a weight through memory that no operator shows, as a kernel does that kept an address."""

    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 5))
        self.pointer = self.weight.detach().numpy()

    def forward(self, x):
        return torch.tanh(self.first(x)) @ torch.from_numpy(self.pointer)


class Normed(nn.Module):
    """Normalises weights in hooks that run before a layer does."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.last = norm(nn.Linear(6, 6)), nn.Linear(6, 5)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


MODELS = {"hidden": Hidden, "spectral": lambda: Normed(spectral_norm), "weight": lambda: Normed(weight_norm)}


def pair(make):
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    return model, make()


def batches(n):
    torch.manual_seed(1)
    return [(torch.randn(4, 6), torch.randint(5, (4,))) for _ in range(n)]


def nothing(labels):
    return torch.full_like(labels, -100)


def in_eval_mode(model):
    """Power iterations do not advance, so that evaluations of both models see the same buffers."""
    return model.eval()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("blind", [1, 3])
@pytest.mark.parametrize("make", MODELS)
def test_a_batch_without_labels_comes_first(make, blind, reduction):
    model, twin = map(in_eval_mode, pair(MODELS[make]))
    optimizer, in_place = LOZO(model, placement="probe", **OPTIONS), LOZO(twin, max_nonfinite=9, **OPTIONS)
    optimizer.stepper.settings.max_nonfinite = 9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of losses that are not finite
        for step, (x, y) in enumerate(batches(blind + 4)):
            y = nothing(y) if step < blind else y
            losses = [
                float(o.step(lambda m=m, x=x, y=y: F.cross_entropy(m(x), y, reduction=reduction)))
                for m, o in ((model, optimizer), (twin, in_place))
            ]
            assert losses[0] == pytest.approx(losses[1], rel=1e-4, nan_ok=True)
            torch.testing.assert_close(optimizer.info.c, in_place.info.c, rtol=2e-2, atol=2e-2)
            pending = [note for note in optimizer.handle.notes if "not verified yet" in note]
            assert bool(pending) == (step < blind)
            assert ("not verified yet" in str(optimizer.handle.report())) == (step < blind)


def test_a_language_model_whose_first_prompt_has_no_answer():
    """Completion-only collators make such labels for prompts that are cut before their answers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    class Kernel(nn.Module):
        """A layer whose kernel keeps the address of its weight."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))
            self.pointer = self.weight.detach().numpy()

        def forward(self, x):
            return torch.tanh(x @ torch.from_numpy(self.pointer))

    def make():
        model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, n_inner=16))
        model.transformer.h[0].mlp = Kernel()
        return model.eval()

    model, twin = pair(make)
    options = {"lr": 0.0, "eps": 0.05, "rank": 2}
    optimizer, in_place = LOZO(model, placement="probe", **options), LOZO(twin, **options)
    ids = torch.arange(12).view(2, 6)
    for labels in (nothing(ids), ids):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for m, o in ((model, optimizer), (twin, in_place)):
                o.step(lambda m=m, labels=labels: m(input_ids=ids, labels=labels).loss)
    assert float(optimizer.info.loss_plus) == pytest.approx(float(in_place.info.loss_plus), abs=1e-5)
    assert {m.name for m in optimizer.handle.members if m.side == "inplace"} == {"transformer.h.0.mlp.weight"}


def test_a_pending_check_costs_a_bounded_number_of_evaluations():
    model, x = Hidden(), torch.randn(4, 6)
    calls, scale = [], [float("nan")]

    def loss():
        calls.append(1)
        return (model(x) * scale[0]).square().mean()

    optimizer = LOZO(model, placement="probe", **OPTIONS)
    costs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in (float("nan"), float("nan"), 0.0, 0.0, 1.0, 1.0, 1.0):
            scale[0] = value
            calls.clear()
            optimizer.step(loss)
            costs.append(len(calls))
    assert costs[1] <= 3 and costs[2] == costs[3] <= 5  # one evaluation sees a NaN; three that nothing moves
    assert costs[5] == costs[6] == 2  # nothing is left to check
    assert {m.side for m in optimizer.handle.members if m.name == "weight"} == {"inplace"}


def test_a_part_that_never_changes_the_loss_is_checked_less_and_less():
    """What a gate shuts is used, and stays in doubt."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.open, self.shut = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.open(x) + 0 * self.shut(x)

    model, x, calls = Gated(), torch.randn(4, 6), []
    handle = patch(model, placement="probe", rank=2)

    def loss():
        calls.append(1)
        return model(x).square().mean()

    handle.prepare(loss)
    assert handle.notes == ()  # checked together with the others
    shut = [m for m in handle.members if m.name.startswith("shut")]
    handle._doubts.add(shut)
    costs = []
    for _ in range(20):
        calls.clear()
        handle.prepare(loss, step=0)
        costs.append(len(calls))
    assert 0 < sum(map(bool, costs)) <= 5 and any("shut.weight" in note for note in handle.notes)


@pytest.mark.parametrize("make", [LOZO, MeZO])
@pytest.mark.parametrize("norm", [spectral_norm, weight_norm], ids=lambda f: f.__name__)
def test_weights_that_are_normalised_in_hooks_are_perturbed_in_train_mode(make, norm):
    """spectral_norm iterates in its buffers in every forward in train mode, so that no two losses are the same."""
    model, twin = pair(lambda: Normed(norm))
    x = torch.randn(4, 6)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    optimizer = make(model, placement="probe", lr=0.0, eps=0.1, **({"rank": 2} if make is LOZO else {}))
    optimizer.handle.prepare(lambda: model(x).square().mean())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())  # a check leaves no trace in them
    in_place = patch(twin, **({"rank": 2} if make is LOZO else {"estimator": "dense"}))
    optimizer.handle.perturb_(0, 0.1)
    in_place.perturb_(0, 0.1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
    assert not any("not the same" in note for note in optimizer.handle.notes)


def test_dropout_without_common_random_numbers_can_be_checked():
    """The check replays random numbers of its own."""
    model, _ = pair(lambda: nn.Sequential(Hidden(), nn.Dropout(0.5), nn.Linear(5, 1)))
    x = torch.randn(4, 6)
    optimizer = LOZO(model, placement="probe", common_random_numbers=False, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: model(x).square().mean())
    assert next(m for m in optimizer.handle.members if m.name == "0.weight").side == "inplace"


def test_numpy_masks_are_no_noise_for_a_check():
    """As SpecAugment of Wav2Vec2 masks with numpy."""
    model = nn.Sequential(Hidden(), nn.Linear(5, 1))
    x = torch.randn(64, 6)

    def loss():
        return model(x)[torch.from_numpy(np.random.rand(64) < 0.9)].square().mean()

    optimizer = LOZO(model, placement="probe", **OPTIONS)
    optimizer.step(loss)
    assert next(m for m in optimizer.handle.members if m.name == "0.weight").side == "inplace"
    assert not any("not the same" in note for note in optimizer.handle.notes)


def another_batch_each_time(model):
    generator = torch.Generator().manual_seed(0)
    return lambda: 1e3 * model(torch.randn(2, 6, generator=generator)).square().mean()


def test_a_closure_that_takes_another_batch_each_time_is_said_and_stays_structural():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))
    optimizer = LOZO(model, placement="probe", **OPTIONS)
    with pytest.warns(UserWarning, match="not the same twice at the same weights.*one batch's loss"):
        optimizer.step(another_batch_each_time(model))
    assert any("not the same twice" in note for note in optimizer.handle.notes)
    assert not any("not verified yet" in note for note in optimizer.handle.notes)


@pytest.mark.parametrize("norm", [spectral_norm, weight_norm], ids=lambda f: f.__name__)
def test_hooks_and_a_closure_that_takes_another_batch_each_time_go_in_place(norm):
    model, twin = pair(lambda: Normed(norm))
    handle, in_place = patch(model, placement="probe", rank=2), patch(twin, rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle.prepare(another_batch_each_time(model))
    x = torch.randn(4, 6)
    for h in (handle, in_place):
        h.perturb_(0, 0.1)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_check_whose_perturbation_overflows_tries_a_smaller_one():
    class Exponential(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = Hidden()

        def forward(self, x):
            return torch.exp(30 * self.hidden(x).square()).mean()

    torch.manual_seed(0)
    model = Exponential()
    x = torch.full((4, 6), 1.0)
    with torch.no_grad():
        model.hidden.weight.mul_(1.6 / model.hidden(x).abs().max())
    assert torch.isfinite(model(x))
    optimizer = LOZO(model, placement="probe", lr=0.0, eps=1e-4, rank=2)
    for _ in range(4):
        optimizer.step(lambda: model(x))
    assert not any("not verified" in note for note in optimizer.handle.notes)
    assert next(m for m in optimizer.handle.members if m.name.endswith("weight") and "first" not in m.name).side == "inplace"


def test_a_side_that_is_mended_later_keeps_what_was_learned():
    """A part of the model that a check could not prove goes in place after steps that learned."""
    model, twin = pair(Hidden)
    x = torch.randn(4, 6)
    optimizer = LOZO(model, placement="probe", **OPTIONS)
    handle = optimizer.handle
    optimizer.step(lambda: model.first(x).square().mean())
    member = next(m for m in handle.members if m.name == "weight")
    for _ in range(2):
        optimizer.step(lambda: model(x).square().mean())
    learned = twin.state_dict()
    handle.write_perturbed("first.weight", learned["first.weight"])
    handle.write_perturbed("weight", learned["weight"])
    if member.side != "inplace":
        handle._doubts.add([member])
        optimizer.step(lambda: model(x).square().mean())
    assert member.side == "inplace" and member.b is None


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_run_whose_sides_changed_is_rebuilt_and_resumed_from_its_journal(tmp_path, momentum):
    """The first losses show one layer only; later a weight goes in place, when others have learned."""
    torch.manual_seed(2)
    x = torch.randn(4, 6)

    def start():
        model, _ = pair(lambda: nn.ModuleDict({"early": nn.Linear(6, 6), "late": Hidden()}))
        return model, LOZO(model, placement="probe", momentum=momentum, **OPTIONS)

    def steps(model, optimizer, some):
        for step in some:

            def loss(step=step):
                hidden = torch.tanh(model["early"](x))
                return hidden.square().mean() + (model["late"](hidden.detach()).square().mean() if step >= 2 else 0)

            optimizer.step(loss)

    model, optimizer = start()
    with Journal.create(tmp_path / "run.lozo", optimizer):
        steps(model, optimizer, range(2))
        optimizer.handle._doubts.add(optimizer.handle.members)  # as if nothing had proved them
        steps(model, optimizer, range(2, 7))
    assert {m.name for m in optimizer.handle.members if m.side == "inplace"} == {"late.weight"}
    assert sum(isinstance(record, Sides) for record in read_journal(tmp_path / "run.lozo").records) == 2
    again, _ = pair(lambda: nn.ModuleDict({"early": nn.Linear(6, 6), "late": Hidden()}))
    replay(again, tmp_path / "run.lozo")
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    resumed, more = start()
    Journal.resume(tmp_path / "run.lozo", more, upto=5)
    steps(resumed, more, range(5, 7))
    more.journal.finish()
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


@pytest.mark.parametrize("blind", [float("nan"), 0.0])
def test_evaluations_in_one_forward_pass_are_checked_by_a_loss_that_moves(blind):
    """The model mixes the examples of a batch, which the first batch does not show."""

    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3))
    optimizer = LOZO(model, placement="probe", evaluation="batched", **OPTIONS)
    x = torch.randn(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step(lambda batch: model(batch).square().mean(1) * blind, x)
    with pytest.raises(BatchSplitError):
        optimizer.step(lambda batch: model(batch).square().mean(1), x)
