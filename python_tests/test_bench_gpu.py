"""The driver of ``make bench-gpu``: stages that fail, hang or cannot run, what is judged, and the whole in its smoke form."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import lozo_kernels.bench as measurements
from bench import goals, gpu, rehearsal, runner, stages, summary
from bench.__main__ import MEASUREMENTS
from bench.evidence import REPO as ROOT
from bench.sass import __main__ as sass
from lozo_kernels.bench import arguments, models
from python_tests.machine import stretched, wait_until


def stage(name, code, **settings):
    return stages.Stage(name, (sys.executable, "-c", code), **{"limit": 300, "share": 30, **settings})


def run(chosen, output, seconds=1200.0):
    records = runner.run_stages(chosen, output, seconds=seconds, root=ROOT, environment=os.environ)
    return {record["stage"]: record for record in records}


def test_one_failing_stage_stops_no_other(tmp_path):
    records = run(
        [
            stage("fails", "import sys; print('broke'); sys.exit(3)"),
            stage("absent", "", skip="there is no such thing"),
            stages.Stage("no-program", ("no-such-program",), 30, 30),
            stage("works", "print('fine')", figures=True, keep_log="works.txt"),
        ],
        tmp_path,
    )
    assert [r["status"] for r in records.values()] == ["failed", "skipped", "failed", "ok"]
    assert records["fails"]["return_code"] == 3 and "broke" in records["fails"]["reason"]
    assert "cannot be started" in records["no-program"]["reason"]
    assert (tmp_path / "works.txt").read_text() == "fine\n"
    assert (tmp_path / "logs" / "fails.txt").exists()


@pytest.mark.parametrize(("red_if", "expected"), [(("failed",), "not run"), ((), "ok")])
def test_without_correctness_there_are_no_figures(tmp_path, red_if, expected):
    records = run(
        [
            stage("correctness", "raise SystemExit(1)", red_if=red_if),
            stage("speed", "pass", figures=True),
            stage("other", "pass"),
        ],
        tmp_path,
    )
    assert records["speed"]["status"] == expected
    assert records["other"]["status"] == "ok"
    if red_if:
        assert "correctness failed" in records["speed"]["reason"]


WRITES = "import json, sys; open({path!r}, 'w').write(json.dumps({document!r})); sys.exit(75)"


@pytest.mark.parametrize(
    ("document", "status", "speed"),
    [
        ({"rows": [{"op": "x"}], "failures": []}, "incomplete", "ok"),
        ({"rows": [{"op": "x"}], "failures": ["triton x: a bit differs"]}, "failed", "not run"),
        ({"rows": [], "failures": []}, "timed out", "not run"),
    ],
)
def test_time_that_is_over_is_red_only_with_a_wrong_bit_or_nothing_checked(tmp_path, document, status, speed):
    """Exit status 75 is that of a measurement whose time was over."""
    code = WRITES.format(path=str(tmp_path / "c.json"), document=document)
    red = (stages.FAILED, stages.TIMED_OUT, stages.NOT_RUN)
    records = run([stage("correctness", code, red_if=red, output="c.json"), stage("speed", "pass", figures=True)], tmp_path)
    assert (records["correctness"]["status"], records["speed"]["status"]) == (status, speed)


def test_a_hanging_stage_is_ended_with_its_children_and_keeps_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_LEAST_SECONDS", 0.5)
    child = tmp_path / "child"
    code = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); "
        f"open({str(tmp_path / 'part.json')!r}, 'w').write('{{\"rows\": [1]}}'); time.sleep(600)"
    )
    limit = stretched(1.0)  # long enough to write the files, and over before the child wakes up
    records = run([stage("hangs", code, limit=limit, output="part.json"), stage("next", "pass")], tmp_path)
    assert records["hangs"]["status"] == "incomplete" and records["hangs"]["files"] == ["part.json"]
    assert "kept" in records["hangs"]["reason"]
    assert records["next"]["status"] == "ok"
    state = Path(f"/proc/{int(child.read_text())}/stat")
    assert wait_until(lambda: not state.exists() or state.read_text(encoding="utf-8").split()[2] == "Z"), "a child is still there"


def test_time_is_shared_and_passed_on(tmp_path):
    chosen = [
        stage("first", "pass", limit=1000, share=10),
        stage("skipped", "pass", share=1000, skip="no"),
        stage("second", "pass", limit=1000, share=30),
        stage("last", "pass", limit=7),
    ]
    records = run(chosen, tmp_path, seconds=70)
    assert records["first"]["allowed_seconds"] == pytest.approx(10, abs=0.5)
    assert records["second"]["allowed_seconds"] > 30
    assert records["last"]["allowed_seconds"] == 7
    late = run([stage("late", "pass")], tmp_path, seconds=1)
    assert (late["late"]["status"], late["late"]["reason"]) == ("not run", "no time was left")


def test_goals_have_their_time_for_certain():
    goal, more = stage("goal", "", goal=True, share=40, limit=60), stage("more", "", share=10, limit=1000)
    assert runner.allowed_seconds([goal, more, goal], 200) == 60  # its limit
    assert runner.allowed_seconds([goal, more, goal], 90) == 50  # all but what the later goal keeps
    assert runner.allowed_seconds([more, goal, more], 100) == 30  # half of what goals leave
    assert runner.allowed_seconds([goal, more, goal], 60) == 30  # earlier stages took too long: goals share
    assert runner.allowed_seconds([more, goal], 30) < 0


def test_an_old_result_is_not_taken_for_a_new_one(tmp_path):
    (tmp_path / "speed.json").write_text("{}")
    records = run([stage("speed", "raise SystemExit(1)", output="speed.json")], tmp_path)
    assert records["speed"]["files"] == [] and not (tmp_path / "speed.json").exists()


@pytest.mark.parametrize(
    ("verdict", "code", "log", "status"),
    [
        (stages.pytest_verdict, 5, "", "skipped"),
        (stages.pytest_verdict, 1, "1 failed", "failed"),
        (stages.profiler_verdict, 1, "==ERROR== ERR_NVGPUCTRPERM", "skipped"),
        (stages.profiler_verdict, 0, "No kernels were profiled.", "failed"),
        (stages.profiler_verdict, 0, "", "ok"),
        (stages.machine_code_verdict, 1, "63 kernels checked, 1 defects, the first: x sm_90: 8 bytes of stack", "defects"),
        (stages.machine_code_verdict, 1, "ImportError: no triton", "failed"),
        (stages.machine_code_verdict, 75, "", "incomplete"),
        (stages.machine_code_verdict, 0, "63 kernels checked, 0 defects", "ok"),
        (stages.backend_verdict, 2, "error: backend 'cuda' cannot serve cuda:0: it was not built", "skipped"),
    ],
)
def test_verdicts(verdict, code, log, status):
    assert verdict(code, log)[0] == status


def test_the_commands_for_a_gpu_are_understood(tmp_path):
    parsers = {
        "lozo_kernels": (4, measurements._parser(measurements.MEASUREMENTS, ("lozo-kernels", "bench"))),
        "bench": (3, measurements._parser(MEASUREMENTS, ("python", "-m", "bench"))),
    }
    names = [s.name for s in stages.gpu_stages(tmp_path)]
    assert len(set(names)) == len(names)
    for s in stages.gpu_stages(tmp_path):
        words = [w.replace(stages.ALLOWED, "5") for w in s.command]
        if "bench" in words and words[2] in parsers:
            words[words.index("--device") + 1] = "cpu"
            assert "--seconds" in words  # each saves what it has, and ends
            first, parser = parsers[words[2]]
            options = parser.parse_args(words[first:])
            assert Path(options.output).name == s.output
    goals_first = [s.goal for s in stages.gpu_stages(tmp_path)]
    assert goals_first == sorted(goals_first, reverse=True) and {"throughput", "step", "memory", "probe"} <= set(names)
    assert names.index("kernels") < names.index("machine-code") < names.index("correctness")
    assert names.index("correctness") < min(i for i, s in enumerate(stages.gpu_stages(tmp_path)) if s.figures)
    assert set(goals.STEP["cuda"]["model"].split()) <= set(models.MODELS) and "float16" in arguments.DTYPE_NAMES


@pytest.mark.parametrize(("capability", "target"), [("8.0", "sm_80"), ("9.0", "sm_90"), ("12.0", "sm_120"), ("8.6", None)])
def test_machine_code_is_read_for_the_device_at_hand(tmp_path, capability, target):
    code = next(s for s in stages.gpu_stages(tmp_path, capability=capability) if s.name == "machine-code")
    if target is None:
        assert "sm_86" in code.skip
        return
    options = sass._parser().parse_args([w.replace(stages.ALLOWED, "5") for w in code.command[3:]])
    assert options.target == [target] and options.default and options.seconds == 5 and options.triton is None
    assert options.output == tmp_path / code.output and not code.red_if


def test_machine_code_with_a_defect_is_reported_at_once_and_makes_nothing_red(tmp_path, monkeypatch, capsys):
    """Whatever it says, wrong bits are found by correctness; the figures are worse, and stand beside the reason."""
    line = "2 kernels checked, 1 defects, the first: lowrank_update sm_90 bfloat16 rank 4: 8 bytes of stack"
    chosen = [
        stage("machine-code", f"print({line!r}); print('a table'); raise SystemExit(1)", verdict=stages.machine_code_verdict),
        stage("throughput", "pass", figures=True),
    ]
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda _: {"device": "a device"})
    monkeypatch.setattr(gpu.stages, "gpu_stages", lambda *_, **__: chosen)
    assert gpu.main(["--output", str(tmp_path)]) == 0
    assert f"s: {line}\n" in capsys.readouterr().err
    records = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [(r["stage"], r["status"]) for r in records] == [("machine-code", "defects"), ("throughput", "ok")]
    assert records[0]["reason"] == line


def documents():
    rows = [
        {
            "op": "lowrank_update",
            "dtype": "bfloat16",
            "rank": r,
            "shape": "opt-13b",
            "ratios": {"floor": f, "addmm": 2.0, "reference": 9.0},
        }
        for r, f in ((1, 0.97), (4, 0.94), (16, 0.9))
    ]
    rows.append({"op": "lowrank_update", "dtype": "bfloat16", "rank": 1, "shape": "8192x8192", "ratios": {"floor": 0.1}})
    steps = [{"method": "lozo", "dtype": "bfloat16", "tokens": 4096, "overhead": 0.08, "times_two_forwards": 1.08}]
    steps.append({"method": "lozo", "placement": "captured", "dtype": "bfloat16", "tokens": 4096, "overhead": None})
    steps[1]["times_two_forwards"] = 1.02
    probes = [{"method": "lozo", "placement": "probe", "dtype": "bfloat16", "tokens": 2048, "times_two_forwards": 1.04}]
    peak = {"dtype": "bfloat16", "rank": 4, "tokens": 1024}
    memory = [{"method": "lozo", "peak_bytes": 26.5e9} | peak, {"method": "mezo-m", "peak_bytes": 78e9} | peak]
    return {
        "throughput": {"details": rows, "rows": []},
        "step": {"details": steps, "rows": [], "model": "opt-13b"},
        "probe": {"details": [p | {"overhead": 0.04} for p in probes], "rows": [], "model": "opt-13b"},
        "memory": {"rows": [*memory, {"method": "mezo", "out_of_memory": True}], "model": "opt-13b"},
    }


def test_every_goal_is_judged_or_named_as_not_measured():
    judged = summary.judge(documents())

    def key(t):
        if "target_ratio" in t:
            return t["method"], t["placement"], t["model"]
        return t.get("op") or t["method"], t.get("ratio_to", "overhead" if "overhead" in t else "memory")

    met = {key(t): t["met"] for t in judged}
    assert met == {
        ("lowrank_update", "floor"): False,
        ("lowrank_update", "reference"): True,
        ("lowrank_update", "addmm"): True,
        ("dense_update", "floor"): None,
        ("lozo", "overhead"): True,
        ("lozo", "probe", "opt-1.3b"): None,
        ("lozo", "batched", "opt-1.3b"): None,
        ("lozo", "probe", "opt-13b"): True,
        ("lozo", "batched", "opt-13b"): None,
        ("lozo", "memory"): True,
        ("mezo-m", "memory"): False,
        ("lozo-m", "memory"): None,
        ("mezo", "memory"): None,
    }
    lines = [summary.goal(t) for t in judged]
    assert sum(line.startswith("met") for line in lines) == 5
    assert sum(line.startswith("not measured") for line in lines) == 6
    assert all(t["met"] is None for t in summary.judge({}))


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert gpu.main(["--smoke", "--only", "nothing"]) == 2


def test_a_device_names_its_folder():
    assert gpu.default_output("NVIDIA H200") == ROOT / "bench" / "results" / "nvidia-h200"


def test_smoke(tmp_path):
    """Stages end to end on tiny CPU tensors: the command as on a GPU but for --smoke. ``fits`` is tested without a process."""
    names = ",".join(s.name for s in stages.gpu_stages(tmp_path) if s.name != "fits-opt-66b")
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--smoke",
        "--output",
        str(tmp_path / "out"),
        "--minutes",
        f"{stretched(4):.1f}",
        "--only",
        names,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["smoke"] and found["targets"] == [] and found["commit"]
    status = {s["stage"]: s["status"] for s in found["stages"]}
    assert set(status.values()) <= {"ok", "skipped"}
    assert all(s["reason"] for s in found["stages"] if s["status"] == "skipped")
    ran = [name for name, value in status.items() if value == "ok"]
    assert {"correctness", "exactness", "throughput", "step", "memory", "probe", "plots"} <= set(ran)
    for s in found["stages"]:
        assert str(ROOT) not in s["command"] and str(tmp_path) not in s["command"]
        for name in s["files"]:
            document = json.loads((tmp_path / "out" / name).read_text())
            assert document["rows"] and {"versions", "commit", "command"} <= set(document) and "complete" not in document
    drawn = list((tmp_path / "out").glob("throughput*.png"))
    assert drawn and all(path.stat().st_size for path in drawn)
    assert done.stdout.count("skipped") == list(status.values()).count("skipped")


def test_every_gpu_test_is_in_a_file_that_a_stage_names():
    pages = {p.relative_to(ROOT).as_posix() for p in (ROOT / "python_tests").glob("test_*.py") if "mark.gpu" in p.read_text()}
    assert pages - {"python_tests/test_triton.py", "python_tests/test_bench_gpu.py"} == set(stages.TESTS)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_rehearsal_in_a_small_form(tmp_path, monkeypatch):
    """The kernel of one rank is compiled; a launch of it on a stubbed driver compiles nothing. What takes long is given."""
    real = rehearsal._cpu
    monkeypatch.setattr(rehearsal, "_correctness_host", lambda: 10.0)
    monkeypatch.setattr(rehearsal, "_cpu", lambda *words, **more: real(*words, **more) if "bench.sass" in words else 4.0)
    path = tmp_path / "rehearsal.json"
    small = ["--stages", "exactness", "--rank", "4", "--processes", "1", "--kernel", "lowrank_update"]
    small += ["--build-seconds", "130", "--output", str(path)]
    assert measurements.main(["rehearsal", *small], MEASUREMENTS) == 0
    found = json.loads(path.read_text())
    assert found["kernels"][0]["compiled"] == found["launches"][0]["launches"] == 1
    assert found["compiled_again"] == 0 and found["fits"]
    code = found["machine_code"]
    assert code["kernels"] == 3 and code["cpu_seconds"] > 0 and not code["defects"]  # one of each dtype
    needed = {row["stage"]: row["needed_seconds"] for row in found["rows"]}
    assert needed["build"] == pytest.approx(1.15 * 130 / 8, abs=0.1)
    options = types.SimpleNamespace(minutes=9.0, cores=8)

    def late(**changed):
        return [row["stage"] for row in rehearsal.plan(options, found | changed) if row["goal"] and not row["fits"]]

    # Machine code that takes twenty times as long fits no more, and neither do the kernels.
    assert late(machine_code={"cpu_seconds": 800.0}) == ["machine-code"]
    assert "kernels" in late(kernels=[found["kernels"][0] | {"cpu_seconds": 4000}])


def test_the_committed_rehearsal_fits():
    found = json.loads((ROOT / "bench" / "results" / "rehearsal.json").read_text())
    rows = {row["stage"]: row for row in found["rows"]}
    names = {s.name for s in stages.gpu_stages(Path("OUTPUT")) if s.goal}
    assert found["fits"] and found["compiled_again"] == 0 and (found["cores"], found["minutes"]) == (8, 9.0)
    assert names == {name for name, row in rows.items() if row["goal"]} and all(rows[name]["fits"] for name in names)
    assert found["goals_need_seconds"] <= 0.8 * 60 * 9
