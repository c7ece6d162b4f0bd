"""``finetune`` by several processes of torchrun."""

import json
import os
import subprocess
import sys

import pytest
import torch

for package in ("transformers", "tokenizers", "tqdm", "matplotlib"):
    pytest.importorskip(package)
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch.distributed or its gloo backend is missing", allow_module_level=True)

from lozo_kernels.cli import command as cli  # noqa: E402
from lozo_kernels.errors import InputError  # noqa: E402
from lozo_kernels.hf.loop.processes import joined, part  # noqa: E402
from lozo_kernels.hf.settings import Settings  # noqa: E402
from python_tests.finetune_helpers import metrics  # noqa: E402
from python_tests.machine import stretched  # noqa: E402

STEPS = 3
OPTIONS = ["--steps", str(STEPS), "--batch-size", "6", "--eval-every", "2", "--eval-size", "8", "--compare-steps", "0", "--quiet"]


def results(output):
    return [row for row in metrics(output) if row["kind"] == "step"], sorted(p.name for p in output.iterdir())


def test_two_processes_take_the_steps_of_one(tmp_path):
    assert cli.main(["finetune", *OPTIONS, "--output", str(tmp_path / "alone"), "--device", "cpu"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lozo_kernels"]
    command = [*launcher, "finetune", *OPTIONS, "--output", str(tmp_path / "together"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=stretched(120), env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps_done"] == STEPS  # of one process: two would not be JSON
    (alone, files), (together, same_files) = results(tmp_path / "alone"), results(tmp_path / "together")
    assert files == same_files and len(alone) == len(together) == STEPS
    for one, two in zip(alone, together, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["c"] == pytest.approx(one["c"], abs=2e-3)


@pytest.fixture
def torchrun(monkeypatch):
    def pretend(rank, size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))

    return pretend


@pytest.mark.parametrize(("size", "count"), [(1, 7), (3, 7), (3, 3), (4, 5)])
def test_parts_are_the_batch(torchrun, size, count):
    parts = []
    for rank in range(size):
        torchrun(rank, size)
        parts.append(list(part(list(range(count)), "examples")))
        assert list(part(list(range(count)), "directions")) == list(range(count))
    assert [row for rows in parts for row in rows] == list(range(count)) and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "ft"}, "without torchrun"),
        ({"batch_size": 2}, "--batch-size 2"),
        ({"parallel": "directions", "directions": 2}, "--directions 3"),
    ],
)
def test_what_several_processes_cannot_run(torchrun, given, words):
    torchrun(0, 3)
    with pytest.raises(InputError, match=words), joined(Settings(**given)):
        raise AssertionError("not reached")


def test_alone_parallel_means_nothing():
    with joined(Settings(parallel="directions")) as settings:
        assert settings == Settings()
    with pytest.raises(InputError, match="--parallel"):
        Settings(parallel="weights").resolved()
