"""Weights that no evaluation used yet: should an operator take one all the same, it is given the perturbed weight.

Nothing else would notice a weight of a module that does not run if a module reads it that ran before without it
(``F.linear(x, self.inner.weight)`` in a branch).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from ....errors import BatchSplitError
from ..members import Member
from ..runtime import Runtime
from .swapping import Fill

_STORAGE = {"data", "grad", "detach"}  # names of what is asked for the parameter itself


class UnusedParameter(nn.Parameter):
    """The class of a parameter for as long as it is unused. It stays the same object, and copies of it are ordinary parameters."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  (as torch's own subclasses do)
            result = func(*args, **(kwargs or {}))
            if _is_about_storage(func) or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
                return result
            given, more = tree_map(_perturbed, (args, kwargs or {}))
            changed = any(a is not b for a, b in zip(tree_leaves((args, kwargs or {})), tree_leaves((given, more)), strict=True))
            return func(*given, **more) if changed else result

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]


class UnusedWeights:
    """Watches over the unused parameters of some members.

    Args:
        used: called with a member when an operator takes its weight for the first time.
    """

    def __init__(
        self, model: nn.Module, runtime: Runtime, members: Sequence[Member], fill: Fill, used: Callable[[Member], None]
    ) -> None:
        self._runtime, self._fill, self._used = runtime, fill, used
        self._modules = set(map(id, model.modules()))
        self._seen: set[Member] = set()
        self._before: dict[Member, tuple[nn.Parameter, type]] = {}
        for member in members:
            p = member.parameter.tensor
            if member.storage.resident and type(p) is nn.Parameter:
                self._before[member] = p, type(p)
                _OWNERS[p] = (self, member)
                p.__class__ = UnusedParameter

    def leave(self, some: Sequence[Member] | None = None) -> None:
        """Gives parameters their own class back. None stands for all."""
        for member in list(self._before) if some is None else some:
            if member in self._before:
                p, kind = self._before.pop(member)
                p.__class__ = kind

    def perturbed(self, member: Member, p: Tensor) -> Tensor:
        """Returns the weight that an operator gets in place of a member's parameter."""
        runtime = self._runtime
        if member.swapped or not self._is_for_model(member):
            return p
        if member not in self._seen:
            self._seen.add(member)
            self._used(member)
        if not runtime.live or not member.enabled or member.side == "inplace":
            return p
        if runtime.groups > 1:
            raise BatchSplitError(
                f"{member.name!r} is used for the first time, in a forward pass of several evaluations: take the step again"
            )
        out = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        self._fill(member, out, runtime.selected or 0)
        return out

    def _is_for_model(self, member: Member) -> bool:
        """Whether an evaluation of the model takes the weight, and not something that reads or converts parameters. A module that
        has the parameter adds itself what it lacks."""
        owners = {id(owner.module) for owner in member.owners}
        frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  (faster than inspect)
        while frame is not None:
            if frame.f_code.co_name == "forward":
                module = id(frame.f_locals.get("self"))
                if module in owners:
                    return False
                if module in self._modules:
                    return True
            frame = frame.f_back
        return any(point.scale for point in self._runtime.points)


_OWNERS: Any = WeakTensorKeyDictionary()  # for each unused parameter who watches over it, and its member


def _is_about_storage(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", "")
    return name in _STORAGE or (name.endswith("_") and not name.endswith("__")) or name in ("__set__", "__setitem__", "__iadd__")


def _perturbed(x: Any) -> Any:
    if not isinstance(x, UnusedParameter) or x not in _OWNERS:
        return x
    weights, member = _OWNERS[x]
    return weights.perturbed(member, x)
