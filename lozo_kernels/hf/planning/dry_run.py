"""A model without weights: its forward passes run on tensors of shapes alone, and the memory that they would take is counted."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ...errors import InputError, require
from ..models.image_reader import image_size
from ..models.pretrained import in_one_line, unreadable

_HEADS = (
    # ending of an architecture's name, class that builds it, what its loss compares with
    ("ForCausalLM", "AutoModelForCausalLM", "tokens"),
    ("LMHeadModel", "AutoModelForCausalLM", "tokens"),
    ("ForMaskedLM", "AutoModelForMaskedLM", "tokens"),
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM", "tokens"),
    ("ForImageClassification", "AutoModelForImageClassification", "classes"),
)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operators make, as long as their storage lives.

    Attributes:
        alive, peak: now, and the most at once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known = {id(t.untyped_storage()) for t in known}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._known and key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.alive += self._sizes[key]
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.alive -= self._sizes.pop(key, 0)


@dataclasses.dataclass(frozen=True)
class DryForward:
    """What a forward pass takes: ``bytes`` alive at once beyond weights and inputs, and ``flops`` of its matrix products."""

    bytes: int
    flops: int


class DryModel:
    """A model of transformers made from its configuration alone, in evaluation mode, and a batch for it.

    Args:
        config: a configuration of transformers.
        dtype: dtype of its weights.
        batch_size: examples; ``sequence_length``: tokens of each, where it reads text.
        trusted: build it with the Python code that comes with its configuration, if there is some.

    Attributes:
        mode: the context in which the model may be called.
        model, batch: the model, and an input for it.

    Raises:
        InputError: transformers cannot build such a model, or it reads neither text nor images.
    """

    def __init__(self, config: Any, dtype: torch.dtype, batch_size: int, sequence_length: int, *, trusted: bool = False) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        auto, self._target = _head(config)
        transformers = require("transformers")
        level = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()
        try:
            with torch.device("meta"):
                loader = getattr(transformers, auto)
                self.model: nn.Module = loader.from_config(config, dtype=dtype, trust_remote_code=trusted).eval()
        except Exception as e:  # an odd configuration can make a model's code raise anything
            raise unreadable(e, type(config).__name__, "model", "can be built from this configuration") from e
        finally:
            transformers.utils.logging.set_verbosity(level)
        with self.mode:
            _realise(self.model)
            self.batch = self._make_batch(config, dtype, batch_size, sequence_length)

    @property
    def weights(self) -> list[Tensor]:
        """Parameters, tied ones once, and buffers."""
        return [*self.model.parameters(), *self.model.buffers()]

    @property
    def tokens(self) -> int:
        """Tokens of the batch, or images."""
        return next(iter(self.batch.values())).numel() if "input_ids" in self.batch else len(self.batch["labels"])

    def loss(self) -> Tensor:
        """The loss of a forward pass on the batch."""
        return self.model(**self.batch).loss

    def forward(self) -> DryForward:
        """A forward pass without a graph.

        Raises:
            InputError: what it computes depends on values that are not there.
        """
        flops = FlopCounterMode(display=False)
        with torch.no_grad():
            _, peak = self._counted(self.loss, flops)
        return DryForward(peak, flops.get_total_flops())

    def backpropagation(self) -> int:
        """Bytes beyond the weights that steps of AdamW take at once: activations, gradients and its two moments.

        Its moments are there during the backward pass from the second step on. The update makes two temporaries of a weight's
        size, for one weight after the other.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        _, peak = self._counted(lambda: self.loss().backward())
        for p in trained:
            p.grad = None
        weights, largest = sum(p.nbytes for p in trained), max((p.nbytes for p in trained), default=0)
        return 2 * weights + max(peak, weights + 2 * largest)

    def _counted(self, call: Callable[[], Any], *modes: Any) -> tuple[Any, int]:
        live = LiveBytes([*self.weights, *self.batch.values()])
        try:
            with contextlib.ExitStack() as stack:
                for mode in (self.mode, live, *modes):
                    stack.enter_context(mode)
                result = call()
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as e:
            reason = f"a forward pass depends on values, which a model without weights does not have ({e})"
            raise InputError(f"{type(self.model).__name__}: {reason}") from None
        except RuntimeError as e:  # an operator that is not known to take this dtype, such as the products of experts
            dtype = next(self.model.parameters()).dtype
            raise InputError(f"{type(self.model).__name__}: no dry run in {dtype}: {e}; try --dtype bfloat16") from None
        except Exception as e:  # as in the constructor
            raise InputError(f"{type(self.model).__name__}: a forward pass fails: {in_one_line(e)}") from e
        return result, live.peak

    def _make_batch(self, config: Any, dtype: torch.dtype, examples: int, length: int) -> dict[str, Tensor]:
        labels = torch.zeros(examples, dtype=torch.long, device="cpu")
        if getattr(self.model, "main_input_name", "") == "pixel_values":
            pixels = torch.zeros(examples, getattr(config, "num_channels", 3), *image_size(config), dtype=dtype, device="cpu")
            return {"pixel_values": pixels, "labels": labels}
        if getattr(self.model, "main_input_name", "") != "input_ids":
            raise InputError(f"{type(self.model).__name__} reads neither text nor images")
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise InputError(f"--sequence-length is at most {limit} for this model, not {length}")
        ids = torch.zeros(examples, length, dtype=torch.long, device="cpu")
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.zeros_like(ids) if self._target == "tokens" else labels,
        }


def _head(config: Any) -> tuple[str, str]:
    for architecture in config.architectures or ():
        for ending, auto, target in _HEADS:
            if architecture.endswith(ending):
                return auto, target
    if hasattr(config, "image_size") and not hasattr(config, "vocab_size"):
        return "AutoModelForImageClassification", "classes"
    return "AutoModelForSequenceClassification", "classes"


def _realise(model: nn.Module) -> None:
    """Puts tensors that claim to be on the CPU into the places of those on the meta device; tied ones stay tied."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        own = {"recurse": False, "remove_duplicate": False}
        for name, old in [*module.named_parameters("", **own), *module.named_buffers("", **own)]:
            if old not in made:
                made[old] = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                if isinstance(old, nn.Parameter):
                    made[old] = nn.Parameter(made[old], requires_grad=old.requires_grad)
            setattr(module, name, made[old])
