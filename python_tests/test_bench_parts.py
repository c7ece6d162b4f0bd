"""The parts of bench that a GPU needs, tried without one: clocks, shapes, peers that fail, correctness and exactness."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from bench import exactness, fits
from bench.__main__ import MEASUREMENTS
from lozo_kernels import bench, choose_backend
from lozo_kernels.bench import (
    clock,
    correctness,
    deadline,
    document,
    memory_gpu,
    memory_use,
    models,
    op_calls,
    peers,
    perturb,
    timing,
)
from lozo_kernels.bench.cases import compare
from lozo_kernels.bench.correctness import plans
from lozo_kernels.bench.layer_cases import LayerCase
from lozo_kernels.kernels.calls import LayerCall
from lozo_kernels.kernels.table import TensorTable

CPU = torch.device("cpu")


class FakeEvent:
    """A moment of a fake device, whose stream runs when someone waits."""

    now = 0.0
    waits = 0

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        FakeEvent.waits += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def events():
    FakeEvent.now, FakeEvent.waits = 0.0, 0
    return FakeEvent


def test_events_are_read_once_a_round_and_the_overwriting_is_not_timed(events):
    class Overwritten:
        def numel(self):
            return 1 << 20

        def element_size(self):
            return 1

        def zero_(self):
            FakeEvent.now += 100.0

    def call(seconds):
        def run():
            FakeEvent.now += seconds

        return timing.Contender(run)

    found = clock.EventClock(Overwritten(), FakeEvent)
    assert str(1 << 20) in found.cold
    seconds = timing.interleave({"a": call(1.0), "b": call(2.0)}, 5, clock=found)
    assert seconds == {"a": dict.fromkeys(range(5), 1.0), "b": dict.fromkeys(range(5), 2.0)}
    assert events.waits == 5


def test_the_clock_of_the_cpu_is_the_hosts():
    assert isinstance(clock.clock_for(CPU, cold=True), clock.HostClock)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("opt-125m", 125_239_296),
        ("opt-1.3b", 1_315_758_080),
        ("opt-13b", 12_853_473_280),
        ("opt-66b", 65_719_701_504),
        ("llama-3-8b", 8_030_261_248),
        ("qwen3-4b", 4_022_468_096),
    ],
)
def test_shapes_are_those_of_the_published_models(name, parameters):
    shapes = models.parameter_shapes(name)
    assert sum(torch.Size(shape).numel() for _, shape in shapes) == parameters
    assert len({n for n, _ in shapes}) == len(shapes)
    assert all(len(shape) in (1, 2) for _, shape in shapes)


def test_a_model_is_made_in_its_dtype_and_leaves_the_default_alone():
    model = models.build_model("opt-tiny", torch.float16, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not model.training and torch.get_default_dtype() == torch.float32
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_without_transformers_the_default_shapes_are_matrices(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    models.parameter_shapes.cache_clear()
    options = types.SimpleNamespace(shapes=None, model_shapes=None)
    assert perturb._labels(options) == ["8192x8192", "32768x2048"]
    assert "transformers" in capsys.readouterr().err
    assert bench.main(["perturb", "--model-shapes", "opt-125m"]) == 2
    assert "transformers" in capsys.readouterr().err


def measure(label="48x70", **settings):
    backend = choose_backend(CPU).backend
    one = perturb.PerturbBench(CPU, backend, clock.HostClock(), repeats=1, peer_repeats=1, **settings)
    return {row["op"]: row for row, _ in one.measure(label, torch.bfloat16, [4])}


def test_a_peer_that_cannot_run_says_why_and_the_rest_is_measured(monkeypatch):
    def no_compiler(function, **options):
        def call(*args):
            raise RuntimeError("the compiler is not here\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(peers, "foreach_pass", no_memory)
    rows = measure(compile_ranks=[4])
    assert rows["lowrank_update"]["not_run"] == {"compiled": "RuntimeError: the compiler is not here"}
    assert rows["lowrank_update"]["addmm_gbps"] is not None
    assert set(rows["dense_update"]["not_run"]) == {"compiled", "foreach"}
    assert rows["dense_update"]["reference_gbps"] is not None


def test_what_is_compiled_are_the_published_expressions(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)
    rows = measure(compile_ranks=[4])
    assert all(rows[op]["compiled_gbps"] is not None for op in ("lowrank_update", "lowrank_update_2", "dense_update"))
    assert seen == [{"fullgraph": True, "dynamic": False}] * 2


def test_many_tensors_are_each_checked_somewhere():
    tensors = [torch.zeros(40, 8, dtype=torch.bfloat16) for _ in range(70)]
    backend = choose_backend(CPU).backend
    table = op_calls.Weights("many", tensors).lowrank_table(2, backend)
    pieces = [bench.gate._pieces(40, table, t) for t in range(len(table))]
    assert {len(p) for p in pieces} == {1} and {p[0].start for p in pieces} == {0, 17, 37}


def test_correctness_finds_no_difference(capsys, tmp_path):
    path = tmp_path / "correctness.json"
    assert bench.main(["correctness", "--quick", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["cases_done"] == found["cases"] == len(plans(quick=True))
    assert {row["wrong"] + row["errors"] for row in found["rows"]} <= {0}
    assert f"seed {found['seed']}" in capsys.readouterr().out


def no_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Broken:
    """A backend with one defect."""

    name = "broken"

    def __init__(self, defect):
        self.right, self.defect = choose_backend(CPU, "eager").backend, defect

    def __getattr__(self, op):
        right = getattr(self.right, op)

        def call(*arguments, **named):
            result = right(*arguments, **named)
            for given in arguments:
                if isinstance(given, LayerCall):
                    given = TensorTable([given.y[None]], [0])
                if isinstance(given, TensorTable):
                    self.defect(given)
            return result

        return call


def dies(table):
    raise RuntimeError("no such kernel")


def writes_a_gap(table):
    x = next(x for x in table.x if x.numel())
    torch.as_strided(x, (1,), (1,), x.storage_offset() + (x.shape[0] - 1) * x.stride(0) + x.shape[1] * x.stride(1)).zero_()


def one_bit(table):
    (table.v if table.v is not None else table.x)[-1][-1, -1, -1].mul_(1.01)


@pytest.mark.parametrize("defect", [dies, writes_a_gap, one_bit])
def test_correctness_turns_red(defect):
    rows, failures, *_ = correctness.hold([Broken(defect)], choose_backend(CPU, "eager").backend, CPU, 1, plans(quick=True))
    broken = [row for row in rows if row["op"] != "factor"]
    assert broken and all(row["errors"] if defect is dies else row["wrong"] for row in broken)
    assert failures and "seed" in failures[0]


def test_correctness_ends_when_its_time_is_over():
    backend = choose_backend(CPU, "eager").backend
    chosen = plans(quick=False)
    end = deadline.Deadline(-1)
    *_, done = correctness.hold([], backend, CPU, 0, chosen, deadline=end)
    assert done == 0 < len(chosen) and end.note() == {"complete": False}


def test_every_plan_has_inputs(rng):
    chosen = plans(quick=False)
    assert len(set(map(str, chosen))) == len(chosen)
    for plan in rng.sample(chosen, 6):
        case = plan.case(rng.getrandbits(32))
        copied = case.on(CPU)
        if isinstance(case, LayerCase):
            assert not any(tensor.wrong for tensor in copied.compare(case))
            continue
        assert not any(tensor.wrong for tensor in compare(copied, case))
        assert all(a.data_ptr() != b.data_ptr() or not a.numel() for a, b in zip(case.table.x, copied.table.x, strict=True))


def test_sums_beyond_fp32_are_counted_apart():
    row = {"sums": 0, "greatest_sum": 0, "beyond": 0, "mm_wrong": 0}
    exact = torch.tensor([[1.0, 2.0**24, 2.0**24 + 1, -5.0]], dtype=torch.float64)
    product = (exact / 65536).float()
    product[0, 3] = 0
    exactness._tally(row, exact, kernel=None, product=product)
    assert row == {"sums": 4, "greatest_sum": 2**24 + 1, "beyond": 1, "mm_wrong": 1}


def test_exactness_of_the_kernels(capsys):
    assert (
        bench.main(
            ["exactness", "--size", "40", "--draws", "1", "--rank", "1,6,64", "--kernel-rank", "1,64", "--json"], MEASUREMENTS
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert {row["rank"]: row["kernel_wrong"] for row in found["rows"] if row["values"] == "noise"} == {1: 0, 6: None, 64: 0}
    assert 0 < found["greatest_sum"] < 1 << 24


def test_memory_of_a_step_on_a_gpu_is_split_at_its_forward_passes(monkeypatch):
    """A fake allocator: 1000 bytes of weights, 300 of activations, 40 of V, 200 of temporaries outside the forward passes."""
    state = {"now": 1000, "peak": 1000}

    def allocate(size):
        state["now"] += size
        state["peak"] = max(state["peak"], state["now"])

    def reset(device=None):
        state["peak"] = state["now"]

    for name, value in {
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: state["now"],
        "max_memory_allocated": lambda device=None: state["peak"],
        "max_memory_reserved": lambda device=None: 2 * state["peak"],
        "reset_peak_memory_stats": reset,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def closure():
        allocate(300)
        allocate(-300)
        return torch.zeros(())

    def make_step():
        allocate(40)

        def step(closure):
            for _ in range(2):
                allocate(200)
                allocate(-200)
                closure()

        return step

    use = memory_gpu.measure_memory(torch.nn.Linear(5, 5, bias=False), closure, make_step)
    assert (use.weights, use.forward, use.persistent, use.extra) == (100, 300, 40, 240)
    assert (use.forward_peak, use.peak, use.reserved) == (1300, 1340, 2680)


def test_running_out_of_memory_is_a_result(monkeypatch, capsys):
    monkeypatch.setattr(fits, "build_model", no_memory)
    assert bench.main(["fits", "--model", "opt-tiny", "--methods", "lozo,mezo", "--json"], MEASUREMENTS) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["fits"], r["failed_at"]) for r in rows] == [(False, "weights")] * 2
    monkeypatch.undo()
    assert bench.main(["fits", "--model", "opt-tiny", "--tokens", "16", "--json"], MEASUREMENTS) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["fits"] and row["error"] is None and set(row["seconds"]) == {"forward", "optimizer", "step 0", "step 1"}
    assert not memory_use.out_of_memory(RuntimeError("shapes do not match"))


def test_a_partial_document_says_so(tmp_path):
    path = tmp_path / "partial.json"
    document.save_partial({"device": "x"}, str(path), rows=[{"a": 1}])
    assert json.loads(path.read_text()) == {"device": "x", "complete": False, "rows": [{"a": 1}]}
