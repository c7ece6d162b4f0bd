"""torch's global defaults, dtype and device, belong to the user: they change no bit of a run and crash nothing."""

import ast
import contextlib
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import lozo_kernels
from lozo_kernels import LOZO, Draw, MeZO, SubZero, TensorTable, capture_step, choose_backend, noise, ops
from lozo_kernels.journal import Journal, replay

PACKAGE = Path(lozo_kernels.__file__).parent
MAKERS = {"arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "normal", "ones", "rand", "randint", "randn"}
MAKERS |= {"randperm", "tensor", "zeros"}
DEFAULTS = [("cpu", torch.bfloat16), ("cpu", torch.float64), ("meta", torch.float32), ("meta", torch.float16)]


@contextlib.contextmanager
def defaults(device, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def test_every_tensor_that_is_made_says_its_dtype_and_device():
    missing = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch":
                said = {keyword.arg for keyword in node.keywords}
                if node.func.attr in MAKERS and None not in said and not {"dtype", "device"} <= said:
                    missing.append(f"{file.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert not missing


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 3))


def run(kind, steps, **options):
    """Builds model and data on plain defaults, and returns the weights and c of some steps."""
    model, ids, labels = make(), torch.arange(6) % 11, torch.arange(6) % 3

    def start():
        optimizer = kind(model, lr=1e-2, eps=0.1, seed=5, **options)
        found = []
        for _ in range(steps):
            optimizer.step(lambda: nn.functional.cross_entropy(model(ids), labels))
            found.append(optimizer.info.c)
        state = optimizer.state_dict()
        optimizer.handle.restore()
        return [*found, *model.state_dict().values(), *state.get("momentum", {}).values()]

    return start


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"directions": 2, "two_sided": False}, {"fuse_steps": True}], ids=str)
@pytest.mark.parametrize("placement", ["inplace", "activation", "scratch"])
@pytest.mark.parametrize("kind", [LOZO, MeZO, SubZero])
def test_steps_under_other_defaults(kind, placement, options):
    if placement != "inplace":
        options = {"placement": "probe", "side": placement, **options}
        options.pop("fuse_steps", None)
    want = run(kind, 4, interval=2, **options)()
    for default in DEFAULTS:
        start = run(kind, 4, interval=2, **options)
        with defaults(*default):
            got = start()
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True)), default


@pytest.mark.parametrize("name", ["native", "eager", "triton"])
@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_factors_and_ops_of_every_backend(name, default, monkeypatch):
    if name == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend = choose_backend("cpu", name).backend
    stored = torch.randn(1, 33, 24)

    def work():
        factors = [ops.factor(3, 17, rank, 5, Draw(2, 1), stream=s, backend=backend) for s, rank in itertools.product("UV", (1, 6))]
        factors += [noise.dense(3, 100, 5, 2), noise.rounding_bits(3, 100, 5, 2).to(torch.int64)]
        v, n = torch.zeros(1, 4, 24, dtype=torch.float16, device="cpu"), torch.zeros(1, 33, 4, dtype=torch.float32, device="cpu")
        table = TensorTable([stored.clone()], [7], v=[v], n=[n])
        ops.resample_(table, seed=3, window=1, backend=backend)
        ops.lowrank_momentum_(
            table, seed=3, draws=[Draw(2)], scales=0.1, coefficients=0.5, alpha=-0.1, beta=0.9, decay=0.99, backend=backend
        )
        return [*factors, *table.x, *table.v, *table.n]

    want = work()
    with defaults(*default):
        got = work()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_a_journal_and_a_captured_step(default, tmp_path):
    model, again = make(), make()
    ids, labels = torch.arange(6) % 11, torch.arange(6) % 3
    with defaults(*default):
        optimizer = LOZO(model, lr=1e-2, eps=0.1, momentum=0.9)
        Journal.create(tmp_path / "run.journal", optimizer)
        step = capture_step(optimizer, lambda: nn.functional.cross_entropy(model(ids), labels))
        for _ in range(3):
            step()
        optimizer.journal.finish()
        replay(again, tmp_path / "run.journal")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
