"""Noticing that the structure of a model changed after it was patched, so that something is not trained, or is wrongly."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .backward import NAME
from .modules import children_by_name, own_parameters, reader_of
from .parameters import LeftAlone, Parameter, canonical
from .storage import Owner

_WAY_OUT = "restore() and patch the model again (or build the optimiser after the model is complete)"
_requires_grad = operator.attrgetter("requires_grad")

Place = tuple[dict[str, nn.Parameter | None], str]
"""The parameters of a module, and the name of one of them."""


class _Places:
    """Some entries of the dictionaries in which modules keep their parts.

    Attributes:
        names: their names in the model; before: what they were; now(): what they are, None for one that is gone.
    """

    def __init__(self, parts: Mapping[str, dict[str, Any]], wanted: Callable[[Any], bool]) -> None:
        found = [(path, own, key) for path, own in parts.items() for key, part in own.items() if wanted(part)]
        self.names = [f"{path}.{key}" if path else key for path, _, key in found]
        self.now = reader_of((own, key) for _, own, key in found)
        self.before = list(self.now())


class Structure:
    """The modules and parameters that a model had when it was patched.

    Args:
        trained, left: the parameters that are trained, and those that are not.
        strict: no module may be replaced at all; otherwise one without parameters may.
    """

    def __init__(self, model: nn.Module, trained: Sequence[Parameter], left: Sequence[LeftAlone], *, strict: bool) -> None:
        self._model, self._strict = model, strict
        self._trained = {name for p in trained for name in (p.name, *p.aliases)}
        self._frozen = {one.name for one in left if one.reason.startswith("requires_grad")}
        modules = dict(_modules(model))
        children, parameters = ({path: get(m) for path, m in modules.items()} for get in (children_by_name, own_parameters))
        self._children = _Places(children, lambda child: child is not None)
        self._parameters = _Places(parameters, lambda p: p is not None)
        self._blanks = _Places(parameters, lambda p: p is None)
        self._ties = [
            (canonical(f"{owner.path}.{owner.attribute}".removeprefix(".")), _place(p.storage.owners[0]), _place(owner))
            for p in trained
            if p.storage.resident
            for owner in p.storage.owners[1:]
        ]
        self._adapters = [(name, m) for name, m in modules.items() if hasattr(m, "merged_adapters") and self._concerns(name)]
        self._dicts = [*children.values(), *parameters.values()]
        self._size = sum(map(len, self._dicts))
        self._flags = self._read_flags()
        self.check_adapters()

    def check(self, *, flags: bool) -> None:
        """Raises RuntimeError, which names what changed, unless everything that is to be trained is.

        Args:
            flags: look at ``requires_grad``, too.
        """
        if not all(map(operator.is_, self._children.now(), self._children.before)):
            self._check_children()
        for name, (one, a), (two, b) in self._ties:
            if one.get(a) is not two.get(b) and two.get(b) is not None:  # a name that is gone is no other parameter
                raise RuntimeError(f"parameter {name!r} was untied from another after patching: {_WAY_OUT}")
        if sum(map(len, self._dicts)) != self._size or not all(map(operator.is_, self._blanks.now(), self._blanks.before)):
            self._check_additions()
        if flags and self._read_flags() != self._flags:
            self._check_flags()
        if self._adapters:
            self.check_adapters()

    def check_adapters(self) -> None:
        """Raises RuntimeError if an adapter of PEFT is merged into its layer."""
        for name, module in self._adapters:
            if module.merged_adapters:
                raise RuntimeError(
                    f"the adapter of {name!r} is merged into its layer, which then does not run it: unmerge it before training"
                )

    def _concerns(self, layer: str) -> bool:
        """Whether it matters that a layer's adapter runs: for a probe, which enters in the layer, and if the adapter is trained."""
        inside = (name for name in self._trained if name.startswith(f"{canonical(layer)}."))
        return self._strict or any(not name.startswith(f"{canonical(layer)}.base_layer.") for name in inside)

    def _check_children(self) -> None:
        for name, old, new in zip(self._children.names, self._children.before, self._children.now(), strict=True):
            if new is not old and (self._strict or _has_parameters(old) or _has_parameters(new)):
                what = "removed" if new is None else "replaced"
                raise RuntimeError(f"module {name!r} was {what} after patching: {_WAY_OUT}")

    def _read_flags(self) -> list[bool] | None:
        try:
            return list(map(_requires_grad, self._parameters.now()))
        except AttributeError:
            return None

    def _check_flags(self) -> None:
        for name, p in zip(self._parameters.names, self._parameters.now(), strict=True):
            plain = canonical(name)
            if p is not None and not p.requires_grad and plain in self._trained:
                raise RuntimeError(f"parameter {plain!r} was frozen after patching, but it is trained: {_WAY_OUT}")
            if p is not None and p.requires_grad and plain in self._frozen:
                raise RuntimeError(f"parameter {plain!r} requires a gradient since patching, but it is not trained: {_WAY_OUT}")
        self._flags = self._read_flags()

    def _check_additions(self) -> None:
        for path, module in _modules(self._model):
            for key, p in own_parameters(module).items():
                name = f"{path}.{key}" if path else key
                if p is not None and p.requires_grad and name not in self._parameters.names:
                    raise RuntimeError(f"parameter {canonical(name)!r} was added after patching, and is not trained: {_WAY_OUT}")
        self._size = sum(map(len, self._dicts))


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, without what a driven model gets."""
    return ((path, module) for path, module in model.named_modules() if path != NAME)


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())


def _place(owner: Owner) -> Place:
    return own_parameters(owner.module), owner.attribute
