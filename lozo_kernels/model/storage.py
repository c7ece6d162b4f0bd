"""Where the values of a parameter lie, and how this process reads and writes them: one class for each case."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels.table import DTYPES, storage_problem
from .config import PatchConfig
from .layout import Layout, Shard
from .modules import own_parameters
from .offload import OffloadedWeight
from .sharding import block_of, check_block, check_rows, gather, is_sharded, local_of, running_device

Memory = Callable[[Tensor], Tensor]
"""Returns memory for a contiguous copy of a tensor."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """A module that has a parameter.

    Attributes:
        reference: to the module; path: its name in the model; attribute: the parameter's name in the module.
        kept: where the parameter is while the module does not run; None if it is not offloaded.
    """

    reference: weakref.ref[nn.Module]
    path: str
    attribute: str
    kept: OffloadedWeight | None = None

    @property
    def module(self) -> nn.Module:
        """The module. Raises RuntimeError if it no longer exists."""
        module = self.reference()
        if module is None:
            raise RuntimeError(f"module {self.path!r} no longer exists: restore() and patch the model again")
        return module

    @property
    def tensor(self) -> nn.Parameter | None:
        """The parameter as the module has it now, or None if it no longer has it."""
        module = self.reference()
        return None if module is None else own_parameters(module).get(self.attribute)


class Storage:
    """A parameter whose values are in this process all the time, in the parameter itself. The other cases are subclasses.

    The parameter is looked up at every use, so replaced parameters and moved storage are followed.

    Attributes:
        word: what messages say of where it is.
        always_here: this process can read and write its part of the parameter at any time.
        resident: the parameter is whole and always here, which is the case of this class.
        mergeable: what a probe learned can be merged into it.
        sharded: it is spread over processes; in_blocks: also while its module runs (tensor parallel).

    Args:
        owners: every module that has it; the first one names it.
        layout: the matrices that it is seen as.
    """

    word: ClassVar[str] = "in its place"
    always_here = True
    resident: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    sharded: ClassVar[bool] = False
    in_blocks = False

    def __init__(self, owners: Sequence[Owner], layout: Layout) -> None:
        self.owners = tuple(owners)
        self.layout = layout

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter as the model has it now. Raises RuntimeError if it no longer exists."""
        p = self.owners[0].tensor
        if p is None:
            raise RuntimeError(f"parameter {self.layout.name!r} no longer exists: restore() and patch the model again")
        return p

    @property
    def extent(self) -> tuple[int, int, int]:
        """(batch, rows, cols) of the whole parameter. Its storage is not touched."""
        return self.layout.extent(self.shape)

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole parameter."""
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        """The name of its dtype without "torch."; for a quantised parameter :attr:`word`."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """The device of the parameter while its module runs."""
        return self.tensor.device

    def check(self, config: PatchConfig) -> None:  # noqa: ARG002  (only what is sharded depends on it)
        """Raises TypeError or ValueError, which say what to do, if it cannot be trained as ``config`` says."""
        self.shard()

    def shard(self) -> Shard:
        """Returns this process's part of it, in the storage that passes over the weights change.

        Raises:
            TypeError: it is sparse, on the meta device or of an unsupported dtype.
            ValueError: its strides do not allow changing it in place.
            RuntimeError: it cannot be reached now.
        """
        p = self.tensor.detach()
        check_trainable(self.layout.name, p)
        return self.layout.whole(p)

    def present(self) -> Sequence[Tensor]:
        """The parameter, or this process's block of it, where it has storage now. Tied and offloaded, it may be in several places.
        Raises RuntimeError if no module that owns it is running, so that it has no storage."""
        return [self.tensor]

    def load(self, device: torch.device) -> Tensor:
        """Returns the whole parameter on a device, contiguous unless it is the parameter itself, which is not copied.

        A sharded parameter is gathered, which is a collective.
        """
        return self.tensor.detach().to(device)

    @contextlib.contextmanager
    def borrowed(self, device: torch.device, memory: Memory | None = None) -> Iterator[Shard]:  # noqa: ARG002  (for offloaded)
        """Yields :meth:`shard` on a device and writes it back at the end. If the body raises, nothing is written back.

        Args:
            memory: where a copy of an offloaded weight is made; None: in new memory.
        """
        shard = self.shard()
        here = dataclasses.replace(shard, x=shard.x.to(device))
        yield here
        if here.x.data_ptr() != shard.x.data_ptr():
            shard.x.copy_(here.x)


class Sharded(Storage):
    """A DTensor. Under FSDP a process has rows of it between forwards; under tensor parallelism it has a block all the time."""

    word = "sharded"
    resident = False
    sharded = True

    def __init__(self, owners: Sequence[Owner], layout: Layout, in_blocks: bool) -> None:
        super().__init__(owners, layout)
        self.in_blocks = self.always_here = in_blocks

    @property
    def device(self) -> torch.device:
        return running_device(self.tensor)

    def check(self, config: PatchConfig) -> None:
        name, p, in_place = self.layout.name, self.tensor, config.placement == "inplace"
        check_trainable(name, p)
        if config.estimator == "guided":
            raise TypeError(f"parameter {name!r} is sharded, and AGZO looks at the inputs of whole layers: use LOZO, or exclude it")
        if config.factored or config.per_example or (not in_place and config.estimator == "dense"):
            raise TypeError(
                f"parameter {name!r} is sharded: shards have no probe with MeZO, and nothing with SubZero, ZO-Muon, GRZO or an "
                "estimator that was registered; use LOZO, MeZO with placement='inplace', or exclude it"
            )
        if self.layout.form == "square":
            raise TypeError(f"parameter {name!r} is sharded, and cannot be seen as a square matrix: leave it out of square")
        if in_place or self.in_blocks:
            check_block(name, p, 2 if p.dim() == 2 else 1)
        else:
            check_rows(name, p)
        if in_place:
            self.shard()

    def shard(self) -> Shard:
        p = self.tensor
        local, offsets = block_of(self.layout.name, p)
        check_trainable(self.layout.name, local)
        return self.layout.cut(local, offsets, p.shape)

    def present(self) -> Sequence[Tensor]:
        return [local_of(self.tensor)] if self.in_blocks else _brought_in(self)

    def load(self, device: torch.device) -> Tensor:
        return gather(self.tensor).detach().to(device).contiguous()


class Offloaded(Storage):
    """A parameter that accelerate keeps on the CPU or on disk, and brings in while a module that owns it runs."""

    word = "offloaded"
    always_here = False
    resident = False

    @property
    def device(self) -> torch.device:
        p = self.tensor
        return next(o.kept.execution_device for o in self.owners if o.kept is not None) if p.device.type == "meta" else p.device

    def check(self, config: PatchConfig) -> None:
        if config.per_example and self.layout.low_rank:
            raise TypeError(f"parameter {self.layout.name!r} is offloaded, and GRZO updates weights where they are: use LOZO")
        for owner in self.owners:
            if owner.kept is not None:
                owner.kept.check_writable()

    def shard(self) -> Shard:
        raise RuntimeError(f"{self.layout.name!r} is offloaded: it has no storage between forwards")

    def present(self) -> Sequence[Tensor]:
        return _brought_in(self)

    def load(self, device: torch.device) -> Tensor:
        """Does not copy a weight that is in memory of the device."""
        return self._source.detach().to(device, self.tensor.dtype).contiguous()

    @contextlib.contextmanager
    def borrowed(self, device: torch.device, memory: Memory | None = None) -> Iterator[Shard]:
        """Yields all of the weight, and stores it in every place where it is kept (:meth:`OffloadedWeight.store`)."""
        weight = self.load(device) if memory is None or self._lies_on(device) else memory(self.tensor).copy_(self._source)
        yield self.layout.whole(weight)
        resident = self._resident
        if resident is not None and resident.data_ptr() != weight.data_ptr():
            resident.detach().copy_(weight)
        for kept in self._places:
            kept.store(weight)

    @property
    def _source(self) -> Tensor:
        """The weight as it is kept."""
        resident = self._resident
        return self._places[0].load() if resident is None else resident

    def _lies_on(self, device: torch.device) -> bool:
        """Whether the weight is kept in memory of a device, where it does not move."""
        kept = self._places[0].in_memory if self._resident is None else self._resident
        return kept is not None and kept.device == device and kept.dtype == self.tensor.dtype and kept.is_contiguous()

    @property
    def _places(self) -> list[OffloadedWeight]:
        """The places where the weight is kept, each once."""
        return list({owner.kept.place: owner.kept for owner in self.owners if owner.kept is not None}.values())

    @property
    def _resident(self) -> Tensor | None:
        """The weight itself, if it is tied to the parameter of a module that is not offloaded; otherwise None."""
        return next((owner.tensor for owner in self.owners if owner.kept is None), None)


class Quantised(Storage):
    """A weight of integers, perhaps packed, that only its linear layer can read. What a probe learned stays in factors."""

    word = "quantised"
    always_here = False
    resident = False
    mergeable = False

    @property
    def shape(self) -> torch.Size:
        module: Any = self.owners[0].module
        return torch.Size((module.out_features, module.in_features))

    @property
    def dtype(self) -> str:
        return self.word

    def check(self, config: PatchConfig) -> None:
        """Does nothing: any can be trained, because only its layer reads it."""

    def present(self) -> Sequence[Tensor]:
        return _brought_in(self)


def _brought_in(storage: Storage) -> Sequence[Tensor]:
    found = [owner.tensor for owner in storage.owners]
    here = {id(p): p for p in found if p is not None and p.device.type != "meta" and not is_sharded(p)}
    if not here:
        raise RuntimeError(f"{storage.layout.name!r} is {storage.word}, and was not brought in for the module that uses it")
    return list(here.values())


def is_quantised(module: nn.Module | None, p: Tensor) -> bool:
    """Whether a linear layer keeps this weight as integers that only the layer itself can read (bitsandbytes, torchao)."""
    if not isinstance(module, nn.Linear) or p is not own_parameters(module).get("weight"):
        return False
    return not is_sharded(p) and not p.is_complex() and (not p.is_floating_point() or type(p.data) is not Tensor)


def layer_kind(owner: Owner) -> str | None:
    """Returns how a module uses its matrix: "linear", "transposed" or "embedding", or None if that is not known."""
    module, attribute = owner.module, owner.attribute
    if attribute != "weight":
        return None
    forward = type(module).forward
    if forward is nn.Linear.forward or is_quantised(module, own_parameters(module)["weight"]):  # type: ignore[arg-type]
        return "linear"
    if forward is nn.Embedding.forward:
        return "embedding" if module.max_norm is None else None
    if type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D":
        return "transposed"
    return None


def check_trainable(name: str, p: Tensor) -> None:
    """Raises TypeError or ValueError, which say what to do, for a parameter that the ops cannot change."""
    way_out = "exclude it or set requires_grad=False"
    if p.layout != torch.strided:
        raise TypeError(f"parameter {name!r} is {p.layout}; only dense storage can be trained: {way_out}")
    if is_traceable_wrapper_subclass(p) and not is_sharded(p):
        raise TypeError(
            f"parameter {name!r} is a {type(p).__name__}, whose values cannot be changed: quantise a model before it is patched (a "
            f"probe trains quantised linear layers), and restore() it before you quantise it; or {way_out}"
        )
    if p.device.type == "meta":
        raise TypeError(f"parameter {name!r} is on the meta device and has no storage; load the weights first, or {way_out}")
    if p.dtype not in DTYPES:
        raise TypeError(
            f"parameter {name!r} is {p.dtype}; supported are {', '.join(str(d) for d in DTYPES)}: convert it, or {way_out}"
        )
    problem = None if is_sharded(p) else storage_problem(p)
    if problem is not None:
        raise ValueError(f"parameter {name!r}: {problem}; put that right, or {way_out}")
