"""Records where a forward pass uses each parameter, at the dispatcher and by storage, so that no way to a weight is missed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...modules import own_parameters, storage_of
from ...sharding import is_sharded, local_of, why_not_local
from ...storage import Owner, layer_kind
from ..forward.activation import summed_dimension
from ..members import Member


@dataclasses.dataclass(eq=False)
class Uses:
    """How a forward pass used one parameter.

    Attributes:
        modules: the innermost modules that were running when an operator took its storage; None stands for outside of all.
        tokens: rows of the largest input of those modules.
        obstacle: why the layers of a weight in blocks do not compute with this process's block alone, or None.
    """

    modules: dict[nn.Module | None, None] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    obstacle: str | None = None


class Watch(TorchDispatchMode):
    """Records a forward pass.

    Attributes:
        uses: by member.
        dtypes: of all floating-point tensors that operators were given, autocast's included.
        ran: the modules that ran.
        running: the modules that are running, innermost last, and the rows of their largest input.
    """

    def __init__(self, members: Iterable[Member]) -> None:
        super().__init__()
        self.uses: dict[Member, Uses] = {member: Uses() for member in members}
        self.dtypes: set[torch.dtype] = set()
        self.ran: set[nn.Module] = set()
        self.running: list[tuple[nn.Module, int]] = []
        self._by_storage: dict[int, Member] = {}
        self._away: list[tuple[nn.Module, str, Member]] = []  # weights that are brought in while their module runs
        self._layers: dict[nn.Module, list[tuple[Member, Owner]]] = {}
        for member in self.uses:
            if member.storage.always_here:
                self._by_storage[_storage(member.storage.present()[0])] = member
            else:
                self._away += [(owner.module, owner.attribute, member) for owner in member.owners]
            for owner in member.owners if member.storage.in_blocks else ():
                self._layers.setdefault(owner.module, []).append((member, owner))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device")) == "meta":  # a hook takes an offloaded weight out again
            return func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                if leaf.is_floating_point():
                    self.dtypes.add(leaf.dtype)
                member = self._find(leaf)
                if member is not None:
                    self.note(member)
        return func(*args, **kwargs)

    def _find(self, tensor: Tensor) -> Member | None:
        storage = _storage(tensor)
        if storage in self._by_storage:
            return self._by_storage[storage]
        for module, attribute, member in self._away:
            p = own_parameters(module).get(attribute)
            if p is not None and p.device.type != "meta" and not is_sharded(p) and _storage(p) == storage != -1:
                return member
        return None

    def look_at_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a module ran: records whether it computed with this process's block of its weight alone."""
        for member, owner in self._layers.get(module, ()):
            kind = layer_kind(owner)
            if kind is not None:
                summed, lookup = summed_dimension(kind), kind == "embedding"
                found = why_not_local(member.parameter.tensor, args[0] if args else None, output, summed, lookup)
                self.uses[member].obstacle = found or self.uses[member].obstacle

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a module runs."""
        self.running.append((module, _tokens(args)))
        self.ran.add(module)

    def note(self, member: Member) -> None:
        """Records that an operator took the storage of a parameter."""
        uses = self.uses[member]
        module, tokens = self.running[-1] if self.running else (None, 0)
        uses.modules[module] = None
        uses.tokens = max(uses.tokens, tokens)


W = TypeVar("W", bound=Watch)


@contextlib.contextmanager
def watching(model: nn.Module, watch: W) -> Iterator[W]:
    """Lets a watch record while the body runs forward passes of the model in eager mode."""
    inside = set(model.modules())

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in inside:
            watch.enter(module, args)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in inside:
            watch.running.pop()
            watch.look_at_layer(module, args, output)

    hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True))
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _storage(tensor: Tensor) -> int:
    return storage_of(local_of(tensor) if is_sharded(tensor) else tensor)


def _tokens(args: tuple[Any, ...]) -> int:
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if first is None:
        return 0
    return first.numel() // max(1, first.size(-1)) if first.is_floating_point() and first.dim() else first.numel()
