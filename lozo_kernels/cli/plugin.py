"""Modules from outside of the package that register estimators for the commands."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from ..errors import InputError
from ..hf.methods import METHODS
from ..optim.methods import OPTIMIZERS

_LOADED: set[str] = set()


def load_plugin(name: str) -> None:
    """Imports a module by its name, or a file of Python by its path, which registers estimators. A second call does nothing.

    Raises:
        InputError: it cannot be imported, registers no estimator, or one with the name of a method that there is.
    """
    path = Path(name)
    module = path.stem if path.suffix == ".py" else name
    if name in _LOADED:
        return
    before = set(OPTIMIZERS)
    try:
        if module == name:
            importlib.import_module(name)
        else:
            _run_file(module, path.resolve())
    except Exception as e:
        raise InputError(f"--plugin {name} cannot be imported: {type(e).__name__}: {e}") from e
    new = set(OPTIMIZERS) - before
    if not new:
        raise InputError(f"--plugin {name} registers no estimator: have it call lozo_kernels.register_estimator()")
    taken = next((word for word in sorted(new) if METHODS[word].optimizer is not OPTIMIZERS[word]), None)
    if taken is not None:
        raise InputError(f"--plugin {name} registers {taken!r}, which is the name of another method: take another name")
    _LOADED.add(name)


def _run_file(module: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    made = sys.modules[module] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[module]
        raise
