"""Generated cases over the public API in short, and what such cases found, each by itself."""

import random

import pytest
import torch

from lozo_kernels import LOZO, Draw, MeZO, PatchConfig, Rounding, TensorTable, choose_backend, patch
from lozo_kernels.journal import Journal, read_journal, replay, verify
from lozo_kernels.kernels import noise, ops, skinny
from lozo_kernels.kernels.checks import check_number
from python_tests import gradients
from python_tests.fuzz.api import ENTRIES, fuzz
from python_tests.fuzz.choices import Choices, Finding, Memory, attempt


@pytest.mark.parametrize("name", ENTRIES)
def test_generated_cases(name):
    entry, share = ENTRIES[name]
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    count = 6 * share
    assert fuzz(entry, count, seed).total() >= count


class Fixed(Choices):
    """A case without hypothesis."""

    def __init__(self, *notes):
        self.notes = list(notes)


def fail_inside_torch():
    TensorTable([torch.zeros(1, 2, 3)], [1], v=[torch.zeros(2)])[0]


def change_and_refuse(x):
    def call():
        x.add_(1)
        ops.dense_update_(None, seed=1, draws=[Draw(0)], scales=1.0)

    return call


def test_the_fuzzer_finds_errors_that_nobody_meant():
    x = torch.zeros(1, 2, 3)
    with pytest.raises(Finding, match="raised in"):
        attempt(Fixed("odd"), Memory(), lambda: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(Finding, match="something was changed"):
        attempt(Fixed("odd"), Memory([x]), change_and_refuse(x))
    with pytest.raises(Finding, match="arguments that are right"):
        attempt(Fixed(), Memory(), lambda: ops.dense_update_(None, seed=1, draws=[Draw(0)], scales=1.0))


def table(*xs, **more):
    return TensorTable(list(xs), list(range(len(xs))), **more)


def freed():
    x = torch.zeros(1, 2, 3)
    x.untyped_storage().resize_(0)
    return x


whole = torch.zeros(1, 4, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: table(whole, whole), "tensor 0 and tensor 1 share storage"),
        (lambda: table(whole[..., :5], whole[..., 4:]), "share storage"),
        (lambda: table(whole, n=[whole]), "tensor 0 and n of tensor 0 share"),
        (lambda: table(torch._neg_view(torch.ones(1, 2, 3))), "negates"),
        (lambda: table(freed()), "freed"),
        (lambda: table(whole, v=[torch.zeros(2).half()]), r"give it as \(batch, rank, cols\)"),
    ],
)
def test_tables_of_memory_that_is_not_their_own(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda: table(None), lambda: table(whole, v=3), lambda: table(whole.to_sparse())])
def test_tables_of_other_things(make):
    with pytest.raises(TypeError):
        make()


def test_columns_of_one_matrix_side_by_side():
    assert len(table(whole[..., :4], whole[..., 4:])) == 2


@pytest.mark.parametrize("name", ["native", "eager"])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"draws": [Draw(torch.zeros(1))]}, ValueError),
        ({"draws": [Draw(1.5)]}, TypeError),
        ({"draws": [3]}, TypeError),
        ({"seed": 1.5}, TypeError),
        ({"seed": "x"}, TypeError),
        ({"scales": 1e300}, ValueError),
        ({"scales": [[0.1], [0.1, 0.2]]}, TypeError),
        ({"scales": torch.zeros(1, 2, dtype=torch.complex64)}, TypeError),
        ({"scales": torch.zeros(1, 2, device="meta")}, TypeError),
        ({"rounding": "stochastic"}, TypeError),
        ({"backend": "native"}, TypeError),
    ],
)
def test_arguments_that_fit_nothing(name, call, error):
    """The first tensor is not changed because the second is refused."""
    xs = [torch.randn(1, 4, 8).bfloat16() for _ in range(2)]
    before = [x.clone() for x in xs]
    call = {"seed": 1, "draws": [Draw(0)], "scales": 1.0, "backend": choose_backend("cpu", name).backend} | call
    with pytest.raises(error):
        ops.dense_update_(table(*xs), **call)
    assert all(map(torch.equal, xs, before))


@pytest.mark.parametrize("name", ["native", "eager"])
def test_positions_are_checked_before_anything_changes(name):
    xs = [torch.randn(1, 4, 8).bfloat16() for _ in range(2)]
    before, backend = [x.clone() for x in xs], choose_backend("cpu", name).backend
    with pytest.raises(ValueError, match="tensor 1 reaches position"):
        ops.dense_update_(table(*xs, row_offsets=[0, 1 << 41]), seed=1, draws=[Draw(0)], scales=1.0, backend=backend)
    v = [torch.zeros(1, 2, 8).half() for _ in xs]
    far = table(*xs, v=v, row_offsets=[0, 1 << 31], global_cols=[8, 1 << 30])
    with pytest.raises(ValueError, match="beyond"):  # the factors are in reach, the rounding bits are not
        ops.lowrank_update_(far, seed=1, draws=[Draw(0)], scales=1.0, rounding=Rounding(0), backend=backend)
    assert all(map(torch.equal, xs, before))


def test_a_merge_into_a_part_of_what_it_reads():
    flat = torch.zeros(64)
    x, out = flat[:32].view(1, 4, 8), flat[1:33].view(1, 4, 8)
    with pytest.raises(ValueError, match="share storage"):
        ops.dense_merge_(table(x), seed=1, draws=[Draw(0)], out=table(out))
    ops.dense_merge_(table(x), seed=1, draws=[Draw(0)], scales=1.0, out=table(x))
    assert x.any()


@pytest.mark.parametrize("name", ["native", "eager"])
def test_weights_of_inference_mode_and_of_autograd(name):
    with torch.inference_mode():
        x = torch.zeros(1, 4, 8)
    y = torch.zeros(1, 4, 8, requires_grad=True)
    scales = torch.ones(1, 2, requires_grad=True)
    ops.dense_update_(table(x, y), seed=1, draws=[Draw(0)], scales=scales, backend=choose_backend("cpu", name).backend)
    assert x.any() and y.any() and y.is_leaf


def product(**changed):
    call = {"seed": 1, "tensor_id": 2, "draws": torch.zeros(1, 2, dtype=torch.int64), "scales": torch.ones(1)}
    tensors = {"y": torch.zeros(3, 5), "x": torch.zeros(3, 4), "v": torch.zeros(2, 4).half(), "b": torch.zeros(5, 2)}
    call = call | tensors | changed
    function = skinny.lowrank_embedding_ if call["x"].dim() == 1 else skinny.lowrank_linear_
    function(*[call.pop(name) for name in tensors], **call)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"seed": -1}, ValueError),
        ({"tensor_id": 1 << 32}, ValueError),
        ({"row_offset": (1 << 32) - 4}, ValueError),
        ({"draws": torch.tensor([[1 << 30, 0]])}, ValueError),
        ({"y": torch.zeros(1, 5).expand(3, 5)}, ValueError),
        ({"b": None}, TypeError),
        ({"gain": 1.0}, TypeError),
        ({"shift": torch._neg_view(torch.ones(1, 5))}, ValueError),
        ({"y": torch.zeros(3, 4), "x": torch.tensor([0, 1, 5])}, ValueError),
        ({"y": torch.zeros(3, 4), "x": torch.tensor([0, -1, 4])}, ValueError),
    ],
)
def test_products_that_cannot_be(changed, error):
    with pytest.raises(error):
        product(**changed)


def test_noise_of_other_things():
    for call in (
        lambda: noise.tensor_id(3),
        lambda: noise.dense(1, 4, 1, 1.5),
        lambda: noise.factor(1, 4, "2", 1, 0),
        lambda: noise.cores(1, 2, [3], 0),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="0-dim"):
        noise.dense(1, 4, 1, torch.zeros(1))
    with pytest.raises(ValueError, match="cannot serve meta"):
        ops.factor(1, 4, 2, 1, Draw(0), device="meta", backend=choose_backend("cpu", "eager").backend)


def test_parameters_that_share_storage():
    model = torch.nn.Linear(4, 4)
    model.again = torch.nn.Parameter(model.weight.data[1])
    with pytest.raises(ValueError, match=r"'weight' and parameter 'again' share storage.*tie them"):
        patch(model)
    patch(model, exclude="again").restore()


def test_updates_that_are_no_numbers():
    model = torch.nn.Linear(4, 4)
    handle, before = patch(model), model.weight.detach().clone()
    for c, lr, error in (
        ([], 1.0, ValueError),
        (1.0, "x", TypeError),
        (torch.zeros(3), 1.0, ValueError),
        (1.0, torch.zeros(5), ValueError),
    ):
        with pytest.raises(error):
            handle.update_(0, c, lr)
    for more, error in (({"applied": float("nan")}, ValueError), ({"perturb_next": "x"}, TypeError)):
        with pytest.raises(error):
            handle.update_(49, 1.0, 1.0, **more)  # the next step has another V: a pass of its own
    with pytest.raises(ValueError, match="step is 0 to"):
        handle.update_(noise.MAX_DRAW - 2, 1.0, 1.0, perturb_next=1.0)
    with pytest.raises(KeyError):
        handle.materialize([], 0)
    with pytest.raises(TypeError, match="step is an integer"):
        handle.materialize("weight", "x")
    for scale, error in ((1e300, ValueError), ("x", TypeError), (float("nan"), ValueError)):
        with pytest.raises(error):
            handle.perturb_(0, scale)
    with pytest.raises(TypeError):
        handle.perturb_(None, 1.0)
    with pytest.raises(TypeError, match="tensors by name"):
        handle.load_momentum({"weight": 3}, 0)
    assert torch.equal(model.weight, before)


def test_a_probe_of_weights_of_inference_mode():
    with torch.inference_mode():
        model = torch.nn.Linear(4, 4)
    optimizer = LOZO(model, lr=1.0, eps=0.1, placement="probe", interval=1)
    before = model.weight.clone()
    for _ in range(2):
        optimizer.step(lambda: model(torch.ones(1, 4)).sum())
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("estimator", ["lowrank", "dense"])
def test_directions_and_merges_of_a_probe(estimator):
    model = torch.nn.Linear(4, 4)
    handle = patch(model, placement="probe", interval=1, estimator=estimator)
    handle.prepare(lambda: model(torch.ones(1, 4)).sum())
    handle.perturb_(0, 0.1)
    for call in (lambda: handle.perturb_(0, 0.1, direction=-1), lambda: handle.shift_(0, (0, 0.1), (1 << 24, 0.1))):
        with pytest.raises(ValueError, match="direction is 0 to"):
            call()
    for step in (0, 1, 2):
        handle.update_(step, 1.0, 1.0)
    handle.restore()


def test_momentum_of_another_window_comes_after_what_was_learned():
    model = torch.nn.Linear(4, 4)
    handle, before = patch(model, placement="probe"), model.weight.detach().clone()
    handle.prepare(lambda: model(torch.ones(1, 4)).sum())
    handle.enable_momentum()
    handle.update_(0, 1.0, 1.0)
    handle.load_momentum(handle.momentum, None)
    handle.restore()
    assert not torch.equal(model.weight, before)


def test_settings_that_are_no_settings():
    for bad in ("[]", '{"rnk": 2}'):
        with pytest.raises(TypeError):
            PatchConfig.from_json(bad)
    with pytest.raises(ValueError, match="no JSON"):
        PatchConfig.from_json("{")
    for bad in ({"include": 3}, {"placement": "probe", "side": 3}):
        with pytest.raises(TypeError):
            PatchConfig(**bad)
    model = torch.nn.Linear(4, 4)
    for bad in ({"fuse_steps": torch.zeros(2)}, {"two_sided": 1}, {"params": 3}, {"params": ["x"]}):
        with pytest.raises(TypeError):
            LOZO(model, **bad)
    with pytest.raises(ValueError, match="above 1"):
        LOZO(model, lr=torch.tensor(1.0), weight_decay=2.0)
    with pytest.raises(TypeError, match="needs a closure"):
        LOZO(model).step(3)
    with pytest.raises(ValueError, match="finite"):
        check_number("lr", torch.tensor(float("nan")))


@pytest.mark.parametrize(
    "damage",
    [
        {"step": -1},
        {"step": "x"},
        {"skipped": 3},
        {"window": 1.5},
        {"param_groups": [3]},
        {"state": {"weight": {"momentum": None}}},
    ],
)
@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_a_damaged_state_is_refused_whole(damage, placement):
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = LOZO(model, momentum=0.9, placement=placement)
    optimizer.step(lambda: model(torch.ones(1, 4)).sum())
    before = repr(optimizer.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(optimizer.state_dict() | damage)
    assert repr(optimizer.state_dict()) == before


def test_journals_of_other_things(tmp_path):
    model, path = torch.nn.Linear(4, 4), tmp_path / "run.journal"
    optimizer = MeZO(model)
    with pytest.raises(TypeError, match="plain JSON"):
        Journal.create(path, optimizer, about={"x": object()})
    assert not path.exists()
    Journal.create(path, optimizer).finish()
    for call in (
        lambda: read_journal(3),
        lambda: replay(3, path),
        lambda: replay(model, path, upto="x"),
        lambda: verify(model, path, tuned=3),
    ):
        with pytest.raises(TypeError):
            call()


def test_estimates_of_other_things():
    at = {"w": torch.zeros(2, 2)}
    for direction, eps, error in (
        ({}, 1e-3, ValueError),
        (at, 0.0, ValueError),
        (at, None, TypeError),
        ({"w": 3}, 1e-3, TypeError),
    ):
        with pytest.raises(error):
            gradients.rge(lambda p: p["w"].sum(), at, direction, eps)
    with pytest.raises(TypeError, match="closure must return"):
        gradients.rge(lambda p: None, at, at, 1e-3)


def test_outputs_in_the_memory_of_inputs():
    flat = torch.zeros(24)
    with pytest.raises(ValueError, match="share storage"):
        product(y=flat[:12].view(3, 4), x=flat[4:16].view(3, 4), b=torch.zeros(4, 2))
    pairs = torch.zeros(3, 8)  # side by side
    product(y=pairs[:, :4], x=pairs[:, 4:], b=torch.zeros(4, 2))
