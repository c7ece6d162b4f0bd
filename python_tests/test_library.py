"""The ops as torch operators: schemas that tell the truth, fakes, and torch.compile."""

import pytest
import torch

from lozo_kernels import LOZO, Draw, TensorTable
from lozo_kernels.bench.cases import OPS, as_bits, random_case
from lozo_kernels.kernels import noise, ops, skinny
from lozo_kernels.kernels.registry import choose_backend
from python_tests.table_helpers import assert_same

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
TORCH_OPS = torch.ops.lozo_kernels
SHAPES = [(1, 5, 24), (2, 3, 7)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Tests do not count against each other's limit of recompilations."""
    torch.compiler.reset()


def case(rng, op):
    """A small table for an op, without poison: opcheck compares values."""
    table = random_case(rng, OPS[op], SHAPES, 3).table
    place = zip(table.tensor_ids, table.row_offsets, table.col_offsets, table.global_cols, strict=True)
    return [x.contiguous() for x in table.x], table.v, table.n, [number for row in place for number in row]


def activations(op, backend):
    v, b = noise.to_grid(torch.randn(3, 10)).half(), torch.randn(7, 3)
    where = (-5, 77, 2, torch.tensor([[3, 0], [4, 1]]), torch.randn(2))
    if op == "lowrank_embedding_":
        return torch.randn(6, 10), torch.randint(7, (6,)), v, b, *where, torch.rand(1), backend
    return torch.randn(6, 7), torch.randn(6, 10), v, b, *where, False, torch.rand(1), torch.randn(2, 7), backend


def points(backend):
    directions, scales = torch.tensor([0, 1, 2, 1, 0, 2]), torch.randn(6)
    factors = torch.randn(3, 10), torch.randn(3, 7), torch.randn(3, 2, 7)
    return torch.randn(6, 7), torch.randn(6, 10), *factors, directions, scales, False, torch.rand(1), backend


def arguments(rng, op, backend, rounding, law=()):
    if op in ("lowrank_linear_", "lowrank_embedding_"):
        return activations(op, backend)
    if op == "lowrank_points_":
        return points(backend)
    if op == "factor":
        return -5, 9, 3, 77, 4, 1, noise.STREAMS["V"], 2, torch.device("cpu"), backend
    xs, v, n, place = case(rng, op)
    if op == "resample_":
        return xs, v, n, place, -5, 7, backend
    draws = 1 if "merge" in op or "signed" in op else 2
    scales = torch.randn(3 if "signed" in op else draws, 2)
    update = (-5, torch.tensor([3, 4][:draws]), [0, 1][:draws], scales, torch.rand(2))
    update += (torch.tensor(6) if rounding else None, 1, backend)
    momentum = (torch.randn(2, 2), torch.randn(2), torch.rand(2)) if "momentum" in op else ()
    factors = () if v is None else (v,)
    out = ([torch.zeros_like(x) for x in xs],) if "merge" in op else ()
    return (*out, xs, *factors, *(() if n is None else (n,)), place, *update, *momentum, *law)


@pytest.mark.parametrize(
    "op",
    [
        *("lowrank_update_", "dense_update_", "lowrank_momentum_", "dense_momentum_", "resample_", "factor"),
        *("lowrank_signed_update_", "factor_update_", "factor_momentum_", "lowrank_merge_", "dense_merge_"),
        *("lowrank_linear_", "lowrank_embedding_", "lowrank_points_"),
    ],
)
def test_opcheck(rng, any_backend, op):
    for rounding in (False, True):
        torch.library.opcheck(getattr(TORCH_OPS, op).default, arguments(rng, op, any_backend.name, rounding), test_utils=TESTS)


@pytest.mark.parametrize("op", ["dense_update_", "dense_momentum_", "dense_merge_"])
def test_opcheck_with_a_law(rng, any_backend, op):
    torch.library.opcheck(getattr(TORCH_OPS, op).law, arguments(rng, op, any_backend.name, True, ("rademacher",)), test_utils=TESTS)


def test_weights_that_require_grad(rng, any_backend):
    x = torch.nn.Parameter(torch.randn(1, 4, 8))
    call = (0, torch.tensor([3]), [0], torch.ones(1, 1), None, None, 0, any_backend.name)
    with torch.no_grad():
        torch.library.opcheck(
            TORCH_OPS.dense_update_.default, ([x], [1, 0, 0, 8], *call), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("law", noise.LAWS)
@pytest.mark.parametrize("op", ["lowrank_update_", "dense_update_", "lowrank_momentum_", "dense_momentum_", "resample_"])
def test_compiled_call_gives_the_same_bits(rng, op, law, compiler):
    ours = random_case(rng, OPS[op], SHAPES, 3, call={"law": law})
    ours.call["seed"] |= 1 << 63
    expected = ours.on()
    expected.run(None)
    torch.compile(lambda: ours.run(None), backend=compiler, fullgraph=True)()
    assert_same(ours, expected)


def test_compiled_factor():
    make = torch.compile(lambda: ops.factor(5, 9, 3, 77, Draw(2, 1), stream="V", row_offset=4), backend="aot_eager", fullgraph=True)
    assert torch.equal(make(), noise.factor(5, 9, 3, 77, 2, stream="V", row_offset=4, direction=1))


@pytest.mark.parametrize("op", ["factor_update_", "lowrank_merge_", "dense_merge_"])
def test_compiled_merge_gives_the_same_bits(rng, op):
    for law in noise.LAWS:
        ours = random_case(rng, OPS[op], SHAPES, 3, call={"draws": 1, "stochastic": False, "law": law}, apart=True)
        ours.call["seed"] |= 1 << 63
        expected = ours.on()
        expected.run(None)
        torch.compile(lambda ours=ours: ours.run(None), backend="aot_eager", fullgraph=True)()
        assert_same(ours, expected)


def test_a_probed_layer_is_compiled_once(rng):
    """Draws and scales are tensors: what they hold may change."""
    layer = torch.nn.Linear(10, 7)
    v, b = noise.to_grid(torch.randn(3, 10)).half(), torch.randn(7, 3)

    def probed(x, draws, scales):
        y = layer(x)
        skinny.lowrank_linear_(y, x, v, b, seed=1 << 63, tensor_id=5, draws=draws, scales=scales)
        return y.square().sum()

    compiled = torch.compile(probed, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for i in range(3):
            call = (torch.randn(6, 10), torch.tensor([[i, 0], [i, 1]]), torch.randn(2))
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                assert torch.allclose(compiled(*call), probed(*call), rtol=1e-5)


def test_ops_inside_a_compiled_function_see_each_other(rng):
    """Reads before and after the op, in one graph: the mutation is not reordered."""
    x, ids = torch.randn(1, 4, 8), [3]
    before = x.clone()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x):
        first = x.sum()
        ops.dense_update_(TensorTable([x], ids), seed=1, draws=[Draw(0)], scales=0.5)
        return first, x.sum()

    first, second = step(x)
    ops.dense_update_(TensorTable([before], ids), seed=1, draws=[Draw(0)], scales=0.5)
    assert torch.equal(as_bits(x), as_bits(before))
    assert torch.equal(second, x.sum()) and not torch.equal(first, second)


def test_packed_tables_are_reused(rng):
    from lozo_kernels.kernels import torch_ops as library

    x = torch.randn(1, 4, 8)
    call = (0, torch.tensor([3]), [0], torch.ones(1, 1), None, None, 0, "")
    for _ in range(2):
        TORCH_OPS.dense_update_([x], [1, 0, 0, 8], *call)
    held = [packed for packed in library._packed.values() if packed]
    assert held and not any(isinstance(value, TensorTable) for packed in held for value in packed.values())


def test_a_step_of_a_compiled_model(rng):
    """The weights of a compiled model change in place under its guards."""
    torch.manual_seed(rng.getrandbits(32))
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    twin = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    twin.load_state_dict(model.state_dict())
    data = torch.randn(16, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first, second = LOZO(model, lr=1e-2, rank=2), LOZO(twin, lr=1e-2, rank=2)
    for _ in range(3):
        first.step(lambda: compiled(data).square().mean())
        second.step(lambda: twin(data).square().mean())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_backends_by_name(rng):
    assert choose_backend("cpu", "eager").backend.name == "eager"
    x = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="no backend 'nope'"):
        TORCH_OPS.dense_update_([x], [1, 0, 0, 8], 0, torch.tensor([3]), [0], torch.ones(1, 1), None, None, 0, "nope")
