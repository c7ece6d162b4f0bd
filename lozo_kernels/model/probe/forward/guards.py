"""What would make a probe silently wrong, noticed before it does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..members import Member
from .install import Installation


class Guards:
    """Watches a model for weights that change, modules that are replaced and adapters that are merged."""

    def __init__(self, model: nn.Module, members: Sequence[Member]) -> None:
        self._members = members
        self._versions: list[int] = []
        self._adapters = [(name, m) for name, m in model.named_modules() if hasattr(m, "merged_adapters")]
        self._places = [
            (parent._modules, key, child, f"{name}.{key}" if name else key)
            for name, parent in model.named_modules()
            for key, child in parent._modules.items()
            if child is not None
        ]
        self._installation: Installation | None = None

    def installed(self, installation: Installation) -> None:
        """Forwards were put into modules; they have to stay there."""
        self._installation = installation

    def look(self) -> None:
        """Remembers the weights as they are."""
        self._versions = [_version(m) for m in self._read_only()]

    def check_weights(self) -> None:
        """Raises RuntimeError if a weight changed since :meth:`look`."""
        for member, version in zip(self._read_only(), self._versions, strict=False):
            if _version(member) != version:
                raise RuntimeError(
                    f"{member.name!r} was changed during the evaluations of a step: a probe only reads weights, and so must "
                    "the closure"
                )

    def check_modules(self) -> None:
        """Raises RuntimeError if a module or a forward of it was replaced, or an adapter merged."""
        for modules, key, child, name in self._places:
            if modules.get(key) is not child:
                raise RuntimeError(f"module {name!r} was replaced after patching: restore() and patch the model again")
        if self._installation is not None:
            name = self._installation.lost()
            if name is not None:
                raise RuntimeError(
                    f"the forward of module {name!r} was replaced after patching: restore() and patch the model again"
                )
        self.check_adapters()

    def check_adapters(self) -> None:
        """Raises RuntimeError if an adapter is merged into its layer."""
        for name, module in self._adapters:
            if module.merged_adapters:
                raise RuntimeError(
                    f"the adapter of {name!r} is merged into its layer, which then does not run it: unmerge it before training"
                )

    def _read_only(self) -> list[Member]:
        return [m for m in self._members if m.side not in (None, "inplace") and m.within_reach]


def _version(member: Member) -> int:
    """Another number whenever the weight was changed: of a DTensor in blocks as such, or through what this process has of it.

    Weights that were made in inference mode do not count their changes.
    """
    p = member.slot.parameter
    if p.is_inference():
        return 0
    own = p._version
    return own + member.present[0]._version if member.in_blocks else own
