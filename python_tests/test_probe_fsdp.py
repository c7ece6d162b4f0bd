"""Probes of models that FSDP shards, by two, three, four and five processes on the CPU. This file is also what they run."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from lozo_kernels import LOZO, MeZO, Parallel, patch
from python_tests.models import full, same
from python_tests.processes import refusals_of, run_ranks

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch.distributed or its gloo backend is missing", allow_module_level=True)
from itertools import starmap

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

RANKS, STEPS = 5, 5
MESHES = {"2": [0, 1], "3": [2, 3, 4], "2 x 2": [[0, 1], [2, 3]], "5": [0, 1, 2, 3, 4]}
CASES = {
    "activation": {"side": "activation"},
    "scratch": {"side": "scratch"},
    "activation, whole between forwards": {"side": "activation", "reshard": False},
    "scratch, whole between forwards": {"side": "scratch", "reshard": False},
    "eager": {"side": "auto", "backend": "eager"},
    "mixed precision": {"side": "scratch", "mixed": True},
    "mixed precision, activation": {"side": "activation", "mixed": True},
    "activation of 3": {"side": "activation", "mesh": "3"},
    "momentum, weight decay": {"side": "scratch", "momentum": 0.9, "weight_decay": 0.1, "mesh": "3"},
    "split": {"side": "activation", "split": True, "mesh": "3"},
    "replicas": {"side": "activation", "momentum": 0.9, "mesh": "2 x 2"},
    "momentum": {"side": "activation", "momentum": 0.9, "mesh": "5"},
    "stochastic rounding": {"side": "scratch", "dtype": torch.bfloat16, "rounding": "stochastic", "lr": 0.1, "mesh": "5"},
}


class Block(nn.Module):
    """Sizes that no number of processes divides."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down, self.gate = nn.LayerNorm(3), nn.Linear(3, 7), nn.Linear(7, 3), nn.Linear(3, 1)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x)))) * torch.sigmoid(self.gate(x))


class Model(nn.Module):
    """A tied embedding and head, blocks, a convolution and stacked experts."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(5, 3), nn.ModuleList([Block(), Block()])
        self.conv, self.experts = nn.Conv1d(3, 3, 3, padding=1), nn.Parameter(torch.randn(3, 3, 5) * 0.3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x) + torch.einsum("btd,edf->btf", x, self.experts)


def closure(model, part=0, parts=1):
    """The loss of some of the examples."""
    tokens = torch.randint(0, 5, (6, 9), generator=torch.Generator().manual_seed(1)).chunk(parts)[part]

    def loss():
        logits = model(tokens[:, :-1]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def run(model, loss, options):
    settings = {"placement": "probe", "rank": 2, "interval": 2, "lr": 1e-2, "eps": 1e-2, "backend": None}
    optimizer = LOZO(model, **(settings | options))
    losses = [float(optimizer.step(loss)) for _ in range(STEPS)]
    handle = optimizer.handle
    found = {
        "losses": losses,
        "b": {m.name: m.b.clone() for m in handle.members},
        "sides": {p.name: (p.side, p.note) for p in handle.report().parameters},
        "notes": handle.notes,
    }
    found["saved"] = {name: full(p) for name, p in model.state_dict().items()}
    after = loss()
    handle.restore()
    found["weights"] = {name: full(p) for name, p in model.state_dict().items()}
    with torch.no_grad():
        found["after"] = float(after), float(loss())
    return found


def shard(model, mesh, reshard=True, mixed=False):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    return model


def work(rank, folder):
    """What one process does: all cases whose mesh it is in."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    meshes = {name: torch.tensor(ranks) for name, ranks in MESHES.items()}
    groups = {name: distributed.new_group(ranks.flatten().tolist()) for name, ranks in meshes.items()}
    meshes = {name: DeviceMesh("cpu", ranks, mesh_dim_names=("r", "s")[-ranks.dim() :]) for name, ranks in meshes.items()}
    results = {}
    for name, case in CASES.items():
        options = dict(case)
        at = options.pop("mesh", "2")
        if meshes[at].get_coordinate() is None:
            continue
        dtype, split = options.pop("dtype", torch.float32), options.pop("split", False)
        how = {key: options.pop(key) for key in ("reshard", "mixed") if key in options}
        torch.manual_seed(3)
        plain = Model().to(dtype)
        sharded = shard(copy.deepcopy(plain), meshes[at], **how)
        local = {n: tuple(p.to_local().shape) for n, p in sharded.named_parameters()}
        part = (distributed.get_rank(groups[at]), groups[at].size()) if split else ()
        got = run(sharded, closure(sharded, *part), options | {"parallel": Parallel("examples", group=groups[at])})
        first = distributed.get_rank(groups[at]) == 0
        results[name] = {"plain": run(plain, closure(plain), options) if first else None, "sharded": got, "local": local}
    if meshes["2"].get_coordinate() is not None:
        results["refused"] = refusals(meshes["2"])
    results["written"] = written(meshes["5"])
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def refusals(mesh):
    split = nn.Module()
    split.w = nn.Parameter(distribute_tensor(torch.randn(2, 3, 4), mesh, [Shard(1)], src_data_rank=None))
    columns = fully_shard(nn.Linear(4, 4, bias=False), mesh=mesh, shard_placement_fn=lambda _: Shard(1))
    sharded = shard(Model(), mesh)
    return refusals_of(
        lambda: MeZO(sharded, placement="probe"),
        lambda: LOZO(split, placement="probe"),
        lambda: LOZO(columns, placement="probe"),
    )


def written(mesh):
    """Perturbed weights."""
    found = []
    torch.manual_seed(3)
    plain = Model()
    for model in (plain, shard(copy.deepcopy(plain), mesh)):
        handle = patch(model, placement="probe", side="scratch", backend="eager")
        handle.prepare(closure(model))
        handle.perturb_(0, 0.1)
        for name, shape in (("head.weight", (5, 3)), ("blocks.0.norm.weight", (3,)), ("blocks.1.gate.weight", (1, 3))):
            found.append(torch.empty(shape))
            handle.write_perturbed(name, found[-1])
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(__file__, RANKS, tmp_path_factory.mktemp("fsdp"))


def results_of(name, results):
    """Of the processes that took part in a case."""
    found = [result[name] for result in results if name in result]
    assert len(found) == torch.tensor(MESHES[CASES[name].get("mesh", "2")]).numel()
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_run_is_the_run_of_one_process(name, results):
    found = results_of(name, results)
    plain, sharded = found[0]["plain"], found[0]["sharded"]
    for other in found[1:]:
        assert sharded["losses"] == other["sharded"]["losses"] and sharded["sides"] == other["sharded"]["sides"]
        assert same(sharded["b"], other["sharded"]["b"]) and same(sharded["weights"], other["sharded"]["weights"])
    if "mixed" in CASES[name]:
        assert sharded["losses"] == pytest.approx(plain["losses"], rel=2e-2)
        assert {p.dtype for p in sharded["weights"].values()} == {torch.float32}
    elif "split" in CASES[name]:
        assert sharded["losses"] == pytest.approx(plain["losses"], abs=1e-6)
        for kind in ("saved", "weights", "b"):
            for key, value in plain[kind].items():
                torch.testing.assert_close(sharded[kind][key], value, rtol=0, atol=1e-5)
    else:
        assert sharded["losses"] == plain["losses"] and sharded["after"] == plain["after"]
        assert all(same(sharded[kind], plain[kind]) for kind in ("saved", "weights", "b"))
    assert sharded["notes"] == ()
    sides = {side for side, _ in sharded["sides"].values()}
    assert sides <= {"activation", "scratch", "shift"} and "scratch" in sides
    assert CASES[name]["side"] == "auto" or CASES[name]["side"] in sides


def test_the_cases_are_uneven(results):
    one, two = (found["local"] for found in results_of("scratch", results))
    assert one["blocks.0.gate.weight"] == (1, 3) and two["blocks.0.gate.weight"] == (0, 3)
    assert one["blocks.0.norm.weight"] == (2,) and two["blocks.0.norm.weight"] == (1,)
    assert one["experts"] == (2, 3, 5) and two["experts"] == (1, 3, 5)
    rows = [found["local"]["blocks.0.up.weight"][0] for found in results_of("momentum", results)]
    assert rows == [2, 2, 2, 1, 0]
    assert [found["local"]["conv.weight"][0] for found in results_of("replicas", results)] == [2, 1, 2, 1]
    torch.manual_seed(3)
    before = dict(Model().named_parameters())
    after = results[0]["scratch"]["sharded"]["weights"]
    assert all(not torch.equal(after[k], p) for k, p in before.items())


def test_what_cannot_be_done_is_refused(results):
    for result in results[:2]:
        dense, split, columns = result["refused"]
        assert "shards have no probe with MeZO" in dense
        assert "contiguous shards of dimension 0" in split and "Shard(dim=1)" in columns


def test_a_perturbed_weight_can_be_had(results):
    for result in results:
        plain, sharded = result["written"][:3], result["written"][3:]
        assert all(starmap(torch.equal, zip(plain, sharded, strict=True)))


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[3]))
