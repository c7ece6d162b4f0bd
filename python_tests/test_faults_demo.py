"""The demo installs and imports what it needs, and its first screen is its own."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from hf_helpers import REPO

for package in ("transformers", "tokenizers", "tqdm", "matplotlib"):
    pytest.importorskip(package)

SHORT = ["demo", "--steps", "2", "--architecture", "opt-tiny", "--output"]

_WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {names!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
from lozo_kernels.cli import main
sys.exit(main(sys.argv[1:]))
"""


def command(tmp_path, *argv):
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment, cwd=tmp_path)


def only_its_own(said):
    """Whether every line is of the demo: what it does, what it trains on, and the bar."""
    lines = [line for line in said.replace("\r", "\n").splitlines() if line]
    return all(line.startswith(("training ", "timing ", "model: ", "go-again", "2 classes", "lozo: ")) for line in lines)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
@pytest.mark.parametrize(("target", "extra"), [("demo", "hf"), ("test", "dev")])
def test_make_installs_what_a_target_needs(tmp_path, target, extra):
    said = subprocess.run(
        ["make", "-n", target, f"VENV={tmp_path / 'venv'}"], capture_output=True, text=True, cwd=REPO, check=True
    ).stdout
    assert re.findall(r"-e '\.\[(\w+)\]'", said) == [extra]


def test_the_demo_runs_without_what_the_tests_bring(tmp_path):
    names = {"torchao", "bitsandbytes", "peft", "trl", "lightning", "datasets", "triton", "pyarrow", "pandas"}
    done = command(tmp_path, "-c", _WITHOUT.format(names=names), *SHORT, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert only_its_own(done.stderr), done.stderr


def test_the_first_screen_is_its_own(tmp_path):
    """Also where packages are installed that warn while transformers imports them."""
    done = command(tmp_path, "-m", "lozo_kernels", *SHORT, str(tmp_path / "run"))
    assert done.returncode == 0 and only_its_own(done.stderr), done.stderr
