"""Tutorials are programs: every block of Python and every command of a page runs as it stands, in order, with fewer steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hf_helpers import REPO
from machine import stretched
from pages import PAGES, SCRIPTS, script

from lozo_kernels.cli import command as cli

pytest.importorskip("transformers")
PACKAGES = ("accelerate", "datasets", "lightning", "optuna", "peft", "torchao", "trl")
LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.accelerate_cli"}
NAMED = re.compile(r"# (\w+\.py)\n")


def shorter(text):
    """The same with a hundredth of the steps, and two layers of a model that is only planned."""
    return re.sub(r"(steps ?=? ?|num_hidden_layers=|\.py )(\d+)", lambda m: m[1] + str(max(2, int(m[2]) // 100)), text)


def launch(line):
    program, *words = shlex.split(line)
    offline = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-m", LAUNCHERS[program], *words],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=stretched(300),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "loss" in ran.stdout and "equal weights: False" not in ran.stdout


def run(line):
    if line.startswith("lozo-kernels "):
        assert cli.main(shlex.split(line)[1:]) == 0
    elif "-m lozo_kernels" not in line:  # which test_parallel_cli.py runs
        launch(line)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", SCRIPTS)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    for package in PACKAGES:
        if re.search(rf"^(from|import) {package}\b", PAGES[page], re.MULTILINE):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"__name__": "__main__"}
    for block, line in script(page):
        if block is None:
            if page.startswith("docs/tutorials/"):  # test_readme.py runs those of the quick start
                run(shorter(line))
        elif named := NAMED.match(block):
            Path(named[1]).write_text(block, encoding="utf-8")
        else:
            exec(compile(shorter(block), page, "exec"), names)


def test_every_kind_of_line_is_found():
    found = [(page, block, line) for page in SCRIPTS for block, line in script(page)]
    assert sum(block is not None for _, block, _ in found) == sum(PAGES[page].count("```python\n") for page in SCRIPTS) > 30
    launched = {line.split()[0] for _, _, line in found if line}
    assert launched == {"lozo-kernels", *LAUNCHERS}
    # A block in another language would not be run.
    assert all(not re.search(r"^```(?!python$|$)", PAGES[page], re.MULTILINE) for page in SCRIPTS)
    assert (
        shorter("--steps 300 --step 1, steps = 60, max_steps=20, a.py 30") == "--steps 3 --step 1, steps = 2, max_steps=2, a.py 2"
    )
