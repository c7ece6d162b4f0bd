"""Watches a vLLM loader: which part of which checkpoint tensor it copies to which part of which parameter."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclasses.dataclass(frozen=True)
class Copy:
    """One copy that a loader made. Offsets and strides count elements.

    Attributes:
        name, shape: of the checkpoint's tensor.
        extent: the shape of what was copied.
        offset, strides: of that in the checkpoint's tensor; None if it was not a view of it.
        module, attribute: the parameter that it was copied to, ``getattr(module, attribute)``, and the name of the module.
        to_offset, to_strides: in the storage of that parameter.
        sketch: of a matrix W that was copied, Z W for the signs Z of :func:`signs`, (columns,) fp32, with which outputs of its
            layer can be checked when W is gone; for another tensor None.
    """

    name: str
    shape: tuple[int, ...]
    extent: tuple[int, ...]
    offset: int | None
    strides: tuple[int, ...]
    module: nn.Module
    path: str
    attribute: str
    to_offset: int
    to_strides: tuple[int, ...]
    sketch: Tensor | None


def signs(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns the signs of the sketches, (count,) fp32: any fixed ones do, as long as they are not all alike."""
    bits = torch.arange(count, dtype=torch.int64, device="cpu") * 2654435761 % 4294967291
    return (1 - 2 * (bits // 1021 % 2)).to(device, torch.float32)  # vLLM changes the default dtype while it loads


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._current: tuple[str, Tensor] | None = None
        self.seen: list[dict[str, Any]] = []

    def names(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self._current = name, tensor
            yield name, tensor
        self._current = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten.copy_.default and self._current is not None:
            self._note(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _note(self, to: Tensor, source: Tensor) -> None:
        assert self._current is not None
        name, whole = self._current
        if to.device.type == "meta" or whole.untyped_storage().data_ptr() == to.untyped_storage().data_ptr():
            return
        is_view = source.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        sketch = None
        if is_view and source.dim() == 2 and source.is_floating_point() and source.element_size() > 1:
            sketch = signs(source.shape[0], source.device) @ source.float()
        self.seen.append(
            {
                "name": name,
                "shape": tuple(whole.shape),
                "extent": tuple(source.shape),
                "offset": source.storage_offset() - whole.storage_offset() if is_view else None,
                "strides": tuple(source.stride()),
                "pointer": to.untyped_storage().data_ptr(),
                "to_offset": to.storage_offset(),
                "to_strides": tuple(to.stride()),
                "sketch": sketch,
            }
        )


@contextlib.contextmanager
def watched_loader() -> Iterator[list[Copy]]:
    """While the body loads a model with vLLM's default loader, fills the list with its copies.

    Parameters are looked up when all weights are loaded and before they are packed for their kernels.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    found: list[Copy] = []
    watch = _Watch()
    get_all_weights, load_weights = DefaultModelLoader.get_all_weights, DefaultModelLoader.load_weights

    def all_weights(loader: Any, *args: Any, **kwargs: Any) -> Any:
        return watch.names(get_all_weights(loader, *args, **kwargs))

    def load(loader: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with watch:
            result = load_weights(loader, model, *args, **kwargs)
        found.extend(_with_parameters(watch.seen, model))
        watch.seen.clear()
        return result

    DefaultModelLoader.get_all_weights, DefaultModelLoader.load_weights = all_weights, load
    try:
        yield found
    finally:
        DefaultModelLoader.get_all_weights, DefaultModelLoader.load_weights = get_all_weights, load_weights


def _with_parameters(seen: list[dict[str, Any]], model: nn.Module) -> Iterator[Copy]:
    owners: dict[int, tuple[nn.Module, str, str]] = {}
    for path, module in model.named_modules():
        for attribute, p in module._parameters.items():  # noqa: SLF001
            if p is not None:
                owners.setdefault(p.untyped_storage().data_ptr(), (module, path, attribute))
    for copy in seen:
        owner = owners.get(copy.pop("pointer"))
        if owner is not None:
            module, path, attribute = owner
            yield Copy(**copy, module=module, path=path.replace(".base_layer", ""), attribute=attribute)
