"""Sharded weights, DTensors of the global shape: what this process has of one, and bringing shards back.

FSDP (``torch.distributed.fsdp.fully_shard``) leaves rows with each process between forwards, and makes the parameter an ordinary
tensor, the whole weight, while its module runs. Tensor parallelism keeps rows or columns all the time, and its layers compute with
DTensors. ``torch.distributed`` is not imported here: where nobody did, nothing is sharded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .modules import own_parameters


def is_sharded(p: Tensor) -> bool:
    """Whether it is a DTensor."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(p, kind)


def reshard(model: nn.Module) -> None:
    """Leaves only shards of the weights that FSDP keeps whole after a forward, as it does with those of the root."""
    for module in _managed(model):
        module.reshard()


def stays_in_blocks(model: nn.Module, p: Tensor) -> bool:
    """Whether a parameter is a DTensor also while its module runs (tensor parallel), and not only between forwards (FSDP)."""
    return is_sharded(p) and not any(
        p is q for root in _managed(model) for module in root.modules() for q in own_parameters(module).values()
    )


def check_rows(name: str, p: Any) -> None:
    """Raises TypeError, with the way out, for a DTensor that FSDP did not make of rows alone."""
    *others, last = p.placements
    if not (last.is_shard(0) and all(other.is_replicate() for other in others)):  # tensor parallel ones come last
        raise TypeError(
            f"parameter {name!r} is sharded as {tuple(p.placements)}; what FSDP shards is probed if that is its rows alone "
            "(Shard(0), last of the mesh): exclude it"
        )


def check_block(name: str, p: Any, dimensions: int) -> None:
    """Raises TypeError, with the way out, for a DTensor that is not cut along its first ``dimensions`` dimensions."""
    for placement in p.placements:
        strided = "Strided" in type(placement).__name__  # FSDP over tensor parallelism: rows that do not lie together
        if not placement.is_replicate() and (strided or not placement.is_shard() or placement.dim >= dimensions):
            raise TypeError(
                f"parameter {name!r} of shape {tuple(p.shape)} is sharded as {tuple(p.placements)}; trained can be "
                f"contiguous shards of dimension {' or '.join(map(str, range(dimensions)))}: exclude it"
            )


def block_of(name: str, p: Any) -> tuple[Tensor, tuple[int, ...]]:
    """What this process has of a weight that :func:`check_block` let pass, and where it begins in each dimension.

    The block is a view, so that writing it changes the weight. It may be empty.

    Raises:
        RuntimeError: it is whole now, or has another shape here than its placements say.
    """
    if not is_sharded(p):
        raise RuntimeError(f"parameter {name!r} is not in shards now: its module is running, or it is not sharded any more")
    sizes, offsets = list(p.shape), [0] * p.dim()
    for axis, placement in enumerate(p.placements):
        if placement.is_shard():
            d, whole = placement.dim, sizes[placement.dim]
            chunk = -(-whole // p.device_mesh.size(axis))
            first = min(whole, chunk * p.device_mesh.get_coordinate()[axis])
            offsets[d] += first
            sizes[d] = min(chunk, whole - first)
    local = p.detach().to_local()
    if list(local.shape) != sizes:
        raise RuntimeError(f"parameter {name!r} has {tuple(local.shape)} here where {tuple(sizes)} was expected")
    return local, tuple(offsets)


def ranks_of(p: Any) -> list[int]:
    """The processes that a parameter is spread over; none if it is not sharded."""
    return sorted(p.device_mesh.mesh.flatten().tolist()) if is_sharded(p) else []


def running_device(p: Any) -> torch.device:
    """Where the whole weight is while its module runs: the shards may be kept on the CPU."""
    if not is_sharded(p) or p.device.type == p.device_mesh.device_type:
        return p.device
    kind = p.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def gather(p: Any) -> Tensor:
    """The weight in one piece; while it is in shards a collective, which every process has to call."""
    return p.full_tensor() if is_sharded(p) else p  # type: ignore[no-any-return]


def sharded_like(local: Tensor, p: Any, axes: Mapping[int, int], shape: Sequence[int]) -> Tensor:
    """A DTensor of what goes with each process's block of a parameter.

    Args:
        local: what this process has of it.
        axes: the dimension that goes with each dimension of the parameter; shards of others have it whole.
        shape: of all.
    """
    tensor = sys.modules["torch.distributed.tensor"]
    placements = [
        tensor.Shard(axes[placement.dim]) if placement.is_shard() and placement.dim in axes else tensor.Replicate()
        for placement in p.placements
    ]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return tensor.DTensor.from_local(  # type: ignore[no-any-return]
        local, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )


def local_of(p: Any) -> Tensor:
    """The very tensor that holds what this process has of a DTensor, no view of it: where its storage goes, the weight goes."""
    return p._local_tensor  # type: ignore[no-any-return]  # noqa: SLF001  (to_local() makes a view)


def why_not_local(p: Any, inputs: Any, outputs: Any, summed: int, lookup: bool) -> str | None:
    """Why what a layer computes with blocks of its weight does not split into products of this process's parts, or None.

    Args:
        p: (a, b) weight.
        inputs, outputs: of the layer; (..., features) each, inputs of an embedding (...,).
        summed: the dimension of the weight that is summed over, or looked up.
    """
    if not is_sharded(inputs) or not is_sharded(outputs) or not p.device_mesh == inputs.device_mesh == outputs.device_mesh:
        return "its inputs and outputs are not sharded with it"
    last = outputs.dim() - 1
    for own, x, y in zip(p.placements, inputs.placements, outputs.placements, strict=True):
        if own.is_replicate():
            good = x == y and (x.is_replicate() or any(_is_block(x, d) for d in range(1, last)))
        elif own.is_shard(summed):
            good = x.is_replicate() if lookup else _is_block(x, inputs.dim() - 1)
            good = good and y.is_partial() and y.reduce_op == "sum"
        else:
            good = x.is_replicate() and _is_block(y, last)
        if not good:
            return f"weight, inputs and outputs are {p.placements}, {inputs.placements} and {outputs.placements}"
    return None


def arrived(x: Any) -> Tensor:
    """A tensor, waited for if it is on its way from other processes: until then it has no storage that ops could read.

    Autograd does not follow.
    """
    return x if type(x) is Tensor or not hasattr(x, "wait") else x.wait()  # type: ignore[no-any-return]


def local_inputs(p: Any, inputs: Any) -> Tensor:
    """What this process has of a layer's inputs. Gradients of inputs that all have sum up over the blocks of the weight."""
    if not torch.is_grad_enabled():
        return inputs.to_local()  # type: ignore[no-any-return]
    partial = sys.modules["torch.distributed.tensor"].Partial
    pairs = zip(p.placements, inputs.placements, strict=True)
    gradients = [partial() if own.is_shard() and x.is_replicate() else x for own, x in pairs]
    return inputs.to_local(grad_placements=gradients)  # type: ignore[no-any-return]


def local_outputs(outputs: Any) -> Tensor:
    """What this process has of a layer's outputs."""
    return outputs.to_local()  # type: ignore[no-any-return]


def with_local(outputs: Any, local: Tensor) -> Tensor:
    """A DTensor like another, of more or fewer examples perhaps, made of the parts that the processes have."""
    shape = torch.Size((local.shape[0], *outputs.shape[1:]))
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    kind, mesh = type(outputs), outputs.device_mesh
    return kind.from_local(local, mesh, outputs.placements, run_check=False, shape=shape, stride=strides)  # type: ignore[no-any-return]


def adds_once(outputs: Any) -> bool:
    """Whether this is the process that adds what is to be added once to a DTensor that is a sum over processes."""
    place = outputs.device_mesh.get_coordinate()
    return all(i == 0 for i, placement in zip(place, outputs.placements, strict=True) if placement.is_partial())


def mean_square(p: Any) -> float:
    """Of a DTensor's elements; a collective."""
    return float(gather(p.detach().float().square().sum())) / p.numel()


class Peers:
    """The processes that have parts of the same weights, and run every forward together: they have to decide alike.

    Args:
        parameters: all of them; where none is sharded, a process decides alone. Every call is a collective.
    """

    def __init__(self, parameters: Iterable[Any]) -> None:
        meshes = dict.fromkeys(p.device_mesh for p in parameters if is_sharded(p))
        self._groups = [(mesh.device_type, mesh.get_group(axis)) for mesh in meshes for axis in range(mesh.ndim)]

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest that any process has, of each number."""
        for device, group in self._groups:
            found = torch.tensor(values, dtype=torch.float64, device=device)
            distributed = sys.modules["torch.distributed"]
            distributed.all_reduce(found, distributed.ReduceOp.MAX, group)
            values = found.tolist()
        return list(values)

    def least(self, value: float) -> float:
        """The smallest that any process has."""
        return -self.most([-value])[0]

    def any(self, condition: bool) -> bool:
        """Whether it holds for any process."""
        return bool(self.most([float(condition)])[0])


ALONE = Peers(())
"""A process that shares its weights with no other."""


def _is_block(placement: Any, dimension: int) -> bool:
    return bool(placement.is_shard(dimension)) and "Strided" not in type(placement).__name__


def _managed(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard()`` was applied to."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]
