"""The Hugging Face model whose checkpoint an engine serves: what its parameters are, without their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.config import PatchConfig
from ..model.layout import Shard
from ..model.storage import Storage


class InEngine(Storage):
    """A parameter whose values are in an engine, in the form that its kernels need.

    Attributes:
        lent: the values as the checkpoint has them, while somebody lends them; see :meth:`EngineHandle.checkpoint_lent`.
    """

    word = "in an engine"
    always_here = False
    resident = False
    lent: Tensor | None = None

    def check(self, config: PatchConfig) -> None:
        pass

    def shard(self) -> Shard:
        raise RuntimeError(f"{self.layout.name!r} is in an engine: its weights are only read there")

    def load(self, device: torch.device) -> Tensor:
        if self.lent is None:
            raise RuntimeError(f"{self.layout.name!r} is in an engine: its checkpoint has its weights")
        return self.lent.to(device)


def shadow_of(hf_config: Any, dtype: torch.dtype) -> nn.Module:
    """Returns the Hugging Face model of a config on the meta device. Raises RuntimeError if transformers has none."""
    import transformers

    name = next(iter(getattr(hf_config, "architectures", None) or ()), None)
    kind = getattr(transformers, name or "", None)
    try:
        with torch.device("meta"):
            if kind is None:
                return transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype, trust_remote_code=False)
            return kind._from_config(hf_config, dtype=dtype)  # type: ignore[no-any-return]  # noqa: SLF001
    except (ValueError, AttributeError, TypeError) as e:
        raise RuntimeError(f"transformers has no model {name!r} whose parameters an engine could be trained by: {e}") from e


def checkpoint_names(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """Returns what translates a name in a checkpoint into that of the parameter of a model.

    The second value says whether the parameter is made of several of the checkpoint's tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    known: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    transforms: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", "")

    def translate(name: str) -> tuple[str, bool]:
        if name in known:
            return name, False
        renamed, pattern = rename_source_key(name, renamings, converters, prefix or None, known)
        return renamed, pattern is not None

    return translate
