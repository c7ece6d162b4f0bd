"""Where each parameter of the Hugging Face model is in a vLLM model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..model.parameters import Parameter
from .loading import Copy
from .modules import VECTOR_KINDS, kind_of, tied_heads


@dataclasses.dataclass(eq=False)
class Place:
    """A block of a parameter, and the module that computes with it on this rank.

    Attributes:
        parameter: the Hugging Face parameter.
        kind: "linear", "embedding", "head" (a linear layer that only the logits processor calls), "table" (another embedding),
            "bias" (of a linear layer), or "weight" and "shift" of a normalisation.
        module, path: in the vLLM model.
        rows, cols: the block, as slices of the parameter seen as a matrix; of a vector ``cols``.
        first: the first output of the module that the block makes.
        transposed: the parameter is (inputs, outputs).
        sketch: as in :class:`~.loading.Copy`, for the check of a linear layer.
    """

    parameter: Parameter
    kind: str
    module: nn.Module
    path: str
    rows: slice
    cols: slice
    first: int = 0
    transposed: bool = False
    sketch: Tensor | None = None

    @property
    def name(self) -> str:
        """The name of the parameter."""
        return self.parameter.name

    @property
    def outputs(self) -> int:
        """The outputs of its module that it makes, or its elements if it is a vector."""
        part = self.cols if self.transposed or not self.parameter.low_rank else self.rows
        return part.stop - part.start


class _Elsewhere(Exception):
    """A copy that no place can be made of; the message says why."""


def find_places(
    copies: Sequence[Copy], parameters: Sequence[Parameter], translate: Callable[[str], tuple[str, bool]], model: nn.Module
) -> tuple[list[Place], dict[str, str]]:
    """Makes places of what a loader copied.

    Args:
        parameters: of the Hugging Face model.
        translate: names of the checkpoint into names of that model, see :func:`~.shadow.checkpoint_names`.
        model: the vLLM model.

    Returns:
        The places, and for each parameter that has none, or not all of whose blocks have one, the reason.
    """
    by_name = {alias: p for p in parameters for alias in (p.name, *p.aliases)}
    places: list[Place] = []
    left: dict[str, str] = {}
    for copy in copies:
        name, merged = translate(copy.name)
        p = by_name.get(name)
        if p is None:
            continue  # not trained, or a scale of quantisation
        try:
            if merged:
                raise _Elsewhere(f"the checkpoint has it in parts, which the engine keeps in {type(copy.module).__name__}")
            places.append(_place_of(copy, p))
        except _Elsewhere as reason:
            left.setdefault(p.name, str(reason))
    places = _once([place for place in places if place.name not in left])
    places += _heads(places, model)
    placed = {place.name for place in places}
    for p in parameters:
        if p.name not in placed:
            left.setdefault(p.name, "the loader was not seen to copy it")
    return places, left


def _place_of(copy: Copy, p: Parameter) -> Place:
    module = copy.module
    if copy.offset is None:
        raise _Elsewhere("the loader changes it before it copies it")
    kind = kind_of(module, copy.attribute)
    if kind is None:
        raise _Elsewhere(f"{type(module).__name__}.{copy.attribute} is none of the modules that can be probed")
    shape = tuple(p.storage.shape)
    if copy.shape != shape:
        raise _Elsewhere(f"it is {copy.shape} in the checkpoint and {shape} in transformers")
    if len(shape) == 1:
        return _vector(copy, p, kind)
    if len(shape) != 2 or len(copy.extent) != 2 or kind in VECTOR_KINDS:
        raise _Elsewhere(f"it is {shape}, and only matrices and vectors can be probed")
    row, col = divmod(copy.offset, shape[1])
    width = copy.to_strides[0]
    if copy.strides == (shape[1], 1) or copy.extent[0] == 1:
        rows, cols, transposed = slice(row, row + copy.extent[0]), slice(col, col + copy.extent[1]), False
    elif copy.strides == (1, shape[1]):
        rows, cols, transposed = slice(row, row + copy.extent[1]), slice(col, col + copy.extent[0]), True
    else:
        raise _Elsewhere(f"the loader copies it with strides {copy.strides}")
    if copy.to_strides[1] != 1 or copy.to_offset % width or width != copy.extent[1]:
        raise _Elsewhere(f"{type(module).__name__} does not have it as rows of a matrix")
    if transposed and kind != "linear":
        raise _Elsewhere(f"{type(module).__name__} has it transposed")
    return Place(p, kind, module, copy.path, rows, cols, copy.to_offset // width, transposed, copy.sketch)


def _vector(copy: Copy, p: Parameter, kind: str) -> Place:
    if kind not in VECTOR_KINDS or copy.strides not in ((1,), ()):
        raise _Elsewhere(f"{type(copy.module).__name__} does not have it as a vector")
    assert copy.offset is not None
    cols = slice(copy.offset, copy.offset + copy.extent[0])
    return Place(p, kind, copy.module, copy.path, slice(0, 1), cols, copy.to_offset)


def _once(places: Sequence[Place]) -> list[Place]:
    """The places without those that a loader copied twice."""
    seen = {(id(p.module), p.kind, p.first, p.rows.start, p.cols.start): p for p in places}
    return list(seen.values())


def _heads(places: Sequence[Place], model: nn.Module) -> list[Place]:
    """The places of embeddings whose matrix the logits processor uses too, because the model is tied."""
    embeddings = {id(p.module): p for p in places if p.kind == "embedding"}
    return [
        dataclasses.replace(embeddings[id(embedding)], kind="head", module=head, path=path)
        for head, path, embedding in tied_heads(model)
        if id(embedding) in embeddings
    ]
