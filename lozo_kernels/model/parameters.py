"""Finds the parameters of a model that are trained: their names, how each is seen as matrices, and where it lies."""

from __future__ import annotations

import dataclasses
import fnmatch
import weakref
from collections.abc import Hashable, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..kernels.noise import tensor_id, tensor_ids
from ..kernels.table import check_apart
from .config import NOISE_LEFT, PatchConfig
from .layout import Layout
from .modules import is_convolution, own_buffers, own_parameters
from .offload import offloaded_weights, same_weight
from .sharding import is_sharded, reshard, stays_in_blocks
from .storage import Offloaded, Owner, Quantised, Sharded, Storage, is_quantised

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A trained parameter.

    Attributes:
        name: as in ``model.named_parameters()``, without the prefixes of wrappers.
        aliases: its other names, if it is tied.
        tensor_id: id of the alphabetically first of all names, so it survives a change of registration order. Where another
            parameter has that id, the name was hashed again (:func:`~lozo_kernels.kernels.noise.tensor_ids`).
        layout: the matrices that it is seen as.
        storage: where its values lie.
    """

    name: str
    aliases: tuple[str, ...]
    tensor_id: int
    layout: Layout
    storage: Storage

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter as the model has it now."""
        return self.storage.tensor

    @property
    def hashed_again(self) -> bool:
        """Whether the id of its name was taken by another parameter's."""
        return self.tensor_id != tensor_id(min((self.name, *self.aliases)))

    @property
    def low_rank(self) -> bool:
        """Whether its directions have factors (L V^T); otherwise they are dense."""
        return self.layout.low_rank

    @property
    def kind(self) -> str:
        """The kind of its directions, "lowrank" or "dense", as a word."""
        return "lowrank" if self.layout.low_rank else "dense"

    @property
    def extent(self) -> tuple[int, int, int]:
        """(batch, rows, cols) of the matrices."""
        return self.storage.extent


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """A parameter that is not trained, and why."""

    name: str
    tensor: Tensor
    reason: str


@dataclasses.dataclass
class _Found:
    """One parameter of a model: its names without wrappers, and the modules that own it."""

    names: list[str] = dataclasses.field(default_factory=list)
    owners: list[Owner] = dataclasses.field(default_factory=list)

    @property
    def tensor(self) -> nn.Parameter:
        p = self.owners[0].tensor
        assert p is not None
        return p


def find_parameters(
    model: nn.Module, config: PatchConfig, elsewhere: type[Storage] | None = None
) -> tuple[list[Parameter], list[LeftAlone]]:
    """Returns the parameters that ``config`` trains in ``model``, tied ones once, and those that it leaves alone.

    A probe also trains offloaded weights, and quantised linear layers although their weights do not require a gradient (under the
    adapters of PEFT only those that ``include`` names).

    Args:
        elsewhere: the storage of all parameters, if the model only says what they are (it is on the meta device) and the weights
            are in another program.

    Raises:
        TypeError: a parameter to train is sparse, complex, on the meta device or of an unsupported dtype, or a module is lazy.
        ValueError: nothing is trainable, a pattern matches nothing, two parameters that are not tied share storage, or strides do
            not fit.
    """
    _check_initialised(model)
    reshard(model)
    every = _collect(model)
    _check_patterns(config, [name for found in every for name in found.names])
    # Quantised layers under adapters are the adapters' frozen base, and trained only if asked for.
    adapted = any(hasattr(module, "merged_adapters") for module in model.modules())
    chosen, left = [], []
    for found in every:
        anyway = _trains_quantised(config, found) and (not adapted or config.include is not None)
        reason = _why_not(found.tensor, found.names, config, anyway)
        if reason is None:
            chosen.append(found)
        else:
            left.append(LeftAlone(found.names[0], found.tensor, reason))
    if not chosen:
        raise ValueError(
            "the model has no trainable parameter"
            + (f" ({len(left)} were left alone, e.g. {left[0].name!r}: {left[0].reason})" if left else "")
        )
    ids = tensor_ids(min(found.names) for found in chosen)
    parameters = []
    for found in chosen:
        name, aliases = found.names[0], tuple(dict.fromkeys(found.names[1:]))
        layout = _layout_of(found, config)
        storage = _storage_of(model, found, layout, config) if elsewhere is None else elsewhere(found.owners, layout)
        storage.check(config)
        parameters.append(Parameter(name, aliases, ids[min(found.names)], storage.layout, storage))
    here = [p for p in parameters if p.storage.resident]
    check_apart([(f"parameter {p.name!r}", p.storage.shard().x) for p in here])
    return parameters, left


def _check_initialised(model: nn.Module) -> None:
    """Raises TypeError if the model has a lazy module that did not run yet."""
    for name, module in model.named_modules():
        tensors = (*own_parameters(module).values(), *own_buffers(module).values())
        if any(is_lazy(t) for t in tensors if t is not None):
            raise TypeError(
                f"module {name!r} ({type(module).__name__}) is lazy and has no weights yet: call the model once before patching"
            )


def canonical(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    for wrapper in _WRAPPERS:
        while f".{name}".find(f".{wrapper}") >= 0:
            name = f".{name}".replace(f".{wrapper}", ".", 1)[1:]
    return name


def _collect(model: nn.Module) -> list[_Found]:
    """Returns the parameters of a model, tied ones once.

    Offloaded weights count as tied if they are one tensor in memory or one entry of a checkpoint, or if the model says so
    (``all_tied_weights_keys`` of transformers) and their values are equal.
    """
    kept = offloaded_weights(model)
    owners: dict[str, Owner] = {}
    ties: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        before = f"{path}." if path else ""
        for attribute, p in own_parameters(module).items():
            if p is not None:
                away = kept[module].parameter(attribute) if module in kept else None
                owners[before + attribute] = Owner(weakref.ref(module), path, attribute, away)
        ties |= {before + a: before + b for a, b in (getattr(module, "all_tied_weights_keys", None) or {}).items()}
    keys = {name: _identity(owner) for name, owner in owners.items()}
    for name, other in ties.items():
        pair = [owners[n] for n in (name, other) if n in owners]
        if len(pair) == 2 and any(owner.kept is not None for owner in pair):
            one, two = ((owner.tensor, owner.kept) for owner in pair)
            if same_weight(one, two):  # type: ignore[arg-type]
                old, new = keys[name], keys[other]
                keys = {n: new if key == old else key for n, key in keys.items()}
    every: dict[Hashable, _Found] = {}
    seen = set()
    for name, owner in owners.items():
        found = every.setdefault(keys[name], _Found())
        found.names.append(canonical(name))
        if (owner.reference, owner.attribute) not in seen:  # a module may be in the model twice
            seen.add((owner.reference, owner.attribute))
            found.owners.append(owner)
    return list(every.values())


def _identity(owner: Owner) -> Hashable:
    """A key that is equal for tied parameters."""
    p = owner.tensor
    return id(p) if owner.kept is None or p is None or p.device.type != "meta" else owner.kept.identity


def _trains_quantised(config: PatchConfig, found: _Found) -> bool:
    probes = config.placement != "inplace" and config.estimator in NOISE_LEFT and not config.per_example
    return probes and is_quantised(found.owners[0].module, found.tensor)


def _storage_of(model: nn.Module, found: _Found, layout: Layout, config: PatchConfig) -> Storage:
    p = found.tensor
    if is_sharded(p):
        return Sharded(found.owners, layout, stays_in_blocks(model, p))
    if _trains_quantised(config, found):
        return Quantised(found.owners, layout)
    if config.placement != "inplace" and any(owner.kept is not None for owner in found.owners):
        return Offloaded(found.owners, layout)
    return Storage(found.owners, layout)


def _layout_of(found: _Found, config: PatchConfig) -> Layout:
    name, module, p = found.names[0], found.owners[0].module, found.tensor
    if is_quantised(module, p):
        return Layout(name, True, "matrix")
    if config.estimator == "dense" or p.dim() < 2:
        return Layout(name, False, "flat")
    if _matches(found.names, config.square_patterns):
        return Layout(name, True, "square")
    if p.dim() == 2:
        return Layout(name, True, "matrix")
    if p.dim() == 3 and not is_convolution(module):
        return Layout(name, True, "experts")
    return Layout(name, True, "rows")


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(n, pattern) for n in names for pattern in patterns)


def _check_patterns(config: PatchConfig, names: Sequence[str]) -> None:
    for field in ("include", "exclude"):
        for pattern in getattr(config, field) or ():
            if not _matches(names, (pattern,)):
                raise ValueError(
                    f"{field} pattern {pattern!r} matches no parameter; names look like {', '.join(map(repr, names[:3]))}"
                )


def _why_not(p: Tensor, names: Sequence[str], config: PatchConfig, anyway: bool) -> str | None:
    if not p.requires_grad and not anyway:
        return "requires_grad is False"
    if config.include is not None and not _matches(names, config.include):
        return "matches no include pattern"
    if config.exclude is not None and _matches(names, config.exclude):
        return "matches an exclude pattern"
    return None
