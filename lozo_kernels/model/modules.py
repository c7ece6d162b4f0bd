"""Reads what torch keeps in modules and tensors without a public name. No other file does."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

_version = operator.attrgetter("_version")


def reader_of(places: Iterable[tuple[dict[str, Any], str]]) -> Callable[[], Iterable[Any]]:
    """Returns what reads entries of dictionaries as they are now, None for one that is gone, without a call of Python for each."""
    some = list(places)
    return functools.partial(map, dict.get, [owned for owned, _ in some], [key for _, key in some])


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that a module itself has, by attribute. An entry can be replaced, also by a tensor that is not a parameter.

    ``get_parameter`` and ``setattr`` go through hooks and checks of subclasses, and refuse tensors.
    """
    return module._parameters  # noqa: SLF001


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that a module itself has, by name."""
    return module._buffers  # noqa: SLF001


def children_by_name(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that a module itself has, by name. ``named_children`` leaves out further names of the same module."""
    return module._modules  # noqa: SLF001


def forward_hooks(module: nn.Module) -> int:
    """How many forward hooks a module has."""
    return len(module._forward_hooks)  # noqa: SLF001


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """The compiled call that ``module.compile()`` made, or None if the module was not compiled."""
    return module._compiled_call_impl  # type: ignore[no-any-return]  # noqa: SLF001


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to the model or to a module of it."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    wrapped = () if dynamo is None else dynamo.OptimizedModule
    return any(compiled_call(module) is not None or isinstance(module, wrapped) for module in model.modules())


def has_pre_hooks(module: nn.Module, kind: type) -> bool:
    """Whether a module has forward pre-hooks that are not of a class."""
    return any(not isinstance(hook, kind) for hook in module._forward_pre_hooks.values())  # noqa: SLF001


def versions_of(tensors: Sequence[Any]) -> list[int]:
    """Numbers that grow whenever a tensor is changed in place. For tensors made in inference mode, and None, it is always 0."""
    try:
        return list(map(_version, tensors))
    except (AttributeError, RuntimeError):
        return [0 if t is None or t.is_inference() else t._version for t in tensors]  # noqa: SLF001


def storage_of(t: Tensor) -> int:
    """A number that is equal for tensors in the same storage; -1 for subclasses of tensors that have no storage of their own."""
    try:
        return t.untyped_storage()._cdata  # noqa: SLF001
    except (NotImplementedError, RuntimeError):
        return -1


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is one of torch's convolutions, transposed and lazy ones too."""
    return isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Names of the buffers that ``state_dict()`` leaves out."""
    return module._non_persistent_buffers_set  # type: ignore[return-value]  # noqa: SLF001


def hooks_without(state: dict[str, Any], kind: type) -> dict[str, Any]:
    """A module's ``__dict__`` without those hooks for forwards, ``state_dict()`` and ``load_state_dict()`` that are of a class."""
    cleaned = dict(state)
    for name in ("_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
        hooks = state[name]
        kept = ((key, hook) for key, hook in hooks.items() if not isinstance(getattr(hook, "hook", hook), kind))
        cleaned[name] = type(hooks)(kept)
    return cleaned
