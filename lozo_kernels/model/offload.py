"""Weights that accelerate keeps on the CPU or on disk: where each is, and writing one there.

A hook (``AlignDevicesHook``) of a module, or of one above it, puts the weights into their places when the module's forward begins
and takes them out when it ends. What is between forwards in those places has no storage, and tied weights are not tied there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Home:
    """Where one weight is kept.

    Attributes:
        hook: what brings it in.
        key: its name among the hook's weights.
    """

    hook: Any
    key: str

    @property
    def execution_device(self) -> torch.device:
        """Where the weight is while its module runs."""
        device = self.hook.execution_device
        if device is None:
            return torch.device("cpu")
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)

    @property
    def place(self) -> Hashable:
        """Where :meth:`store` writes."""
        weights, key = self._place()
        kept = self._in_memory()
        return (id(weights), key) if kept is None else ("memory", kept.data_ptr() or key)

    @property
    def identity(self) -> Hashable:
        """The same for weights that are read from one place."""
        weights, key = self._place()
        entry = getattr(weights, "index", {}).get(key, {})
        if self._in_memory() is None and "safetensors_file" in entry:
            return (entry["safetensors_file"], entry.get("weight_name", key))
        return self.place

    def check_writable(self) -> None:
        """Raises TypeError if the hook's weights are in a mapping that :meth:`store` cannot write."""
        weights, key = self._place()
        if self._in_memory() is None and not hasattr(weights, "index"):
            raise TypeError(
                f"the offloaded weight {key!r} is kept in a {type(weights).__name__}, which cannot be written: exclude it"
            )

    def load(self) -> Tensor:
        """The weight as it is kept: the tensor itself where that is in memory, otherwise a copy on the CPU."""
        weights, key = self._place()
        return weights[key]

    def store(self, value: Tensor) -> None:
        """Keeps another value.

        In memory it is written in place. On disk the file ``<name>.dat`` of the offload folder is replaced in one piece: a crash
        leaves the old weight or the new one. A checkpoint in safetensors is never written: the value goes to such a file in the
        offload folder, or into memory where there is no folder, and is read from there from then on, but not by another process.
        """
        weights, key = self._place()
        kept = self._in_memory()
        if kept is not None:
            if kept.data_ptr() != value.data_ptr():
                kept.copy_(value)
        elif weights.save_folder is None:
            weights.state_dict[key] = value.to("cpu", copy=True)
        else:
            entry = weights.index[key]
            if "safetensors_file" in entry:
                entry = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            _replace_file(Path(weights.save_folder) / f"{key}.dat", value.to("cpu", getattr(torch, entry["dtype"])))
            if entry != weights.index[key]:
                weights.index = {**weights.index, key: entry}  # the old one may be another loader's too

    def _place(self) -> tuple[Any, str]:
        weights, key = self.hook.weights_map, self.key
        while hasattr(weights, "dataset"):  # a view of some of the weights
            weights, key = weights.dataset, f"{weights.prefix}{key}"
        return weights, key

    def _in_memory(self) -> Tensor | None:
        weights, key = self._place()
        return (weights if isinstance(weights, MutableMapping) else getattr(weights, "state_dict", {})).get(key)


def _replace_file(path: Path, value: Tensor) -> None:
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        value.detach().contiguous().view(-1).view(torch.uint8).numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def find_homes(model: nn.Module) -> dict[nn.Module, Home]:
    """Modules whose weights are offloaded; the key of each home is what comes before the name of a parameter of the module."""
    homes: dict[nn.Module, Home] = {}
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
                inside = module.named_modules() if hook.place_submodules else [("", module)]
                homes |= {child: Home(hook, f"{name}." if name else "") for name, child in inside}
    return homes


def home_of(homes: dict[nn.Module, Home], module: nn.Module, attribute: str) -> Home | None:
    """Where a parameter of a module is kept, or None if it stays in its place."""
    home = homes.get(module)
    return None if home is None else Home(home.hook, home.key + attribute)


def _hooks(module: nn.Module) -> Iterator[Any]:
    waiting = [getattr(module, "_hf_hook", None)]
    while waiting:
        hook = waiting.pop()
        if hook is not None:
            yield hook
            waiting += getattr(hook, "hooks", ())


def identities(model: nn.Module, homes: dict[nn.Module, Home]) -> dict[str, Hashable]:
    """Of every parameter by each of its names, what tells tied ones from others.

    Ties between offloaded weights are seen where both are one tensor in memory or one entry of a checkpoint, or where the model
    says so (``all_tied_weights_keys`` of transformers) and the two are equal.
    """
    found: dict[str, tuple[Tensor, Home | None]] = {}
    ties: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        before = f"{prefix}." if prefix else ""
        for attribute, p in module._parameters.items():
            if p is not None:
                found[before + attribute] = p, home_of(homes, module, attribute)
        ties |= {before + a: before + b for a, b in (getattr(module, "all_tied_weights_keys", None) or {}).items()}
    known = {name: id(p) if home is None or p.device.type != "meta" else home.identity for name, (p, home) in found.items()}
    for name, other in ties.items():
        pair = [found[n] for n in (name, other) if n in found]
        if len(pair) == 2 and any(home is not None for _, home in pair) and _equal(*pair):
            old, new = known[name], known[other]
            known = {n: new if key == old else key for n, key in known.items()}
    return known


def _equal(one: tuple[Tensor, Home | None], other: tuple[Tensor, Home | None]) -> bool:
    a, b = (p if home is None or p.device.type != "meta" else home.load() for p, home in (one, other))
    return a is b or (a.device == b.device and a.shape == b.shape and torch.equal(a, b))
