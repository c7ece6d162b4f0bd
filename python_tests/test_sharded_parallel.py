"""Sharded models on several processes: one loss for all, meshes of two dimensions, and momentum that any number can load."""

import copy

import pytest
import torch
from torch import distributed, nn

from lozo_kernels import LOZO, DivergenceError, MeZO, Parallel

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch.distributed or its gloo backend is missing", allow_module_level=True)

from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from python_tests.models import full
from python_tests.parallel_helpers import finish, logs, start
from python_tests.processes import refusals_of

STEPS, SAVED = 6, 3  # in two windows, and in the middle of one
METHODS = {
    "lozo-m": (LOZO, {"rank": 2, "interval": 4, "momentum": 0.9, "weight_decay": 0.1, "directions": 2}),
    "mezo-m": (MeZO, {"momentum": 0.9}),
}


class Linear(nn.Linear):
    """In fp64, so that the order of sums is lost when the loss is rounded to fp32."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.double()
        return nn.functional.linear(x.double(), self.weight.double(), bias)


class Model(nn.Module):
    """Sizes that two and three processes do not divide, but for what tensor parallelism needs, and fewer rows than processes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(8)
        self.up, self.down, self.gate = Linear(6, 12), Linear(12, 5, bias=False), Linear(5, 1)
        self.experts = nn.Parameter(torch.randn(3, 5, 4) * 0.3)

    def forward(self, x):
        h = self.down(torch.tanh(self.up(x)))
        return (h[:, None, None] @ self.experts.double() * torch.sigmoid(self.gate(h))[:, None, None]).square().mean().float()


def mesh_of(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :])


def examples(step, part):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + part))


def fully(model, mesh):
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def cut(model, mesh):
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def make(method, model, **more):
    kind, options = METHODS[method]
    return kind(model, lr=3e-2, eps=1e-2, seed=6, **options, **more)


def train(optimizer, model, steps, parts):
    """Steps whose loss is the mean of those of some examples."""
    for step in range(optimizer.steps_done, steps):
        batches = [examples(step, part) for part in parts]
        optimizer.step([lambda x=x: model(x) for x in batches])


def ended(optimizer, model):
    state = {name: full(s["momentum"]) for name, s in optimizer.state_dict()["state"].items()}
    optimizer.handle.restore()
    return {"weights": {name: full(p) for name, p in model.state_dict().items()}, "momentum": state, "c": optimizer.info.c}


def alone(method, parts):
    model = Model()
    optimizer = make(method, model)
    train(optimizer, model, STEPS, range(parts))
    return ended(optimizer, model)


def four(rank, ranks, folder):
    """Two replicas of two shards, by rows and tensor parallel."""
    mesh = mesh_of(2, 2)
    found = {}
    for method in METHODS:
        model = fully(Model(), mesh)
        optimizer = make(method, model)
        assert optimizer.parallel.mode == "examples"
        train(optimizer, model, STEPS, [rank])
        found[method, "rows"], traffic = ended(optimizer, model), optimizer.parallel.traffic
        model = cut(Model(), mesh["shard"])
        optimizer = make(method, model, parallel="examples")
        train(optimizer, model, STEPS, [rank // 2])  # both of a pair have all of its examples
        found[method, "tensor parallel"] = ended(optimizer, model)
    torch.save((found, traffic), folder / f"four-{rank}.pt")


def saving(rank, ranks, folder, shape):
    """Half of a run, saved by rows."""
    for method in METHODS:
        model = fully(Model(), mesh_of(*shape))
        optimizer = make(method, model)
        train(optimizer, model, SAVED, [0])
        state = optimizer.state_dict()
        checkpoint.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=folder / method)
        whole = {name: {"momentum": full(s["momentum"])} for name, s in state["state"].items()}
        weights = {name: full(p) for name, p in model.state_dict().items()}
        if rank == 0:
            torch.save({"model": weights, "optimizer": state | {"state": whole}}, folder / f"{method}.pt")


def going_on(rank, ranks, folder):
    """The other half on other shards, from a checkpoint in shards and from one in one piece."""
    mesh, found = mesh_of(ranks), {}
    for method in METHODS:
        model = fully(Model(), mesh)
        optimizer = make(method, model)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.load(state, checkpoint_id=folder / method)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        assert optimizer.steps_done == SAVED
        train(optimizer, model, STEPS, [0])
        found[method, "shards"] = ended(optimizer, model)
        pieces = torch.load(folder / f"{method}.pt")
        plain = Model()
        plain.load_state_dict(pieces["model"])
        model = cut(plain, mesh)
        optimizer = make(method, model)
        optimizer.load_state_dict(pieces["optimizer"])
        train(optimizer, model, STEPS, [0])
        found[method, "one piece"] = ended(optimizer, model)
    torch.save(found, folder / f"on-{rank}.pt")


def diverging(rank, ranks, folder):
    """Shards that differ between replicas at the start, in a sampled element, and in one that is only compared now and then."""
    mesh, said = mesh_of(2, 2), []
    for change, at in ((True, None), (True, 2), (False, None)):
        model = fully(Model(), mesh)
        if change and at is None and rank == 3:
            model.down.weight.detach().to_local().mul_(1.001)
        try:
            optimizer = make("lozo-m", model, parallel=Parallel(check_every=2))
            for step in range(4):
                if rank == 1 and step == at:
                    model.up.weight.detach().to_local().mul_(1.001)
                train(optimizer, model, step + 1, [rank])
            said.append(None)
        except (ValueError, DivergenceError) as error:
            said.append(f"{type(error).__name__}: {error}")
    torch.save(said, folder / f"said-{rank}.pt")


def partly(rank, ranks, folder):
    """Trained beside a frozen base in shards, a loss in shards, and groups that do not fit the shards."""
    mesh, found = mesh_of(2, 2), {}
    model = Model()
    model.up.requires_grad_(False)
    fully_shard(model.up, mesh=mesh)
    optimizer = make("lozo-m", model)
    train(optimizer, model, STEPS, [rank])
    found["c"], found["weights"] = optimizer.info.c, {name: full(p) for name, p in model.state_dict().items()}
    optimizer.handle.restore()

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = Linear(6, 12)

        def forward(self, x):
            return self.up(x).square().mean()

    model = parallelize_module(Loss(), mesh["shard"], {"up": ColwiseParallel(use_local_output=False)})
    optimizer = make("lozo-m", model, parallel="examples")
    found["loss"] = float(optimizer.step(lambda: model(torch.ones(2, 6))))
    found["said"] = refusals_of(
        lambda: make("lozo-m", fully(Model(), mesh), parallel=Parallel("examples", group=mesh["shard"].get_group())),
        lambda: make("lozo-m", cut(Model(), mesh["shard"])),
        lambda: make("lozo-m", fully(Model(), mesh), parallel=Parallel("directions")),
    )
    torch.save(found, folder / f"partly-{rank}.pt")


def same(a, b):
    weights, momentum = a["weights"], a["momentum"]
    assert weights.keys() == b["weights"].keys() and momentum.keys() == b["momentum"].keys()
    return (
        torch.equal(a["c"], b["c"])
        and all(torch.equal(p, b["weights"][name]) for name, p in weights.items())
        and all(torch.equal(p.flatten(), b["momentum"][name].flatten()) for name, p in momentum.items())
    )


def test_two_replicas_of_two_shards_have_the_bits_of_one_process(tmp_path):
    assert finish(start(4, tmp_path, four)) == [0] * 4, logs(tmp_path)
    expected = {(method, way): alone(method, parts) for method in METHODS for way, parts in (("rows", 4), ("tensor parallel", 2))}
    for rank in range(4):
        found, traffic = torch.load(tmp_path / f"four-{rank}.pt", weights_only=False)
        assert found.keys() == expected.keys()
        for key, result in found.items():
            assert same(result, expected[key]), key
        assert max(traffic.sent, traffic.received) < 1000


@pytest.mark.parametrize(("shape", "others"), [((3,), 2), ((2, 2), 3)], ids=str)
def test_momentum_goes_on_in_other_shards(tmp_path, shape, others):
    ranks = torch.Size(shape).numel()
    assert finish(start(ranks, tmp_path, saving, shape)) == [0] * ranks, logs(tmp_path)
    assert finish(start(others, tmp_path, going_on)) == [0] * others, logs(tmp_path)
    for method in METHODS:
        expected = alone(method, 1)
        for rank in range(others):
            found = torch.load(tmp_path / f"on-{rank}.pt", weights_only=False)
            assert same(found[method, "shards"], expected) and same(found[method, "one piece"], expected)
        model = Model()  # and in one process
        optimizer = make(method, model)
        saved = torch.load(tmp_path / f"{method}.pt")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        train(optimizer, model, STEPS, [0])
        assert same(ended(optimizer, model), expected)


def test_what_is_trained_beside_shards_moves_alike(tmp_path):
    assert finish(start(4, tmp_path, partly)) == [0] * 4, logs(tmp_path)
    model = Model()
    model.up.requires_grad_(False)
    optimizer = make("lozo-m", model)
    train(optimizer, model, STEPS, range(4))
    optimizer.handle.restore()
    for rank in range(4):
        found = torch.load(tmp_path / f"partly-{rank}.pt")
        assert torch.equal(found["c"], optimizer.info.c)
        assert all(torch.equal(p, found["weights"][name]) for name, p in model.state_dict().items())
        assert found["loss"] > 0
        group, some, directions = found["said"]
        assert "is in shards on the ranks [0, 1, 2, 3]" in group and "has the ranks" in group
        assert "say which ranks take steps together" in some and "run each forward together" in directions


def test_replicas_that_differ_are_named(tmp_path):
    assert finish(start(4, tmp_path, diverging)) == [0] * 4, logs(tmp_path)
    for rank in range(4):
        before, during, never = torch.load(tmp_path / f"said-{rank}.pt")
        assert before.startswith("ValueError: the shard of down.weight on rank 3 differs")
        # Of two that differ, nobody knows which is right.
        assert during.startswith("DivergenceError") and "rank 3" in during and "step 1" in during
        assert never is None
