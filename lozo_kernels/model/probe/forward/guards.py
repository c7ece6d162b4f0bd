"""What would make a probe silently wrong, noticed before it does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...modules import children_by_name, own_parameters, version_of
from ...sharding import local_of
from ..members import Member
from .install import Installation


class Guards:
    """Watches a model for weights that change, modules that are replaced and adapters that are merged."""

    def __init__(self, model: nn.Module, members: Sequence[Member]) -> None:
        self._members = members
        self._read: list[tuple[dict[str, nn.Parameter | None], str, Member]] = []
        self._versions: list[int] = []
        self._adapters = [(name, m) for name, m in model.named_modules() if hasattr(m, "merged_adapters")]
        self._places = [
            (children_by_name(parent), key, child, f"{name}.{key}" if name else key)
            for name, parent in model.named_modules()
            for key, child in children_by_name(parent).items()
            if child is not None
        ]
        self._installation: Installation | None = None

    def installed(self, installation: Installation) -> None:
        """Forwards were put into modules; they have to stay there, and the weights that they read as they are."""
        self._installation = installation
        read_only = [m for m in self._members if m.side not in (None, "inplace") and m.storage.always_here]
        self._read = [(own_parameters(m.owners[0].module), m.owners[0].attribute, m) for m in read_only]
        self._versions = []

    def look(self) -> None:
        """Remembers the weights as they are."""
        self._versions = self._now()

    def check_weights(self) -> None:
        """Raises RuntimeError if a weight changed since :meth:`look`."""
        for (_, _, member), before, now in zip(self._read, self._versions, self._now(), strict=False):
            if before != now:
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
            lost = self._installation.lost()
            if lost is not None:
                raise RuntimeError(
                    f"the forward of module {lost!r} was replaced after patching: restore() and patch the model again"
                )
        self.check_adapters()

    def check_adapters(self) -> None:
        """Raises RuntimeError if an adapter is merged into its layer."""
        for name, module in self._adapters:
            if module.merged_adapters:
                raise RuntimeError(
                    f"the adapter of {name!r} is merged into its layer, which then does not run it: unmerge it before training"
                )

    def _now(self) -> list[int]:
        """For each weight a number that grows when it is changed: a DTensor in blocks as such, or through this process's block."""
        versions = []
        for owned, attribute, member in self._read:
            p = owned[attribute]
            assert p is not None
            versions.append(version_of(p) + (version_of(local_of(p)) if member.storage.in_blocks else 0))
        return versions
