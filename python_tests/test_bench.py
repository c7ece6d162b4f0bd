"""bench: what it reports, when it refuses to, and how it turns times into figures. Nothing here asserts a time."""

from __future__ import annotations

import json
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import goals
from lozo_kernels import bench
from lozo_kernels.bench import clock, environment, memory, perturb, step, timing
from lozo_kernels.bench.batches import CausalBatch, TimedClosure
from lozo_kernels.bench.entrants import METHODS, Entrant, entrants
from lozo_kernels.kernels import ops

ROW = {"op", "dtype", "rank", "shape", "gbps", "host_us", "not_run", *(f"{column}_gbps" for column in perturb.COLUMNS)}
STEP_ROW = {"method", "placement", "dtype", "tokens", "step_ms", "two_forwards_ms", "reference_step_ms"}
TINY = ["perturb", "--shapes", "48x70", "--repeats", "2", "--peer-repeats", "1"]


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert bench.main([*TINY, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def mid_size() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.LayerNorm(1024), nn.Linear(1024, 4096), nn.Linear(4096, 1024)) for _ in range(2)])
    return model, torch.randn(8, 1024)


def test_a_command_names_no_folder_of_one_machine(tmp_path):
    words = ["--before", str(tmp_path), f"--output={tmp_path / 'a.json'}", "bench/results/b.json", "--lr=1e-3"]
    command = environment.environment(torch.device("cpu"), words)["command"]
    assert command == f"lozo-kernels bench --before {tmp_path.name} --output=a.json bench/results/b.json --lr=1e-3"


def test_perturb_rows(capsys):
    result = document(capsys, "--rank", "1,4")
    for key in ("device", "cpu", "threads", "isa", "versions", "commit", "command", "date", "cpus_used_by_others"):
        assert key in result
    assert result["command"].startswith("lozo-kernels bench perturb --shapes 48x70")
    rows = result["rows"]
    assert all(set(row) == ROW for row in rows)
    lowrank = {"lowrank_update", "lowrank_update_2", "lowrank_momentum", "lowrank_signed_update"}
    expected = {(op, d, r) for op in lowrank for d in ("bfloat16", "float32") for r in (1, 4)}
    expected |= {(op, d, None) for op in ("dense_update", "dense_update_signs") for d in ("bfloat16", "float32")}
    assert {(row["op"], row["dtype"], row["rank"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["shape"] == "48x70"
        assert (row["addmm_gbps"] is None) == (row["rank"] is None)
        assert all(row[c] >= 0 for c in ("gbps", "floor_gbps"))
        assert (row["reference_gbps"] is None) == (row["op"] == "lowrank_signed_update")  # no code was published
        assert row["floor_gbps"] == row["inplace_gbps"] and row["copy_gbps"] is None
        assert (row["foreach_gbps"] is None) == (row["op"] != "dense_update")
        if row["op"] not in ("lowrank_momentum", "lowrank_signed_update", "dense_update_signs"):
            assert row["compiled_gbps"] is None and "--compile" in row["not_run"]["compiled"]
    assert len(result["details"]) == len(rows)
    assert all(
        d["seconds"]["op"]["count"] == 2 and d["seconds"].get("reference", {"count": 1})["count"] == 1 for d in result["details"]
    )


def test_perturb_table_and_file(capsys, tmp_path):
    path = tmp_path / "perturb.json"
    assert bench.main([*TINY, "--rank", "2", "--dtype", "float16", "--output", str(path)]) == 0
    table = capsys.readouterr().out
    assert "of floor" in table and "lowrank_update_2" in table
    assert {row["dtype"] for row in json.loads(path.read_text())["rows"]} == {"float16"}


def test_products_of_a_high_rank_are_held_to_every_bit(capsys):
    assert {row["rank"] for row in document(capsys, "--rank", "17", "--dtype", "bfloat16")["rows"]} == {17, None}


@pytest.mark.parametrize("op", ["lowrank_update_", "dense_update_", "lowrank_momentum_", "resample_"])
def test_gate_turns_red(capsys, monkeypatch, op):
    right = getattr(ops, op)

    def wrong(table, **arguments):
        right(table, **arguments)
        broken = table.v if op == "resample_" else table.x
        flat = broken[-1].view(-1)
        flat[-1] = flat[-1] * 2 + 1

    monkeypatch.setattr(ops, op, wrong)
    assert bench.main([*TINY, "--rank", "2", "--dtype", "float32", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "differ from reference.py" in captured.err
    if op != "resample_":
        assert op.removesuffix("_") in captured.err.splitlines()[-1]


def test_gate_sees_wrong_momentum(capsys, monkeypatch):
    right = ops.lowrank_momentum_

    def wrong(table, **arguments):
        right(table, **arguments)
        table.n[0].add_(1e-7)

    monkeypatch.setattr(ops, "lowrank_momentum_", wrong)
    assert bench.main([*TINY, "--rank", "2", "--dtype", "bfloat16"]) == 1
    assert "lowrank_momentum bfloat16 rank 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["perturb", "--rank", "0"],
        ["perturb", "--rank", "1,65"],
        ["perturb", "--dtype", "float64"],
        ["perturb", "--shapes", "12"],
        ["perturb", "--shapes", "0x5"],
        ["perturb", "--shapes", "99999999x99999999"],
        ["perturb", "--model-shapes", "gpt-5"],
        ["perturb", "--repeats", "0"],
        ["perturb", "--repeats", "many"],
        ["perturb", "--threads", "-1"],
        ["perturb", "--device", "toaster"],
        ["perturb", "--device", "meta"],
        ["perturb", "--output", "no/such/folder/x.json"],
        ["perturb", "--colour", "red"],
        ["step", "--methods", "adam"],
        ["step", "--tokens", "0"],
        ["step", "--placement", "inplace,elsewhere"],
        ["memory", "--device", "meta"],
        ["memory", "--methods", "sgd"],
    ],
)
def test_bad_arguments_give_one_line(capsys, arguments):
    assert bench.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.err.startswith("lozo-kernels bench") and ": error: " in captured.err


def test_a_backend_that_cannot_serve_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("LOZO_KERNELS_BACKEND", "nothing")
    assert bench.main([*TINY]) == 2
    assert "no backend 'nothing'" in capsys.readouterr().err


def test_quantiles():
    assert timing.median([5.0]) == 5.0
    assert timing.median([4.0, 1.0, 3.0]) == 3.0
    assert timing.median([4.0, 1.0, 3.0, 2.0]) == 2.5
    assert timing.quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.25) == 2.0
    assert timing.quantile([0.0, 10.0], 1.0) == 10.0
    for values, q in (([], 0.5), ([1.0], 1.5)):
        with pytest.raises(ValueError, match="quantile"):
            timing.quantile(values, q)


def test_paired_ratio_ignores_rounds_that_one_did_not_join():
    assert timing.paired_ratio({0: 2.0, 2: 30.0, 4: 4.0}, {0: 1.0, 1: 7.0, 2: 10.0, 3: 7.0, 4: 2.0}) == 2.0


def test_interleave_times_each_call_in_its_round(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    order: list[str] = []

    def contender(name: str, seconds: float) -> timing.Contender:
        def call() -> None:
            order.append(name)
            now[0] += seconds

        return timing.Contender(call, 2 if name == "slow" else None, warm_up=name != "slow")

    seconds = timing.interleave({"fast": contender("fast", 1.0), "slow": contender("slow", 10.0)}, 6)
    assert seconds == {"fast": dict.fromkeys(range(6), 1.0), "slow": {2: 10.0, 5: 10.0}}
    assert order.count("fast") == 7
    assert timing.spread(seconds["slow"]) == {"count": 2, "min": 10.0, "q25": 10.0, "median": 10.0, "q75": 10.0}


def test_targets_are_judged_by_the_worst_case():
    details = [
        {"op": "lowrank_update", "dtype": "float32", "rank": rank, "ratios": {"floor": ratio}}
        for rank, ratio in ((1, 0.95), (2, 0.84), (4, 0.9), (8, 0.7))
    ]
    first, second = goals.judge_speed(details, "cpu")
    assert (first["target"], first["worst"], first["met"]) == (0.85, 0.84, False)
    assert goals.judge_speed(details[2:], "cpu")[0]["measured_ranks"] == [4]
    assert (second["target"], second["worst"], second["met"]) == (0.7, 0.7, True)
    assert [goals.describe(t).startswith("missed") for t in (first, second)] == [True, False]


def test_speed_counts_one_read_and_one_write():
    assert perturb.gbps(10**9, {0: 0.5, 1: 1.0, 2: 4.0}) == 2.0


def test_a_commit_is_claimed_only_inside_the_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_PACKAGE", tmp_path / "lozo_kernels")
    assert environment.commit() is None


def test_the_load_of_others_leaves_out_our_own(monkeypatch):
    readings = iter([(10.0, 4.0, 100.0), (16.0, 9.0, 104.0)])
    monkeypatch.setattr(environment.OtherLoad, "_read", staticmethod(lambda: next(readings)))
    assert environment.OtherLoad().mean() == 0.25


class Toy(nn.Module):
    """Takes and returns what a causal language model of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 16)
        self.head = nn.Linear(16, 1000)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> types.SimpleNamespace:
        logits = self.head(self.embed(input_ids))
        if labels is None:
            return types.SimpleNamespace(logits=logits)
        return types.SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()))


def test_step_rows():
    torch.manual_seed(0)
    toys = step.StepBench(Toy(), entrants(METHODS, ["inplace"]), rank=2)
    measured = toys.measure(CausalBatch(96, torch.device("cpu"), 2048), repeats=3, peer_repeats=1)
    assert [row["method"] for row, _ in measured] == list(METHODS)
    for row, detail in measured:
        assert set(row) | {"dtype", "tokens"} == STEP_ROW
        assert all(row[c] > 0 for c in ("step_ms", "two_forwards_ms", "reference_step_ms"))
        assert detail["seconds"]["step"]["count"] == 3
        assert detail["seconds"]["reference_step"]["count"] == 1


def test_where_memory_is_short_the_published_code_moves_the_model_at_rest():
    toy = Toy()
    before = toy.embed.weight.detach().clone()
    bench = step.StepBench(toy, [Entrant("lozo-fused")], rank=2, published_model=toy)
    ((row, _),) = bench.measure(CausalBatch(8, torch.device("cpu"), 2048), repeats=2, peer_repeats=1)
    assert row["method"] == "lozo-fused" and row["reference_step_ms"] > 0
    assert not torch.equal(before, toy.embed.weight)
    bench.close()
    assert not bench.models


@pytest.mark.parametrize("measurement", ["step", "memory"])
def test_commands_print_tables_and_documents(capsys, monkeypatch, measurement):
    monkeypatch.setattr(getattr(bench, measurement), "build_model", lambda name, dtype, device: Toy().to(device, dtype))
    arguments = [measurement, "--tokens", "16", "--dtype", "bfloat16", "--methods", "lozo,mezo", "--placement", "inplace,probe"]
    if measurement == "step":
        arguments += ["--repeats", "2", "--peer-repeats", "1"]
    assert bench.main(arguments) == 0
    table = capsys.readouterr().out
    assert table.count("lozo ") >= 1 and "mezo" in table
    assert bench.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["method"], r["placement"]) for r in rows] == [(m, p) for m in ("lozo", "mezo") for p in ("inplace", "probe")]
    if measurement == "step":
        assert all(set(row) == STEP_ROW for row in rows)


def test_a_step_is_charged_for_what_it_does_outside_its_forwards(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def forward() -> torch.Tensor:
        now[0] += 10.0
        return torch.zeros(())

    def take_step(closure: TimedClosure) -> None:
        closure()
        now[0] += 1.0
        closure()
        now[0] += 2.0

    closure = TimedClosure(forward)
    for _ in range(2):
        closure.step(types.SimpleNamespace(step=take_step))
    assert closure.shares() == pytest.approx([0.15, 0.15])


@pytest.mark.parametrize("method", ["lozo", "lozo-fused", "lozo-m", "mezo"])
def test_a_step_needs_less_than_a_hundredth_of_the_weights(mid_size, method):
    model, x = mid_size
    use = memory.measure_method(model, lambda m: m(x).square().mean(), Entrant(method), rank=4)
    assert use.weights == sum(p.numel() for p in model.parameters()) * 4
    assert use.persistent <= use.extra < 0.01 * use.weights
    factors = {"lozo": 1, "lozo-fused": 1, "lozo-m": 3, "mezo": 0}[method]  # V in fp16, N in fp32; as many rows as columns
    assert use.persistent >= factors * 2 * 4 * (2 * (1024 + 4096))
    if use.resident is not None:
        assert use.resident < 0.2 * use.weights  # no copy of the weights that torch's allocator does not see


def test_the_published_step_needs_whole_matrices(mid_size):
    model, x = mid_size
    use = memory.measure_method(model, lambda m: m(x).square().mean(), Entrant("published lozo"), rank=4)
    matrix = 1024 * 4096 * 4
    assert 2 * matrix < use.extra < 4.5 * matrix
    assert use.persistent < 0.01 * use.weights
