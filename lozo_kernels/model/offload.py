"""Weights that accelerate keeps on the CPU or on disk: where each is kept, and how it is written there.

A hook (``AlignDevicesHook``) of a module, or of one above it, puts the weights into their places when the module's forward begins
and takes them out when it ends. Between forwards the parameters have no storage, and tied weights are not one tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import replacing


@dataclasses.dataclass(frozen=True)
class OffloadedWeight:
    """Where one weight is kept.

    Attributes:
        hook: the hook that brings it in.
        key: its name among the hook's weights.
    """

    hook: Any
    key: str

    @property
    def execution_device(self) -> torch.device:
        """The device of the weight while its module runs."""
        device = self.hook.execution_device
        if device is None:
            return torch.device("cpu")
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)

    @property
    def place(self) -> Hashable:
        """A key of the place that :meth:`store` writes."""
        weights, key = self._place()
        kept = self.in_memory
        return (id(weights), key) if kept is None else ("memory", kept.data_ptr() or key)

    @property
    def identity(self) -> Hashable:
        """A key that is equal for weights that are read from one place."""
        weights, key = self._place()
        entry = getattr(weights, "index", {}).get(key, {})
        if self.in_memory is None and "safetensors_file" in entry:
            return (entry["safetensors_file"], entry.get("weight_name", key))
        return self.place

    def parameter(self, attribute: str) -> OffloadedWeight:
        """Returns the entry of a module's parameter from the entry of the module (:func:`offloaded_weights`)."""
        return OffloadedWeight(self.hook, self.key + attribute)

    def check_writable(self) -> None:
        """Raises TypeError if the hook's weights are in a mapping that :meth:`store` cannot write."""
        weights, key = self._place()
        if self.in_memory is None and not hasattr(weights, "index"):
            raise TypeError(
                f"the offloaded weight {key!r} is kept in a {type(weights).__name__}, which cannot be written: exclude it"
            )

    def load(self) -> Tensor:
        """Returns the weight as it is kept: the tensor itself if it is in memory, otherwise a copy on the CPU."""
        weights, key = self._place()
        return weights[key]

    def store(self, value: Tensor) -> None:
        """Replaces the value that is kept.

        In memory it is written in place. On disk the file ``<name>.dat`` of the offload folder is replaced in one piece: a crash
        leaves the old weight or the new one. A checkpoint in safetensors is never written: the value goes to such a file in the
        offload folder, or into memory where there is no folder, and is read from there from then on, but not by another process.
        """
        weights, key = self._place()
        kept = self.in_memory
        if kept is not None:
            if kept.data_ptr() != value.data_ptr():
                kept.copy_(value)
        elif weights.save_folder is None:
            weights.state_dict[key] = value.to("cpu", copy=True)
        else:
            entry = weights.index[key]
            if "safetensors_file" in entry:
                entry = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            raw = value.detach().to("cpu", getattr(torch, entry["dtype"])).contiguous().view(-1).view(torch.uint8)
            with replacing(Path(weights.save_folder) / f"{key}.dat") as part:
                raw.numpy().tofile(part)
            if entry != weights.index[key]:
                weights.index = {**weights.index, key: entry}  # another loader may use the old one

    def _place(self) -> tuple[Any, str]:
        weights, key = self.hook.weights_map, self.key
        while hasattr(weights, "dataset"):  # a view of some of the weights
            weights, key = weights.dataset, f"{weights.prefix}{key}"
        return weights, key

    @property
    def in_memory(self) -> Tensor | None:
        """The weight, if it is kept as a tensor in memory and not on disk; otherwise None."""
        weights, key = self._place()
        return (weights if isinstance(weights, MutableMapping) else getattr(weights, "state_dict", {})).get(key)


def offloaded_weights(model: nn.Module) -> dict[nn.Module, OffloadedWeight]:
    """Modules whose weights are offloaded. The key of a module's entry is what comes before the names of its parameters."""
    found: dict[nn.Module, OffloadedWeight] = {}
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
                inside = module.named_modules() if hook.place_submodules else [("", module)]
                found |= {child: OffloadedWeight(hook, f"{name}." if name else "") for name, child in inside}
    return found


def _hooks(module: nn.Module) -> Iterator[Any]:
    waiting = [getattr(module, "_hf_hook", None)]
    while waiting:
        hook = waiting.pop()
        if hook is not None:
            yield hook
            waiting += getattr(hook, "hooks", ())


def same_weight(one: tuple[Tensor, OffloadedWeight | None], other: tuple[Tensor, OffloadedWeight | None]) -> bool:
    """Whether two parameters hold equal values, each in itself or where it is kept."""
    a, b = (p if kept is None or p.device.type != "meta" else kept.load() for p, kept in (one, other))
    return a is b or (a.device == b.device and a.shape == b.shape and torch.equal(a, b))
