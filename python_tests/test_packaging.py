"""What setup.py and pyproject.toml make of the repository: the text for the package index, and one source of the version."""

import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
from hf_helpers import REPO

import lozo_kernels


def build(folder, **environment):
    """A wheel of this repository, and what was said on the way."""
    command = [sys.executable, "setup.py", "build", "--build-base", folder / "build"]
    command += ["bdist_wheel", "--dist-dir", folder, "--bdist-dir", folder / "wheel"]
    done = subprocess.run(command, cwd=REPO, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    return wheel, [line for line in done.stdout.splitlines() if line.startswith("lozo_kernels:")]


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pure"), LOZO_KERNELS_NATIVE="0")


@pytest.fixture(scope="module")
def described(pure):
    """The metadata of a wheel."""
    path = zipfile.Path(pure[0], f"lozo_kernels-{lozo_kernels.__version__}.dist-info/")
    return metadata.PathDistribution(path).metadata


def test_one_source_of_the_version(described):
    assert described["Version"] == lozo_kernels.__version__
    changes = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## (Unreleased|{re.escape(lozo_kernels.__version__)} - \d{{4}}-\d\d-\d\d)$", changes, re.MULTILINE)


def test_links_of_the_index_page_are_absolute(described):
    page, readme = described.get_payload(), (REPO / "README.md").read_text(encoding="utf-8")
    relative = re.findall(r"\]\((?!https?://|#)([^)]+)\)", readme)
    links = re.findall(r"\]\((?!#)([^)]+)\)", page)
    assert relative and len(links) == len(re.findall(r"\]\((?!#)([^)]+)\)", readme))
    assert all(re.match(r"https://[^/]+/", link) for link in links)
    home = next(url.split(", ")[1] for url in described.get_all("Project-URL") if url.startswith("Repository"))
    for link in relative:
        found = [f"{home}/{kind}/v{lozo_kernels.__version__}/{link}" for kind in ("blob", "raw")]
        assert any(url in links for url in found), link
    fenced = re.compile(r"```.*?```", re.DOTALL)
    assert fenced.findall(page) == fenced.findall(readme)


def test_extras_that_bring_all_of_a_framework(described):
    extras = set(described.get_all("Provides-Extra"))
    assert {"hf", "trainer", "peft", "trl", "lightning", "all"} <= extras
    wanted = {line for line in described.get_all("Requires-Dist") if 'extra == "all"' in line}
    assert any("trl" in line and "lightning" in line for line in wanted), wanted


def test_a_wheel_for_every_machine(pure):
    """It has no library, also where one lies in the working tree, and what was built says so in one line."""
    wheel, said = pure
    assert wheel.name == f"lozo_kernels-{lozo_kernels.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith((".so", ".cpp"))] and "lozo_kernels/hf/tasks/tasks.json" in names
    assert said == ["lozo_kernels: going on without the compiled kernels, a slower path serves CPUs: LOZO_KERNELS_NATIVE=0"]


def test_without_a_compiler(tmp_path):
    wheel, said = build(tmp_path, PATH="", CXX="")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said == [
        "lozo_kernels: going on without the compiled kernels, a slower path serves CPUs: no C++ compiler found (set CXX)"
    ]
