"""The site: its reference has every public name, its pages load nothing from elsewhere, its pictures are legible."""

import importlib
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from hf_helpers import REPO
from pages import PAGES, links

PACKAGES = (
    "lozo_kernels",
    "lozo_kernels.hf",
    "lozo_kernels.adapters",
    "lozo_kernels.journal",
    "lozo_kernels.optim",
    "lozo_kernels.vllm",
)
DESCRIBED = {
    name for page in PAGES if page.startswith("docs/api/") for name in re.findall(r"^::: (\S+)$", PAGES[page], re.MULTILINE)
}
PICTURES = sorted((REPO / "docs" / "pictures").glob("*.svg"))


def resolved(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package):
    if package.endswith(".hf"):
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
    described = [resolved(name) for name in DESCRIBED]
    missing = [name for name in importlib.import_module(package).__all__ if resolved(f"{package}.{name}") not in described]
    assert missing == []


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_pictures_are_legible_on_a_phone_and_on_a_page(picture):
    """A screen of 390 points shows a page of 358: letters of 13 stay above 10."""
    assert any(link.endswith(f"pictures/{picture.name}") for page in PAGES for link in links(page))
    root = ElementTree.parse(picture).getroot()
    sizes = [float(element.get("font-size")) for element in root.iter() if element.get("font-size")]
    assert min(sizes) * min(1.0, 358 / float(root.get("width"))) > 10
    assert [element.text for element in root.iter() if element.tag.endswith(("}title", "}desc"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}


def test_pages_load_nothing_from_elsewhere(site):
    loading = r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?https?:|<link[^>]*rel=\"?(?:stylesheet|preconnect)[^>]*https?:"
    assert [name for name, text in site.items() if re.search(loading, text)] == []


def test_what_is_outside_of_docs_is_found(site):
    """Files are linked in the repository, and pictures are part of the site."""
    page = site["benchmarks/index.html"]
    assert "/blob/main/bench/results/" in page or "/blob/main/bench/README.md" in page
    assert re.search(r"<img[^>]*src=\"\.\./bench/results/\w+[\w-]*\.png\"", page)
    assert not re.search(r"href=\"(\.\./)+bench/(?!results/[\w-]+\.png)", page)


def test_names_in_docstrings_are_links(site):
    """The roles of reStructuredText are not shown as they are written."""
    assert not [name for name, text in site.items() if re.search(r":(class|func|meth|attr|mod):<", text)]
    assert 'href="../handles/#lozo_kernels.PatchConfig"' in site["api/optimisers/index.html"]
