"""Tables on the device are built in the first steps of a run, and none after them: each is a blocking upload."""

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, SubZero
from lozo_kernels.kernels.backends import launches
from lozo_kernels.kernels.backends.eager import EagerBackend
from lozo_kernels.kernels.backends.launches import DeviceTable
from lozo_kernels.kernels.registry import registered

pytest.importorskip("triton")
host = pytest.importorskip("bench.host")
accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(1))


class Preparing(EagerBackend):
    """Computes on the CPU, and prepares every launch as the Triton backend does."""

    name = "preparing"

    def __init__(self):
        self._gpu = host.TritonBackend(host.NoLaunch())

    def run(self, op, table, call):
        self._gpu.run(op, table, call)
        super().run(op, table, call)

    def resample_(self, table, seed, window, reproject):
        self._gpu.resample_(table, seed, window, reproject)
        super().resample_(table, seed, window, reproject)

    def lowrank_linear_(self, call):
        self._gpu.lowrank_linear_(call)
        super().lowrank_linear_(call)

    def lowrank_embedding_(self, call):
        self._gpu.lowrank_embedding_(call)
        super().lowrank_embedding_(call)

    def lowrank_points_(self, call):
        self._gpu.lowrank_points_(call)
        super().lowrank_points_(call)


@pytest.fixture
def built(monkeypatch):
    """Counts what is built and uploaded: tables, and lists of tiles."""
    made = []
    make, tiles = DeviceTable.__init__, launches._tiles

    def count(self, *args, **more):
        made.append("table")
        make(self, *args, **more)

    monkeypatch.setattr(DeviceTable, "__init__", count)
    monkeypatch.setattr(launches, "_tiles", lambda *args: made.append("tiles") or tiles(*args))
    with registered(Preparing()):
        yield made


def opt():
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.OPTForCausalLM(config).eval()


def each_loss(model, tokens):
    logits = model(input_ids=tokens).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def built_by_step(built, optimizer, step, steps=5):
    counts = []
    for _ in range(steps):
        before = len(built)
        step()
        counts.append(len(built) - before)
    assert optimizer.steps_done == steps
    return counts


def take(built, method, model=None, **options):
    model = opt() if model is None else model
    if method is not MeZO:  # the first merge, or the first N that is carried to another V, is in the second step
        options["interval"] = 1 if options.get("placement") == "probe" or options.get("momentum") else 2
    optimizer = method(model, lr=1e-3, eps=1e-2, backend="preparing", **options)
    inputs = {"inputs": TOKENS} if options.get("evaluation") == "batched" else {}
    closure = (lambda tokens: each_loss(model, tokens)) if inputs else lambda: model(input_ids=TOKENS, labels=TOKENS).loss
    counts = built_by_step(built, optimizer, lambda: optimizer.step(closure, **inputs))
    assert sum(counts[:2])
    return counts[2:]


IN_PLACE = [
    (LOZO, {"rank": 2}),
    (LOZO, {"rank": 2, "fuse_steps": True, "weight_decay": 0.1}),
    (LOZO, {"rank": 2, "momentum": 0.9}),
    (LOZO, {"rank": 2, "directions": 3}),
    (LOZO, {"rank": 2, "rounding": "stochastic"}),
    (MeZO, {}),
    (MeZO, {"momentum": 0.9}),
    (SubZero, {"rank": 2}),
    (SubZero, {"rank": 2, "momentum": 0.9, "directions": 2}),
]
PROBES = [
    (LOZO, {"rank": 2, "side": "activation"}),
    (LOZO, {"rank": 2, "side": "scratch", "weight_decay": 0.1}),
    (LOZO, {"rank": 2, "side": "copy", "momentum": 0.9}),
    (LOZO, {"rank": 2, "rounding": "stochastic"}),
    (MeZO, {"momentum": 0.9}),
    (SubZero, {"rank": 2, "side": "scratch"}),
    (SubZero, {"rank": 2, "side": "copy"}),
]


@pytest.mark.parametrize(("method", "options"), IN_PLACE, ids=str)
def test_in_place(built, method, options):
    assert take(built, method, **options) == [0] * 3


@pytest.mark.parametrize(("method", "options"), PROBES, ids=str)
def test_a_probe(built, method, options):
    assert take(built, method, placement="probe", **options) == [0] * 3


@pytest.mark.parametrize("side", ["activation", "scratch", "copy"])
@pytest.mark.parametrize("directions", [1, 3, 8])
def test_batched(built, directions, side):
    settings = {"rank": 2, "placement": "probe", "evaluation": "batched", "directions": directions}
    assert take(built, LOZO, side=side, **settings) == [0] * 3


def test_batched_on_one_side_of_the_weights(built):
    settings = {"rank": 2, "placement": "probe", "evaluation": "batched", "directions": 4, "two_sided": False}
    assert take(built, LOZO, **settings) == [0] * 3
    assert take(built, MeZO, placement="probe", evaluation="batched", directions=3) == [0] * 3


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize(("method", "options"), [
    (LOZO, {"rank": 2, "side": "scratch"}),
    (LOZO, {"rank": 2, "side": "activation"}),
    (MeZO, {}),
    (MeZO, {"momentum": 0.9}),
], ids=str)  # fmt: skip
def test_offloaded(built, tmp_path, method, options, where):
    """Weights are elsewhere in every forward. The window lasts, since a merge reads each weight where it is then."""
    model = opt()
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    optimizer = method(
        model, lr=1e-3, eps=1e-2, backend="preparing", placement="probe", **({} if method is MeZO else {"interval": 100}), **options
    )
    counts = built_by_step(built, optimizer, lambda: optimizer.step(lambda: model(input_ids=TOKENS, labels=TOKENS).loss))
    assert sum(counts[:2]) and counts[2:] == [0] * 3
