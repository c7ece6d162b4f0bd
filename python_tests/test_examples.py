"""Every example runs, as it says, from another folder and without the network."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from python_tests.machine import stretched

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
NEEDS = {"trainer.py": "accelerate", "zo_trainer.py": "accelerate", "probe_offload.py": "accelerate", "peft_lora.py": "peft"}
NEEDS |= {"trl_trainers.py": "trl", "lightning_module.py": "lightning", "accelerate_launch.py": "accelerate", "search.py": "optuna"}
NEEDS |= {"streaming.py": "datasets"}
SAYS = {
    "own_trainer_backend.py": "pairs of a seed and a number",
    "federated.py": "accuracy",
    "own_estimator.py": "the replay has the same bits: True",
    "journal.py": "what the journal says: True",
    "vision.py": "dev accuracy",
    "trainer.py": "dev loss after",
    "zo_trainer.py": "projected_gradient",
    "trl_trainers.py": "DPOTrainer: mean loss of 2 steps 0.69",
    "grpo_reward.py": "step 1: reward",
    "lightning_module.py": "loss of step 2",
    "accelerate_launch.py": "1 processes, equal weights: True",
    "vision_language.py": "right: ",
    "search.py": "lowest dev loss",
}


def test_there_are_some():
    assert len(NAMES) == 20 and NEEDS.keys() | SAYS.keys() <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    """At most 40 lines; two of documentation first: what it shows, and how to run it."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert text.count("\n") <= 40
    first, second = (ast.get_docstring(ast.parse(text)) or "").split("\n")
    assert first and second.startswith(f"Run: python examples/{name} [steps]")


RUNNER = """
import importlib.util, os, runpy, sys, traceback
import torch, transformers, lozo_kernels
from transformers import AutoModelForCausalLM, AutoTokenizer  # what takes most of the time, once for all examples
if importlib.util.find_spec("accelerate"):
    from transformers import Trainer

for path in sys.argv[1:]:
    name = os.path.basename(path)
    child = os.fork()
    if child == 0:
        output = os.open(name + ".out", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        os.mkdir(name + ".at")
        os.chdir(name + ".at")
        sys.argv, code = [path, "2"], 0
        try:
            runpy.run_path(path, run_name="__main__")
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    with open(name + ".rc", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


def missing(name):
    return name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with what each example wrote, each in a process of its own."""
    folder = tmp_path_factory.mktemp("examples")
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99", "CUDA_VISIBLE_DEVICES": ""}
    paths = [str(EXAMPLES / name) for name in NAMES if not missing(name)]
    subprocess.run([sys.executable, "-c", RUNNER, *paths], cwd=folder, env=os.environ | offline, check=True, timeout=stretched(300))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(ran, name):
    if missing(name):
        pytest.skip(f"the package {NEEDS[name]} is not installed")
    output = (ran / f"{name}.out").read_text(encoding="utf-8")
    assert (ran / f"{name}.rc").read_text() == "0", output
    assert SAYS.get(name, "loss") in output
    assert not list((ran / f"{name}.at").iterdir())  # what it writes is in temporary folders
