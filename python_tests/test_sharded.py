"""Weights in shards, moved in place: two, three and five processes on the CPU. This file is also what they run."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from lozo_kernels import AGZO, LOZO, MeZO, SubZero, patch
from python_tests.models import full, same, weights
from python_tests.processes import refusals_of, run_ranks

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch.distributed or its gloo backend is missing", allow_module_level=True)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from python_tests.test_probe_fsdp import Model, closure

STEPS = 5
CASES = {
    "lozo": (LOZO, {"rank": 2, "interval": 2}),
    "lozo-m": (LOZO, {"rank": 2, "interval": 2, "momentum": 0.9}),
    "mezo": (MeZO, {}),
    "mezo-m": (MeZO, {"momentum": 0.9}),
    "decay, directions": (LOZO, {"rank": 3, "interval": 3, "weight_decay": 0.1, "directions": 3}),
    "one-sided, eager": (LOZO, {"rank": 2, "two_sided": False, "backend": "eager"}),
    "stochastic rounding": (LOZO, {"rank": 2, "rounding": "stochastic", "dtype": torch.bfloat16, "lr": 0.1}),
    "mezo, stochastic rounding": (MeZO, {"rounding": "stochastic", "dtype": torch.bfloat16, "lr": 0.1}),
}


class Parallel(nn.Module):
    """Layers that tensor parallelism cuts by rows and by columns; sizes that two and three processes do not divide."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.rest = nn.Linear(6, 10), nn.Linear(10, 5, bias=False), nn.Linear(5, 4)

    def forward(self, x):
        return self.rest(self.down(torch.tanh(self.up(x))))


def run(optimizer, model, loss):
    losses = [float(optimizer.step(loss)) for _ in range(STEPS)]
    loss()  # after which FSDP keeps the root's weights whole
    assert len(optimizer.handle.report().parameters) == len(optimizer.handle.names)
    state = optimizer.state_dict()
    optimizer.handle.restore()
    return {"losses": losses, "weights": {name: full(p) for name, p in model.state_dict().items()}, "steps": state["step"]}


def fully(model, mesh):
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    return model


def move(model, options):
    """Passes with given projected gradients, over three windows."""
    handle = patch(model, interval=2, seed=5, **options)
    handle.enable_momentum()
    for step in range(STEPS):
        handle.perturb_(step, 0.1)
        handle.shift_(step, (0, 0.1), (0, -0.1))
        handle.update_(step, 0.7 - step, 0.05, weight_decay=0.1, beta=0.8, applied=-0.1)
    handle.restore()
    return {name: full(p) for name, p in model.state_dict().items()}


def work(rank, ranks, folder):
    """What one process does."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    mesh, results = init_device_mesh("cpu", (ranks,)), {}
    for name, (kind, options) in CASES.items():
        options = {"lr": 1e-2, "eps": 1e-2} | options
        dtype = options.pop("dtype", torch.float32)
        torch.manual_seed(3)
        plain = Model().to(dtype)
        sharded = fully(copy.deepcopy(plain), mesh)
        shapes = {n: tuple(p.to_local().shape) for n, p in sharded.named_parameters()}
        found = run(kind(sharded, **options), sharded, closure(sharded))
        results[name] = {"sharded": found, "plain": run(kind(plain, **options), plain, closure(plain)), "shapes": shapes}
    for rank_of in (2, 4):
        torch.manual_seed(4)
        plain = Parallel()
        cut = copy.deepcopy(plain)
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(cut, mesh, plan)
        shapes = {
            n: (tuple(p.shape), tuple((p.to_local() if hasattr(p, "to_local") else p).shape)) for n, p in cut.named_parameters()
        }
        options = {"rank": rank_of}
        results["tensor parallel", rank_of] = {"sharded": move(cut, options), "plain": move(plain, options), "shapes": shapes}
    results["refused"] = refusals(mesh)
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def refusals(mesh):
    sharded = fully(Model(), mesh)
    experts = nn.Module()
    experts.w = nn.Parameter(distribute_tensor(torch.randn(2, 3, 4), mesh, [Shard(2)]))
    return refusals_of(
        lambda: SubZero(sharded),
        lambda: AGZO(sharded),
        lambda: LOZO(sharded, fuse_steps=True),
        lambda: LOZO(sharded, drive="backward"),
        lambda: patch(experts),
    )


@pytest.fixture(scope="module", params=[2, 3, 5])
def results(request, tmp_path_factory):
    return run_ranks(__file__, request.param, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_run_has_the_bits_of_one_process(name, results):
    for result in results:
        sharded, plain = result[name]["sharded"], result[name]["plain"]
        assert sharded["losses"] == plain["losses"]
        assert same(sharded["weights"], plain["weights"])
    torch.manual_seed(3)
    start = weights(Model().to(CASES[name][1].get("dtype", torch.float32)))
    assert all(not torch.equal(p, plain["weights"][key]) for key, p in start.items())


@pytest.mark.parametrize("rank_of", [2, 4])
def test_tensor_parallel_weights_have_the_bits_of_whole_ones(rank_of, results):
    """Rows of one layer, columns of the next; the momentum is carried into new V of which each process has some columns."""
    for result in results:
        found = result["tensor parallel", rank_of]
        assert same(found["sharded"], found["plain"])
        (rows, here), (columns, there) = found["shapes"]["up.weight"], found["shapes"]["down.weight"]
        assert here[0] < rows[0] and here[1] == rows[1] and there[1] < columns[1] and there[0] == columns[0]


def test_some_shards_are_uneven_or_empty(results):
    shapes = [result["lozo"]["shapes"] for result in results]
    assert any(0 in s["blocks.0.gate.weight"] for s in shapes)
    assert len({s["head.bias"] for s in shapes} | {s["embed.weight"] for s in shapes}) > 1


def test_what_cannot_be_done_is_refused(results):
    for result in results:
        subzero, agzo, fused, driven, experts = result["refused"]
        assert "nothing with SubZero" in subzero and "inputs of whole layers" in agzo and "fuse_steps" in fused
        assert "not for sharded models" in driven and "contiguous shards of dimension 0" in experts


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
