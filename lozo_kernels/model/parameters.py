"""Which parameters of a model are trained, under which name, and how each is seen by the ops."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.noise import tensor_ids
from ..kernels.table import DTYPES, check_apart, storage_problem, stride_problem
from .config import PatchConfig
from .offload import find_homes, identities
from .sharding import block_of, check_block, check_shards, is_sharded, reshard

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclasses.dataclass(frozen=True)
class Slot:
    """A trained parameter: where it lives, its name in the noise, and the way it is seen.

    The tensor is looked up at every use, so replaced parameters and moved storage are followed.

    Attributes:
        name: as in ``model.named_parameters()``, without the prefixes of wrappers.
        aliases: its other names, if it is tied.
        tensor_id: id of the alphabetically first of all names, so it survives a change of registration order.
        kind: "lowrank" or "dense".
        layout: "matrix", "experts" (one matrix each), "rows" (first dimension by the rest, as for convolutions), "square" (see
            :func:`most_square`) or "flat".
        out_of_reach: why the storage cannot be changed as it is ("offloaded", "quantised", "sharded"), or None. Of these only
            sharded ones can be moved in place.
    """

    owner: weakref.ref[nn.Module]
    attribute: str
    name: str
    aliases: tuple[str, ...]
    tensor_id: int
    kind: str
    layout: str
    out_of_reach: str | None = None

    @property
    def extent(self) -> tuple[int, int, int]:
        """(batch, rows, cols) of :meth:`view`, without looking at storage; a contiguous tensor's where the layout is "flat"."""
        p = self.parameter
        if self.out_of_reach == "quantised":  # the storage may be packed
            module: Any = self.owner()
            return 1, module.out_features, module.in_features
        if self.layout == "flat":
            return 1, 1, p.numel()
        if self.layout == "rows":
            return 1, p.shape[0], math.prod(p.shape[1:])
        if self.layout == "square":
            return 1, *most_square(p.numel())
        return (1, p.shape[0], p.shape[1]) if p.dim() == 2 else (p.shape[0], p.shape[1], p.shape[2])

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now."""
        module = self.owner()
        p = None if module is None else module._parameters.get(self.attribute)
        if p is None:
            raise RuntimeError(f"parameter {self.name!r} no longer exists: restore() and patch the model again")
        return p

    def view(self) -> Tensor:
        """The parameter's storage as (batch, rows, cols), detached.

        Raises:
            TypeError: it is sparse, on the meta device or of an unsupported dtype.
            ValueError: its strides do not allow changing it in place.
        """
        p = self.parameter.detach()
        check_trainable(self.name, p)
        x = self.matrices(p)
        problem = stride_problem(x)
        if problem is not None:
            raise self._bad_strides(p, problem)
        return x

    def matrices(self, p: Tensor) -> Tensor:
        """A tensor of the parameter's shape as (batch, rows, cols)."""
        if self.layout == "flat":
            if p.is_contiguous():
                return p.view(1, 1, -1)
            if p.dim() == 1:  # every element a row: the flat index is the row
                return p.view(1, -1, 1)
        if self.layout == "square" and p.is_contiguous():
            return p.view(1, *most_square(p.numel()))
        if self.layout == "rows":
            try:
                return p.view(1, p.shape[0], math.prod(p.shape[1:]))
            except RuntimeError:
                raise self._bad_strides(p, "its columns must be contiguous") from None
        if p.dim() == 3 and self.layout != "square":
            return p
        if p.dim() == 2 and self.layout != "square":
            return p.unsqueeze(0)
        raise self._bad_strides(p, "it must be contiguous")

    def _bad_strides(self, p: Tensor, problem: str) -> ValueError:
        return ValueError(
            f"parameter {self.name!r} has shape {tuple(p.shape)} and strides {p.stride()}: {problem}; "
            "make it contiguous (param.data = param.data.contiguous()) or exclude it"
        )

    def piece(self) -> Piece:
        """What passes over the weights change in this process: all of the parameter, or its shard."""
        p = self.parameter
        if not is_sharded(p):
            x = self.view()
            return Piece(x, 0, 0, x.shape[2])
        block = block_of(self.name, p)
        local, offsets = block.local, block.offsets
        check_trainable(self.name, local)
        if self.layout == "experts":
            x, row, col, width = local, offsets[0] * p.shape[1], 0, p.shape[2]
        elif p.dim() < 2:
            x, row, col, width = local.reshape(1, 1, -1), 0, sum(offsets), p.numel()
        elif p.dim() == 2:
            x, row, col, width = local.unsqueeze(0), offsets[0], offsets[1], p.shape[1]
        else:  # rows of a convolution, or of any tensor that gets dense noise
            width = math.prod(p.shape[1:])
            x, row, col = local.reshape(1, len(local), width), offsets[0], 0
        problem = stride_problem(x)
        if problem is not None or (x.numel() and x.data_ptr() != local.data_ptr()):
            raise self._bad_strides(local, problem or "it must be contiguous")
        return Piece(x, row, col, width, offsets[0] if self.layout == "experts" else 0)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter, or a shard of it, as an entry of a :class:`~lozo_kernels.kernels.table.TensorTable`.

    Attributes:
        x: (batch, rows, cols), a view of storage.
        row_offset, col_offset, global_cols: as in the table.
        first_matrix: which of the parameter's matrices is the first here.
    """

    x: Tensor
    row_offset: int
    col_offset: int
    global_cols: int
    first_matrix: int = 0


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """A parameter that is not trained, and why."""

    name: str
    tensor: Tensor
    reason: str


def most_square(numel: int) -> tuple[int, int]:
    """Rows and columns of the most nearly square matrix of so many elements, not more rows than columns."""
    rows = next((r for r in range(math.isqrt(numel), 0, -1) if numel % r == 0), 1)
    return rows, numel // rows


def is_quantised(module: nn.Module | None, p: Tensor) -> bool:
    """Whether a linear layer's weight is kept as integers that only the layer itself can read (bitsandbytes, torchao)."""
    if not isinstance(module, nn.Linear) or p is not module._parameters.get("weight"):
        return False
    return not is_sharded(p) and not p.is_complex() and (not p.is_floating_point() or type(p.data) is not Tensor)


def _out_of_reach(module: nn.Module, p: Tensor, config: PatchConfig, offloaded: bool) -> str | None:
    if is_sharded(p):
        return "sharded"
    if config.placement == "inplace":
        return None
    if config.estimator == "lowrank" and is_quantised(module, p):
        return "quantised"
    return "offloaded" if offloaded else None


def find_parameters(model: nn.Module, config: PatchConfig) -> tuple[list[Slot], list[LeftAlone]]:
    """Everything that ``config`` trains in ``model``, tied weights once, and everything that it leaves alone.

    A probe also trains offloaded weights, and quantised linear layers although their weights do not require a gradient (under the
    adapters of PEFT only those that ``include`` names).

    Raises:
        TypeError: a parameter to train is sparse, complex, on the meta device or of an unsupported dtype.
        ValueError: nothing is trainable, a pattern matches nothing, two names share an id, two parameters that are not tied share
            storage, or strides do not fit.
    """
    reshard(model)
    owners: dict[Hashable, tuple[nn.Module, str, Tensor]] = {}
    names: dict[Hashable, list[str]] = {}
    offloaded: set[Hashable] = set()
    homes = find_homes(model)
    identity = identities(model, homes)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, p in module._parameters.items():
            if p is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                key = identity[name]
                owners.setdefault(key, (module, attribute, p))
                names.setdefault(key, []).append(canonical(name))
                if module in homes:
                    offloaded.add(key)
    _check_patterns(config, [n for group in names.values() for n in group])

    # Quantised layers under adapters are their frozen base, unless asked for.
    adapted = any(hasattr(module, "merged_adapters") for module in model.modules())
    chosen, left = [], []
    for key, (module, attribute, p) in owners.items():
        away = _out_of_reach(module, p, config, key in offloaded)
        reason = _why_not(p, names[key], config, away == "quantised" and (not adapted or config.include is not None))
        if reason is None:
            if away in (None, "sharded"):
                check_trainable(names[key][0], p)
            if away == "sharded":
                _check_sharded(model, names[key][0], p, config)
            chosen.append((module, attribute, p, names[key], away))
        else:
            left.append(LeftAlone(names[key][0], p, reason))
    if not chosen:
        raise ValueError(
            "the model has no trainable parameter"
            + (f" ({len(left)} were left alone, e.g. {left[0].name!r}: {left[0].reason})" if left else "")
        )
    ids = tensor_ids(min(aliases) for *_, aliases, _ in chosen)
    slots = []
    for module, attribute, p, aliases, away in chosen:
        kind, layout = _treatment(module, p, aliases, config)
        tensor_id, others = ids[min(aliases)], tuple(dict.fromkeys(aliases[1:]))
        slot = Slot(weakref.ref(module), attribute, aliases[0], others, tensor_id, kind, layout, away)
        if away is None:
            slot.view()
        elif away == "sharded" and config.placement == "inplace":
            check_block(slot.name, p, 2 if p.dim() == 2 else 1)
            slot.piece()
        slots.append(slot)
    check_apart([(f"parameter {slot.name!r}", slot.view()) for slot in slots if slot.out_of_reach is None])
    return slots, left


def canonical(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    for wrapper in _WRAPPERS:
        while f".{name}".find(f".{wrapper}") >= 0:
            name = f".{name}".replace(f".{wrapper}", ".", 1)[1:]
    return name


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


def check_trainable(name: str, p: Tensor) -> None:
    """Raises TypeError or ValueError, with the way out, for storage that the ops cannot change."""
    way_out = "exclude it or set requires_grad=False"
    if p.layout != torch.strided:
        raise TypeError(f"parameter {name!r} is {p.layout}; only dense storage can be trained: {way_out}")
    if p.device.type == "meta":
        raise TypeError(f"parameter {name!r} is on the meta device and has no storage; load the weights first, or {way_out}")
    if p.dtype not in DTYPES:
        raise TypeError(
            f"parameter {name!r} is {p.dtype}; supported are {', '.join(str(d) for d in DTYPES)}: convert it, or {way_out}"
        )
    problem = None if is_sharded(p) else storage_problem(p)
    if problem is not None:
        raise ValueError(f"parameter {name!r}: {problem}; put that right, or {way_out}")


def _check_sharded(model: nn.Module, name: str, p: Tensor, config: PatchConfig) -> None:
    if config.estimator == "subspace" or (config.placement != "inplace" and config.estimator == "dense"):
        raise TypeError(
            f"parameter {name!r} is sharded: shards have no probe with MeZO, and nothing with SubZero; use LOZO, MeZO with "
            "placement='inplace', or exclude it"
        )
    if p.dim() > 1 and _matches((name,), config.square_patterns):
        raise TypeError(f"parameter {name!r} is sharded, and cannot be seen as a square matrix: leave it out of square")
    if config.placement != "inplace":
        check_shards(model, name, p)


def _treatment(module: nn.Module, p: Tensor, names: Sequence[str], config: PatchConfig) -> tuple[str, str]:
    if is_quantised(module, p):
        return "lowrank", "matrix"
    if config.estimator == "dense" or p.dim() < 2:
        return "dense", "flat"
    if _matches(names, config.square_patterns):
        return "lowrank", "square"
    if p.dim() == 2:
        return "lowrank", "matrix"
    if p.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd):
        return "lowrank", "experts"
    return "lowrank", "rows"
