"""The versions of Triton that kernels are read with: the oldest one, and those that are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.sass.__main__ import main
from bench.sass.toolchain import ENVIRONMENT, OLDEST, in_folder
from lozo_kernels.errors import InputError
from lozo_kernels.kernels.backends.triton import TritonBackend
from lozo_kernels.kernels.backends.triton.launcher import Launcher
from lozo_kernels.kernels.backends.triton.versions import OLDEST_TRITON, fuses_pairs, unsupported

ROOT = Path(__file__).resolve().parents[1]


def test_the_oldest_triton_makes_good_code(capsys, tmp_path):
    """A handful of kernels: wide access and no spills, and on Blackwell no product that its assembler fuses with a sum."""
    try:
        in_folder(OLDEST)
    except InputError as reason:
        pytest.skip(str(reason))
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    out = tmp_path / "sass.json"
    chosen = ["--kernel", "lowrank_update", "lowrank_merge_0", "dense_update", "--dtype", "bfloat16", "--rank", "4"]
    targets = ["--target", "sm_90", "sm_120"]
    code = main(["--triton", OLDEST, *chosen, *targets, "--no-cuda", "--no-naive", "--output", str(out)])
    assert code == 0, capsys.readouterr().out
    document = json.loads(out.read_text())
    assert {row["triton"] for row in document["rows"]} == {document["versions"]["triton"]}
    assert document["versions"]["triton"].startswith("3.6.")
    assert len(document["rows"]) == 6
    assert all(row["vector_bits"] == 128 and not row["spill_bytes"] for row in document["rows"])
    # The contract has a fused multiply-add for products with N, and nowhere else.
    assert {row["kernel"] for row in document["rows"] if row["fused"]} == {"lowrank_merge_0"}


def test_a_missing_triton_is_an_error_that_says_how_to_install_it(capsys, tmp_path, monkeypatch):
    assert main(["--triton", str(tmp_path)]) == 2
    assert f"pip install --target {tmp_path} --no-deps triton==3.6.0" in capsys.readouterr().err
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert main(["--triton", OLDEST]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    newer = tmp_path / "triton-3.7.1.dist-info"
    newer.mkdir()
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.7.1\n")
    assert in_folder(str(tmp_path)).version == "3.7.1"
    with pytest.raises(InputError, match=r"has Triton 3\.7\.1, and the oldest that is supported is 3\.6\.0: pip install"):
        in_folder(OLDEST)


@pytest.mark.parametrize("version", ["3.5.1", "3.5.1+git0fc7ea1", "2.1.0", "3.0"])
def test_an_older_triton_is_refused_by_name(version, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    reason = TritonBackend(Launcher()).unavailable(torch.device("cpu"))
    assert reason == f"Triton {version} is older than 3.6, the oldest that is supported: pip install 'triton>=3.6'"


@pytest.mark.parametrize("version", ["3.6.0", "3.6.0+git9844da95", "3.9.0", "3.10.1", "4.0.0rc1", "unknown"])
def test_supported_versions(version):
    assert unsupported(version) is None


def test_only_versions_that_are_known_to_keep_pairs_are_let_pair():
    assert [fuses_pairs(v) for v in ("3.6.0", "3.8.2", "3.9.0", "3.10.0", "4.1")] == [True, True, False, False, False]


def test_setup_installs_the_oldest_version():
    oldest = ".".join(map(str, OLDEST_TRITON))
    assert f"OLDEST_TRITON := {oldest}.0\n" in (ROOT / "Makefile").read_text()
    assert f'"triton>={oldest};' in (ROOT / "pyproject.toml").read_text()


def test_lines_of_weights_are_no_lines_of_other_files():
    """ptxas leaves out a change of file where the number of the line stays the same; then accesses to weights would be lost."""
    pytest.importorskip("triton")
    program = (
        "import json; from bench.sass import compiler; from lozo_kernels.kernels.backends.triton import weights;"
        "lines = [getattr(f, n, None) for f in vars(weights).values() if isinstance(f, compiler.triton.JITFunction)"
        " for n in ('starting_line_number', 'def_file_line_number')]; print(json.dumps(lines))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = [n for n in json.loads(ran.stdout) if n is not None]
    longest = max(len(p.read_text().splitlines()) for p in (ROOT / "lozo_kernels" / "kernels").rglob("*.py"))
    assert len(lines) >= 8 and min(lines) > 10 * longest
