"""Engines in processes of their own, tensor parallel, several at once, and killed ones."""

import json
import os
import signal
import subprocess
import time

import lozo_kernels
from lozo_kernels.journal import read_journal, replay
from lozo_kernels.vllm import LOZO, nll

from .engines import EPS, OPTIONS, engine, lines_of, loss_of, many, reference, run_script, script

EAGER = {"enforce_eager": True}
APART = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def steps_of(path, steps, *, options=EAGER, env=APART, ours=None, settings=None, **more):
    task = {"steps": steps, "engine": options, "ours": ours or {}, "settings": settings or {}} | more
    return run_script("take_steps.py", path, json.dumps(task), env=env)


def wanted(path, steps, **settings):
    model = reference(path)
    optimizer = lozo_kernels.LOZO(model, lr=2e-4, eps=EPS, placement="probe", **OPTIONS, **settings)
    found = []
    for i in range(steps):
        some = many(i)
        optimizer.step(lambda some=some: loss_of(model, some))
        found.append(optimizer.info.c.tolist())
    return found


def worst(rows, c):
    assert len(rows) == len(c)
    return max(abs(x - y) for row, own in zip(rows, c, strict=True) for x, y in zip(row["c"], own, strict=True))


def test_tensor_parallel_in_processes_of_its_own(models, tmp_path):
    """Two ranks with an engine process beside them; the noise goes by rows and columns of the whole matrices."""
    path, journal = models("llama"), tmp_path / "run.journal"
    rows = steps_of(path, 25, options=EAGER | {"tensor_parallel_size": 2}, journal=str(journal), settings={"momentum": 0.9})
    assert worst(rows, wanted(path, 25, momentum=0.9)) < 1e-5
    tuned = reference(path)
    replay(tuned, journal)


def test_a_compiled_engine(models):
    """Two windows, so that what was traced has to see new V, new points and what was learned."""
    path = models("qwen3")
    rows = steps_of(path, 22, options={}, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, settings={"directions": 2})
    assert worst(rows, wanted(path, 22, directions=2)) < 2e-5


def test_killed_and_resumed(models, tmp_path):
    """The driver with kill -9, and then a worker: the journal goes on where it was, and the run is the same."""
    path, journal = models("llama"), tmp_path / "run.journal"
    task = {"steps": 10**6, "engine": EAGER, "ours": {}, "settings": {}, "journal": str(journal)}
    process = subprocess.Popen(
        **script("take_steps.py", path, json.dumps(task), env=APART),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("{") and json.loads(line)["step"] >= 6:
                break
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(0.5)
    done = read_journal(journal).steps
    assert 6 <= done < 30
    task = {"steps": 30, "engine": EAGER, "ours": {}, "settings": {}, "journal": str(journal), "kill_worker_at": 20}
    run_script("take_steps.py", path, json.dumps(task), env=APART, kill=True)
    assert read_journal(journal).steps == 20
    rows = []
    with engine(path) as llm:
        optimizer = LOZO(llm, lr=2e-4, eps=EPS, journal=journal, resume=True)
        for i in range(20, 30):
            optimizer.step(nll(many(i)))
            rows.append({"c": optimizer.info.c.tolist()})
        assert optimizer.steps_done == 30
        optimizer._recorded.close()
    assert worst(rows, wanted(path, 30)[20:]) < 1e-5


def test_two_engines_share_directions(models, tmp_path):
    """Each evaluates two of four directions, and only scalars are exchanged."""
    path = models("llama")
    processes = []
    for rank in range(2):
        about = {"rank": rank, "world": 2, "init": f"file://{tmp_path / 'meet'}", "mode": "directions"}
        task = {"steps": 5, "engine": EAGER, "ours": {}, "settings": {"directions": 4}, "distributed": about}
        started = script("take_steps.py", path, json.dumps(task), env=APART)
        processes.append(subprocess.Popen(**started, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    ends = [process.communicate(timeout=1200) for process in processes]
    assert all(process.returncode == 0 for process in processes), [error[-6000:] for _, error in ends]
    rows = [lines_of(out) for out, _ in ends]
    assert rows[0] == rows[1]
    assert worst(rows[0], wanted(path, 5, directions=4)) < 1e-5
