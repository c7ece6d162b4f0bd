"""Looks again where the first evaluation could not look: at modules that run for the first time, and in another mode."""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...conditions import Buffers, Conditions
from ...overriding import Hook
from ..forward.fast_paths import all_swapped
from ..forward.unused import UnusedWeights
from ..members import Member
from .choice import widen
from .trace import Watch, watching

_TRAINING = operator.attrgetter("training")
_PLAIN = (Tensor, int, float, str, type(None))


class Uncovered(Watch):
    """Records only reads of a weight that a probe does not perturb.

    Attributes:
        found: by member, the modules that read its own storage although its perturbation enters elsewhere; None stands for outside
            of all.
    """

    def __init__(self, members: Iterable[Member]) -> None:
        super().__init__(members)
        self.found: dict[Member, dict[nn.Module | None, None]] = {}

    def note(self, member: Member) -> None:
        running = [module for module, _ in self.running]
        if not _is_covered(member, running):
            self.found.setdefault(member, {})[running[-1] if running else None] = None


class Lookout:
    """Notices forwards in which a weight may be read in a way that no trace has seen, and traces them.

    These are the first forward of the model with another pattern of ``training`` flags, and the first forward of a module that
    never ran. If a weight is read there that is not perturbed, the modules that read it run with the perturbed weight from then on,
    and the forward is made again. In compiled code nothing is noticed.

    Attributes:
        asleep: whether there are modules that never ran.

    Args:
        reinstall: puts sides that changed into the model while forwards of it run. None of these is "copy" or "inplace".

    Attributes:
        unused: looks after parameters that no evaluation used; None before these are known.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Sequence[Member],
        reinstall: Callable[[], None],
    ) -> None:
        self.unused: UnusedWeights | None = None
        self._quiet = False
        self._woken: set[nn.Module] = set()
        self._moved: set[Member] = set()
        self._model, self._members = model, members
        self._reinstall = weakref.WeakMethod(reinstall)
        self._modules = list(model.modules())
        self._modes: list[bool] = []
        self._seen: set[tuple[bool, ...]] = set()
        self._hooks: dict[nn.Module, torch.utils.hooks.RemovableHandle] = {}
        self._root: torch.utils.hooks.RemovableHandle | None = None
        self._surveyed = False
        self._hook = _Seen(self._enter)
        self._looking = contextlib.ExitStack()
        self._at: nn.Module | None = None  # whose forward is traced

    @property
    def asleep(self) -> bool:
        """Whether there are modules that never ran."""
        return bool(self._hooks)

    def due(self) -> bool:
        """Whether the next evaluation should be looked at as a whole."""
        if self._at is not None:
            self._stop()
        return bool(self._moved or self._woken) or self.is_new_mode()

    def stand(self) -> None:
        """Looks out from now on, for forwards of the model in modes that no trace has seen. A second call does nothing."""
        if self._root is None:
            self._root = self._model.register_forward_pre_hook(self._hook)

    def survey(self, ran: set[nn.Module]) -> None:
        """Takes note of the modules that ran in a whole evaluation, in the present mode. The others are awaited."""
        self._saw(ran)
        if self._surveyed:
            return
        self._surveyed = True
        scopes = {scope for member in self._members for scope in member.scopes} & ran
        hidden = {inner for scope in scopes if all_swapped(scope, self._members) for inner in scope.modules()}
        for module in set(self._modules) - ran - hidden - {self._model}:
            if type(module).forward is not nn.Module.forward:  # a list of modules never runs
                self._hooks[module] = module.register_forward_pre_hook(self._hook)

    def notice(self, member: Member) -> None:
        """A weight was used that no evaluation used before."""
        self._woken.update(owner.module for owner in member.owners)

    def leave(self) -> None:
        """Stops looking out."""
        if self.unused is not None:
            self.unused.leave()
        for hook in (*self._hooks.values(), *([] if self._root is None else [self._root])):
            hook.remove()
        self._hooks.clear()
        self._root = None

    @contextlib.contextmanager
    def hushed(self) -> Iterator[None]:
        """While the body runs, forwards are looked at by others."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def take(self) -> tuple[set[nn.Module], list[Member]]:
        """Returns, once, the modules that ran for the first time and the members that were put on another side."""
        woken, moved = self._woken, [m for m in self._members if m in self._moved]
        self._woken, self._moved = set(), set()
        return woken, moved

    def settle(self, watch: Uncovered) -> None:
        """Chooses other sides for the weights that a watch found. Forwards may be running that use them."""
        for member, modules in watch.found.items():
            if None in modules:
                member.settle_on("inplace", "used outside of any module")
            else:
                widen(member, [m for m in modules if m is not None], self._members)
            self._moved.add(member)
        self._leave_used(watch.found)

    def is_new_mode(self) -> bool:
        """Whether ``training`` flags are as no trace has seen them."""
        modes = list(map(_TRAINING, self._modules))
        if modes == self._modes:
            return False
        if tuple(modes) not in self._seen:
            return True
        self._modes = modes
        return False

    def _leave_used(self, members: Iterable[Member]) -> None:
        if self.unused is not None:
            self.unused.leave(list(members))

    def _saw(self, ran: set[nn.Module]) -> None:
        self._modes = list(map(_TRAINING, self._modules))
        self._seen.add(tuple(self._modes))
        for module in ran:
            hook = self._hooks.pop(module, None)
            if hook is not None:
                hook.remove()
                self._woken.add(module)
        self._leave_used(m for m in self._members if any(owner.module in ran for owner in m.owners))

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a forward of the model, or of a module that never ran."""
        if module is self._model and self._at is not None:
            self._stop()  # of a forward that was interrupted
        if self._quiet or self._at is not None or not (module in self._hooks or self.is_new_mode()):
            return
        watch, devices = Uncovered(self._members), list(dict.fromkeys(m.device for m in self._members))
        before = Conditions(devices, Buffers(module), randomness=True)
        self._looking.enter_context(watching(self._model, watch))
        self._at = module
        watch.enter(module, args)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            hook.remove()
            self._stop()
            if output is None:  # it raised
                return None
            self.settle(watch)
            self._saw(watch.ran)
            return self._make_again(module, args, kwargs, before) if watch.found else None

        hook = module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True)

    def _stop(self) -> None:
        """Ends a trace, also one that an interrupt left."""
        self._looking.close()
        self._at = None

    def _make_again(self, module: nn.Module, args: Any, kwargs: Any, before: Conditions) -> Any:
        reinstall = self._reinstall()
        assert reinstall is not None
        reinstall()
        if not all(isinstance(x, _PLAIN) for x in tree_leaves((args, kwargs))):
            raise RuntimeError(
                f"{type(module).__name__} reads weights in a way that it did not when sides were chosen, so this output is without "
                "what they learned; that is mended now, but its inputs may have changed (a cache?): make this call again"
            )
        before.put_back()
        with self.hushed():
            return module.forward(*args, **kwargs)


def _is_covered(member: Member, running: Sequence[nn.Module]) -> bool:
    """Whether the perturbation of a member is seen by an operator that runs in some modules, innermost last."""
    if member.side in ("activation", "shift"):
        return bool(running) and any(owner.module is running[-1] for owner in member.owners)
    if member.side in ("scratch", "copy"):
        return any(scope in running for scope in member.scopes)
    return True


class _Seen(Hook):
    """A forward pre-hook that calls a bound method for as long as its object lives, and not in compiled code."""

    def __init__(self, method: Callable[[nn.Module, tuple[Any, ...]], None]) -> None:
        self._method = weakref.WeakMethod(method)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            method = self._method()
            if method is not None:
                method(module, args)
