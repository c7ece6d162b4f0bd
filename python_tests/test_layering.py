"""Who may import whom, and what an import may not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lozo_kernels

ROOT = Path(lozo_kernels.__file__).parent
# Lower layers first; a module imports only from layers below its own (or its own package).
LAYERS = [
    {"errors"},
    {"kernels"},
    {"model"},
    {"optim", "adapters"},
    {"journal"},
    {"bench"},
    {"hf"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path):
    """Top-level names inside lozo_kernels that a file imports, wherever in it."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = (*base, *(node.module or "").split("."))
            module = tuple(part for part in module if part)
            yield from [module[0]] if module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lozo_kernels"):
            parts = node.module.split(".")[1:]
            yield from parts[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lozo_kernels."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no layer; give it one"
    for name in imports(path):
        if own == "__init__" or name not in LEVEL:  # a name that the package exports, not a module of it
            continue
        assert name == own or LEVEL[name] < LEVEL[own], f"{own} imports {name}, which is not below it"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_hf_imports_transformers(path):
    if path.relative_to(ROOT).parts[0] in ("hf", "bench"):
        return
    tree = ast.parse(path.read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
    assert not any(name and name.split(".")[0] == "transformers" for name in names)


def test_import_is_light():
    """Importing the library brings in no optional dependency and starts no device."""
    code = (
        "import sys, torch; before = set(sys.modules); import lozo_kernels; "
        "heavy = {'transformers', 'matplotlib', 'triton', 'datasets', 'tqdm', 'numpy'} & (set(sys.modules) - before); "
        "assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
