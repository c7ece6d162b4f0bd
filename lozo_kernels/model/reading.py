"""Brings weights up to date before something other than a step reads them, copies them or overwrites them.

Between steps the weights of a model can lack what was learned: a probe keeps it in factors, and ``fuse_steps`` leaves an update
pending and a perturbation in the weights. What torch and its libraries read weights through is hooked here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

from .modules import hooks_without
from .overriding import Hook, Overrides

BeforeRead = Callable[[str], bool]
"""Brings the weights up to date, and returns whether they were not. The argument says what for: "forward", "state_dict",
"load_state_dict", "copy", "parameters" or "adapter" (PEFT merges it into its layer)."""

_LOOKERS = (
    *("accelerate.", "transformers.", "peft.", "lozo_kernels."),
    *("torch.optim.", "torch.nn.utils.clip_grad.", "torch.nn.parallel."),
)
"""Code that walks over parameters without reading their values."""
_READERS = ("torch.optim.swa_utils",)  # although it is in torch.optim
_LOOKS = ("zero_grad", "requires_grad_")
_MODULE = nn.Module.__module__
_MANY_READS = 10


class ReadHooks:
    """Calls ``before_read`` whenever the weights of a model or a part of it are read from outside of a step.

    That is before ``state_dict()``, ``load_state_dict()``, ``parameters()``, a copy or pickle (which are then of the model as it
    was before it was patched, with what it learned), and a merge of PEFT's adapters.

    Args:
        overrides: what else was put into the modules, which copies are to be without.
        forwards: also before forward passes.
    """

    def __init__(self, model: nn.Module, before_read: BeforeRead, overrides: Overrides, *, forwards: bool = False) -> None:
        self._before_read, self._overrides = before_read, overrides
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._reads = 0
        saving, loading, running = (_Hook(before_read, use) for use in ("state_dict", "load_state_dict", "forward"))
        for module in model.modules():
            self._handles.append(module.register_state_dict_pre_hook(saving))
            self._handles.append(module.register_load_state_dict_pre_hook(loading))
            if forwards:
                self._handles.append(module.register_forward_pre_hook(running))
            self._override(module)

    def remove(self) -> None:
        """Takes the hooks out, and everything that the overrides put into modules."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._overrides.remove()

    def _override(self, module: nn.Module) -> None:
        put = self._overrides.put
        put(module, "__reduce_ex__", _Reduce(module, self._reduce))
        if hasattr(type(module), "__deepcopy__"):  # otherwise copies are made by __reduce_ex__
            put(module, "__deepcopy__", _Reduce(module, self._deepcopy))
        put(module, "named_modules", self._noticing(module))  # through which parameters() gets at those of all modules
        if hasattr(type(module), "merged_adapters"):
            merge: Any = module.merge

            def merged(*args: Any, **kwargs: Any) -> Any:
                self._before_read("adapter")
                return merge(*args, **kwargs)

            put(module, "merge", merged)

    def _noticing(self, module: nn.Module) -> Callable[..., Any]:
        own = module.named_modules

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                reader = _reader(sys._getframe(1))  # noqa: SLF001  (faster than inspect)
                if reader is not None and self._before_read("parameters"):
                    self._count(reader)
            return own(*args, **kwargs)

        return call

    def _count(self, reader: FrameType) -> None:
        self._reads += 1
        if self._reads == _MANY_READS:
            warnings.warn(
                f"{reader.f_code.co_filename}, line {reader.f_lineno}, goes through the model's parameters again and again: each "
                "time the weights are brought up to date for it, which costs a pass over them. If it needs no values, take a dtype "
                "or a device from elsewhere",
                stacklevel=4,
            )

    def _reduce(self, module: nn.Module, protocol: Any) -> Any:
        self._before_read("copy")
        reduced = type(module).__reduce_ex__(module, protocol)
        state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
        if not isinstance(state, dict):
            raise TypeError(
                f"a patched {type(module).__name__}, which says itself how it is saved, cannot be copied: call restore() of its "
                "handle first, or copy it before patching"
            )
        return (*reduced[:2], self._clean(module, state), *reduced[3:])

    def _deepcopy(self, module: nn.Module, memo: Any) -> Any:
        """As a class copies itself, but without what was put into the module, which is out of it meanwhile."""
        self._before_read("copy")
        owned = module.__dict__
        before = dict(owned)
        try:
            owned.clear()
            owned.update(self._clean(module, before))
            return type(module).__deepcopy__(module, memo)  # type: ignore[attr-defined]
        finally:
            owned.clear()
            owned.update(before)

    def _clean(self, module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        return hooks_without(self._overrides.without(module, state), Hook)


class _Hook(Hook):
    """Calls ``before_read``."""

    def __init__(self, before_read: BeforeRead, use: str) -> None:
        self._before_read, self._use = before_read, use

    def __call__(self, *_: Any) -> None:
        self._before_read(self._use)


class _Reduce:
    """``__reduce_ex__`` or ``__deepcopy__`` of one module."""

    def __init__(self, module: nn.Module, make: Callable[[nn.Module, Any], Any]) -> None:
        self._module, self._make = module, make

    def __call__(self, argument: Any) -> Any:
        return self._make(self._module, argument)


def _reader(frame: FrameType | None) -> FrameType | None:
    """The frame that goes through parameters and may read them; None if modules are asked for something else."""
    asked = False
    while frame is not None and frame.f_globals.get("__name__") == _MODULE:
        if frame.f_code.co_name in _LOOKS:
            return None
        asked = asked or frame.f_code.co_name == "named_parameters"
        frame = frame.f_back
    name = "" if frame is None else str(frame.f_globals.get("__name__"))
    return frame if asked and (name in _READERS or not f"{name}.".startswith(_LOOKERS)) else None
