"""Ways of torch around modules, on which a parent reads the weights of its children, and how they are closed and opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...overriding import Hook
from ..members import Member

_WITH_FAST_PATH = (nn.TransformerEncoderLayer,)


def close_fast_paths(model: nn.Module, members: Sequence[Member]) -> list[torch.utils.hooks.RemovableHandle]:
    """Makes layers call their children where the weights of these are perturbed in the children.

    In eval mode ``nn.TransformerEncoderLayer`` computes without calling a child, unless a child or the layer has a hook. The hook
    does nothing, and the path is open again when it is removed.
    """
    layers = [module for module in model.modules() if isinstance(module, _WITH_FAST_PATH)]
    return [layer.register_forward_pre_hook(_Nothing()) for layer in layers if not all_swapped(layer, members)]


def all_swapped(module: nn.Module, members: Sequence[Member]) -> bool:
    """Whether a module has trained parameters and runs with all of them perturbed, so that it may read them as it likes."""
    inside = set(module.modules())
    own = [member for member in members if any(owner.module in inside for owner in member.owners)]
    return bool(own) and all(_is_swapped_for(module, member) for member in own)


def _is_swapped_for(module: nn.Module, member: Member) -> bool:
    if member.side == "inplace":
        return True
    return member.side in ("scratch", "copy") and any(module is inner for scope in member.scopes for inner in scope.modules())


class _Nothing(Hook):
    """A forward pre-hook that does nothing."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None: ...
