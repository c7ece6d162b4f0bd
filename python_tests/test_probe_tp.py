"""Probes of tensor-parallel models, by two and three processes on the CPU. This file is also what they run."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from lozo_kernels import LOZO, MeZO, Parallel, patch
from lozo_kernels.model.probe.choosing import preparation
from lozo_kernels.model.probe.choosing.cost import Costs, measure_costs
from python_tests.models import full, losses_of, same
from python_tests.processes import refusals_of, run_ranks

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch.distributed or its gloo backend is missing", allow_module_level=True)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

STEPS, TOKENS = 5, 11
WHOLE = Replicate()
PLANS = {
    "rows, columns": {
        "embed": RowwiseParallel(input_layouts=WHOLE),
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(),
        "gate": ColwiseParallel(output_layouts=WHOLE),  # one row, which not every process can have
        "head": ColwiseParallel(output_layouts=WHOLE),
    },
    "columns, rows": {
        "embed": ColwiseParallel(output_layouts=WHOLE),
        "up": RowwiseParallel(input_layouts=WHOLE),
        "head": RowwiseParallel(input_layouts=WHOLE),
    },
    "sequence": {
        "embed": RowwiseParallel(input_layouts=WHOLE, output_layouts=Shard(1), use_local_output=False),
        "norm": SequenceParallel(use_local_output=False),
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "gate": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(1), use_local_output=False),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=WHOLE),
    },
}
MOVES = {
    "activation of 2": (2, "rows, columns", {"side": "activation"}),
    "scratch, sequence": (2, "sequence", {"side": "scratch"}),
    "activation": (3, "rows, columns", {"side": "activation"}),
    "activation, eager": (3, "columns, rows", {"side": "activation", "backend": "eager", "rank": 3}),
    "activation, sequence": (3, "sequence", {"side": "activation"}),
    "scratch": (3, "rows, columns", {"side": "scratch"}),
    "stochastic rounding": (3, "rows, columns", {"side": "scratch", "rounding": "stochastic", "dtype": torch.bfloat16}),
}
RUNS = {
    "activation": (2, {"side": "activation"}),
    "batched": (2, {"side": "activation", "evaluation": "batched", "directions": 2}),
    "scratch, momentum": (3, {"side": "scratch", "momentum": 0.9}),
    "momentum, decay": (3, {"side": "activation", "momentum": 0.9, "weight_decay": 0.1}),
}


class Model(nn.Module):
    """Sizes that two and three processes do not divide; four rows that three processes share as 2, 2 and 0."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.up, self.down, self.gate, self.head = nn.Linear(4, 10), nn.Linear(10, 4), nn.Linear(4, 1), nn.Linear(4, 7)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.down(torch.tanh(self.up(self.norm(x)))) * torch.sigmoid(self.gate(x))
        return self.head(x)


def models(plan, mesh, dtype=torch.float32):
    torch.manual_seed(3)
    plain = Model().to(dtype)
    for p in plain.parameters():
        nn.init.normal_(p, std=0.4)
    cut = parallelize_module(copy.deepcopy(plain), mesh, PLANS[plan])
    return tied(plain, plan), tied(cut, plan)


def tied(model, plan):
    """With one weight for embedding and head, where both have rows of it."""
    if plan == "rows, columns":
        model.head.weight = model.embed.weight
    return model


def batch():
    return torch.randint(0, 7, (4, TOKENS + 1), generator=torch.Generator().manual_seed(1))


def weights(model):
    return {name: full(p) for name, p in model.state_dict().items()}


def move(model, options):
    """Steps with given projected gradients, over three windows; the model at points of the last; and what it then is."""
    handle = patch(model, placement="probe", interval=2, seed=5, **({"rank": 2} | options))
    tokens, losses = batch(), losses_of(model)
    handle.prepare(lambda: losses(tokens).mean())
    handle.enable_momentum()
    for step in range(STEPS):
        handle.perturb_(step, 0.1)
        handle.shift_(step, (0, 0.1), (0, -0.1))
        handle.update_(step, 0.7 - step, 0.05, weight_decay=0.1, beta=0.8, applied=-0.1)
    handle.perturb_(STEPS - 1, 0.3)
    found = {"logits": full(model(tokens))}
    perturbed = {n: torch.empty(p.shape, dtype=p.dtype) for n, p in zip(handle.names, handle.parameters, strict=True)}
    for name, out in perturbed.items():
        handle.write_perturbed(name, out)
    handle.rest_()
    found |= {"perturbed": perturbed, "notes": handle.notes, "b": {m.name: m.b.clone() for m in handle.members}}
    found["sides"] = {p.name: p.side for p in handle.report().parameters}
    handle.restore()
    found["weights"] = weights(model)
    return found


def gradients(mesh=None):
    """Of a probed model's outputs, and the outputs, in a graph and out of it."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4), nn.Linear(4, 3, bias=False))
    if mesh is not None:
        plan = [
            RowwiseParallel(input_layouts=WHOLE),
            ColwiseParallel(use_local_output=False),
            RowwiseParallel(),  # whose outputs are on their way when the last layer, which is in one piece, is given them
        ]
        parallelize_module(model, mesh, dict(zip("013", plan, strict=True)))
    handle, tokens = patch(model, placement="probe", side="activation"), batch()
    handle.prepare(lambda: model(tokens).square().mean())
    handle.perturb_(0, 0.2)
    outputs = model(tokens)
    outputs.square().mean().backward()
    with torch.no_grad():
        again = model(tokens)
    return {"outputs": full(outputs), "again": full(again)} | {name: full(p.grad) for name, p in model.named_parameters()}


def run(model, options, group=None):
    """Steps of an optimiser, and of another one that goes on in the middle of a window."""
    tokens, losses, values, state = batch(), losses_of(model), [], None
    together = (losses, tokens) if "evaluation" in options else (lambda: losses(tokens).mean(),)
    for steps in (3, STEPS - 3):
        parallel = {} if group is None else {"parallel": Parallel("examples", group=group)}
        settings = {"placement": "probe", "rank": 2, "interval": 2, "lr": 1e-2, "eps": 1e-2}
        optimizer = LOZO(model, **(settings | options | parallel))
        if state is not None:
            optimizer.load_state_dict(state)
        values += [float(optimizer.step(*together)) for _ in range(steps)]
        handle = optimizer.handle
        found = {"losses": values, "notes": handle.notes, "sides": {p.name: p.side for p in handle.report().parameters}}
        found["b"] = {m.name: m.b.clone() for m in handle.members if m.b is not None}
        state = optimizer.state_dict()
        handle.restore()
    return found | {"weights": weights(model)}


class Keeping(nn.Linear):
    """On some processes it looks past its parameter, as a kernel does that keeps an address, and misses a perturbed weight."""

    keeps = False

    def forward(self, x):
        return nn.functional.linear(x, self.kept if self.keeps else self.weight)


def differing(rank, mesh):
    """A run of processes that find their costs, and what is wrong with the probe, to be different."""
    costs = [Costs(1.0, 0.0, 1e-9, 0.0), Costs(1e-9, 0.0, 1e-6, 0.0), Costs(1e-9, 0.0, 1e-9, 0.0)]
    preparation.measure_costs = lambda *_: costs[rank]
    model = models("rows, columns", mesh)[1]
    last = Keeping(7, 7, bias=False)
    last.kept, last.keeps = last.weight.data, rank == 1
    try:
        return run(nn.Sequential(model, last), {})
    finally:
        preparation.measure_costs = measure_costs


def work(rank, ranks, folder):
    """What one process does."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    meshes, results = {n: DeviceMesh("cpu", list(range(n))) for n in (2, 3)}, {}
    groups = {n: distributed.new_group(list(range(n))) for n in (2, 3)}
    mesh = meshes[ranks]
    for name, (some, plan, options) in MOVES.items():
        if rank >= some:
            continue
        options = dict(options)
        plain, cut = models(plan, meshes[some], options.pop("dtype", torch.float32))
        shapes = {n: tuple((p.to_local() if hasattr(p, "to_local") else p).shape) for n, p in cut.named_parameters()}
        results["move", name] = {"plain": move(plain, options), "cut": move(cut, options), "shapes": shapes}
    for name, (some, options) in RUNS.items():
        if rank < some:
            plain, cut = models("rows, columns", meshes[some])
            results["run", name] = {"plain": run(plain, options), "cut": run(cut, options, groups[some])}
    results["differing"] = differing(rank, mesh)
    results["gradients"] = {"plain": gradients(), "cut": gradients(mesh)}
    results["refused"] = refusals(mesh)
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def refusals(mesh):
    cut, experts = models("rows, columns", mesh)[1], nn.Module()
    experts.w = nn.Parameter(distribute_tensor(torch.randn(2, 3, 4), mesh, [Shard(2)]))
    compiled, changed = (models("rows, columns", mesh)[1] for _ in range(2))
    compiled.compile(backend="eager")

    def changing(factor):
        optimizer = LOZO(changed, placement="probe")
        optimizer.step(lambda: losses_of(changed)(batch()).mean())
        optimizer.step(lambda: losses_of(changed)(batch()).mean() + changed.up.weight.detach().mul_(factor).numel())

    return refusals_of(
        lambda: MeZO(cut, placement="probe"),
        lambda: patch(experts, placement="probe"),
        lambda: patch(compiled, placement="probe").prepare(lambda: losses_of(compiled)(batch()).mean()),
        lambda: changing(1.001),
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(__file__, 3, tmp_path_factory.mktemp("tp"))


@pytest.mark.parametrize("name", MOVES)
def test_the_same_steps_give_the_bits_of_one_process(name, results):
    for result in results[: MOVES[name][0]]:
        plain, cut = result["move", name]["plain"], result["move", name]["cut"]
        for what in ("b", "perturbed", "weights"):
            assert same(cut[what], plain[what]), what
        assert cut["notes"] == ()


@pytest.mark.parametrize("name", MOVES)
def test_a_probe_computes_as_perturbed_weights_do(name, results):
    ranks, plan, options = MOVES[name]
    dtype = options.get("dtype", torch.float32)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    model = tied(Model().to(dtype), plan)
    for result in results[:ranks]:
        cut = result["move", name]["cut"]
        assert model.load_state_dict(cut["perturbed"], strict=False).missing_keys == ["head.weight"] * (plan == "rows, columns")
        torch.testing.assert_close(cut["logits"], full(model(batch())), **tolerance)


def test_processes_decide_alike(results):
    first = results[0]["differing"]
    assert first["notes"] == ("1.weight: the loss differed on the copy side; now inplace",)
    assert first["sides"]["0.up.weight"] == "scratch"  # as by the largest costs of any process
    for result in results[1:]:
        found = result["differing"]
        assert all(found[what] == first[what] for what in ("notes", "sides", "losses"))
        assert same(found["b"], first["b"]) and same(found["weights"], first["weights"])


def test_gradients_through_a_probe_are_those_of_one_process(results):
    for result in results:
        plain, cut = result["gradients"]["plain"], result["gradients"]["cut"]
        torch.testing.assert_close(cut, plain)
        torch.testing.assert_close(cut["again"], cut["outputs"])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_follows_that_of_one_process(name, results):
    first = results[0]["run", name]["cut"]
    for result in results[: RUNS[name][0]]:
        plain, cut = result["run", name]["plain"], result["run", name]["cut"]
        assert cut["losses"] == first["losses"] and same(cut["b"], first["b"]) and same(cut["weights"], first["weights"])
        assert cut["losses"] == pytest.approx(plain["losses"], abs=1e-5)
        torch.testing.assert_close(cut["weights"], plain["weights"], rtol=0, atol=1e-4)
        assert cut["notes"] == plain["notes"] == ()


def test_the_cases_are_what_they_are_meant_to_be(results):
    shapes = [result["move", "activation"]["shapes"] for result in results]
    assert [s["up.weight"][0] for s in shapes] == [4, 4, 2] and [s["gate.weight"][0] for s in shapes] == [1, 0, 0]
    assert [r["move", "activation, eager"]["shapes"]["up.weight"] for r in results] == [(10, 2), (10, 2), (10, 0)]
    rows, columns, sequence = sides = [
        results[0]["move", name]["cut"]["sides"] for name in ("activation", "activation, eager", "activation, sequence")
    ]
    assert {some[f"{layer}.weight"] for some in sides for layer in ("embed", "up", "down")} == {"activation"}
    assert {some[f"{layer}.bias"] for some in sides for layer in ("up", "down", "head")} == {"shift"}
    assert (
        rows["gate.weight"] == sequence["gate.weight"] == rows["norm.weight"] == "copy"
    )  # gate: its layer computes with all of it
    assert results[0]["move", "scratch"]["cut"]["sides"]["up.weight"] == "scratch" != columns["up.weight"]


def test_what_cannot_be_done_is_refused(results):
    for result in results:
        dense, experts, compiled, changed = result["refused"]
        assert "shards have no probe with MeZO" in dense and "contiguous shards of dimension 0" in experts
        assert "torch.compile" in compiled and "'up.weight' was changed during the evaluations" in changed


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
