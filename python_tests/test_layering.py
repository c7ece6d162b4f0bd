"""Who may import whom, file by file, and what an import may not do. Imports inside of functions and for types count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lozo_kernels

ROOT = Path(lozo_kernels.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# Lower layers first; a file imports only from layers below its own, and from its own folder.
LAYERS = [
    {"errors"},
    {"kernels"},
    {"model"},
    {"optim", "adapters"},
    {"journal"},
    {"bench"},
    {"hf", "vllm"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_of(path):
    """A file's parts below the package; those of a package's ``__init__.py`` end with it."""
    return path.relative_to(ROOT).with_suffix("").parts


MODULES = {module_of(path): path for path in FILES}


def find(parts):
    """The module that a dotted name means: a file, or the ``__init__`` of a folder; None for a name inside of one."""
    parts = tuple(parts)
    return next((p for p in (parts, (*parts, "__init__")) if p in MODULES), None)


def imports(path):
    """The modules of the package that a file imports, wherever in it."""
    own = module_of(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lozo_kernels":
                    yield find(alias.name.split(".")[1:])
        elif isinstance(node, ast.ImportFrom):
            inside = (node.module or "").split(".")
            if node.level:
                base = (*own[: len(own) - node.level], *filter(None, inside))
            elif inside[0] == "lozo_kernels":
                base = tuple(inside[1:])
            else:
                continue
            for alias in node.names:
                yield find((*base, alias.name)) or find(base)


GRAPH = {module_of(path): sorted({m for m in imports(path) if m is not None} - {module_of(path)}) for path in FILES}


def test_the_root_is_errors_and_nine_folders():
    found = {p.name for p in ROOT.iterdir() if p.name != "__pycache__"}
    assert found - {"lib"} == {
        *("__init__.py", "__main__.py", "py.typed", "errors.py"),
        *("kernels", "model", "optim", "adapters", "journal", "bench", "hf", "vllm", "cli"),
    }
    assert len(LAYERS) <= 9


@pytest.mark.parametrize("module", GRAPH, ids="/".join)
def test_layers(module):
    own = module[0]
    assert own in LEVEL, f"{own} has no layer; give it one"
    for other in GRAPH[module]:
        below = other[0] == own or LEVEL[other[0]] < LEVEL[own]
        assert below, f"{'/'.join(module)} imports {'/'.join(other)}, which is not below it"


def test_no_files_import_each_other_in_a_loop():
    """A package's ``__init__`` stands for what it exports: a file inside of it does not import from it."""
    done, path = set(), []

    def visit(module):
        assert module not in path, "a loop: " + " -> ".join("/".join(m) for m in [*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in GRAPH[module]:
                visit(other)
            path.pop()
            done.add(module)

    for module in GRAPH:
        visit(module)


def test_only_the_wings_import_transformers():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] not in ("hf", "bench", "vllm"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
            names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
            assert not any(name and name.split(".")[0] == "transformers" for name in names), path


def test_import_is_light():
    """Importing the library brings in no optional dependency and starts no device."""
    code = (
        "import sys, torch; before = set(sys.modules); import lozo_kernels; "
        "heavy = {'transformers', 'matplotlib', 'triton', 'datasets', 'tqdm', 'numpy'} & (set(sys.modules) - before); "
        "assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
