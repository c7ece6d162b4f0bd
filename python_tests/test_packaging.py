"""What setup.py and pyproject.toml make of the repository: the text for the package index, and one source of the version."""

import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
from hf_helpers import REPO

import lozo_kernels


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """The metadata that a wheel would have, and what was said on the way. Nothing is compiled."""
    folder = tmp_path_factory.mktemp("metadata")
    environment = os.environ | {"LOZO_KERNELS_NATIVE": "0"}
    command = [sys.executable, "setup.py", "dist_info", "--output-dir", str(folder)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (info,) = folder.glob("*.dist-info")
    return metadata.PathDistribution(info).metadata, done.stdout


def test_one_source_of_the_version(described):
    assert described[0]["Version"] == lozo_kernels.__version__
    assert f"## {lozo_kernels.__version__} (" in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")


def test_links_of_the_index_page_are_absolute(described):
    page, readme = described[0].get_payload(), (REPO / "README.md").read_text(encoding="utf-8")
    relative = re.findall(r"\]\((?!https?://|#)([^)]+)\)", readme)
    links = re.findall(r"\]\((?!#)([^)]+)\)", page)
    assert relative and len(links) == len(re.findall(r"\]\((?!#)([^)]+)\)", readme))
    assert all(re.match(r"https://[^/]+/", link) for link in links)
    home = next(url.split(", ")[1] for url in described[0].get_all("Project-URL") if url.startswith("Repository"))
    for link in relative:
        found = [f"{home}/{kind}/v{lozo_kernels.__version__}/{link}" for kind in ("blob", "raw")]
        assert any(url in links for url in found), link
    fenced = re.compile(r"```.*?```", re.DOTALL)
    assert fenced.findall(page) == fenced.findall(readme)


def test_extras_that_bring_all_of_a_framework(described):
    extras = set(described[0].get_all("Provides-Extra"))
    assert {"hf", "trainer", "peft", "trl", "lightning", "all"} <= extras
    wanted = {line for line in described[0].get_all("Requires-Dist") if 'extra == "all"' in line}
    assert any("trl" in line and "lightning" in line for line in wanted), wanted


def test_it_says_that_it_compiles_nothing(described):
    assert "lozo_kernels: compiling nothing (LOZO_KERNELS_NATIVE=0)\n" in described[1]
