"""The modules of vLLM that can be probed, and what each of their parameters is to them."""

from __future__ import annotations

from typing import Any

from torch import nn

VECTOR_KINDS = ("bias", "weight", "shift")
"""The kinds of one-dimensional parameters."""


def kind_of(module: nn.Module, attribute: str) -> str | None:
    """Returns the kind of place that a parameter of a module is (see :class:`~.places.Place`), or None if it is none."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if isinstance(module, LinearBase):
        return {"weight": "linear", "bias": "bias"}.get(attribute)
    if isinstance(module, ParallelLMHead):
        return {"weight": "head"}.get(attribute)
    if isinstance(module, VocabParallelEmbedding):
        return {"weight": "embedding"}.get(attribute)
    if isinstance(module, nn.Embedding):
        return {"weight": "table"}.get(attribute)
    if norm_kind(module) is not None:
        return {"weight": "weight", "bias": "shift"}.get(attribute)
    return None


def norm_kind(module: nn.Module) -> str | None:
    """Returns "rms", "gemma" (whose weight is 1 + w) or "layer" for a normalisation that is known, otherwise None."""
    from vllm.model_executor.layers import layernorm

    if isinstance(module, layernorm.GemmaRMSNorm):
        own: Any = layernorm.GemmaRMSNorm
        return "gemma" if type(module).forward_native is own.forward_native else None
    if isinstance(module, layernorm.RMSNorm):
        own = layernorm.RMSNorm
        return "rms" if type(module).forward_native is own.forward_native and module.has_weight else None
    if isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
        return "layer"
    return "layer" if type(module).__name__ == "LayerNorm" and hasattr(module, "normalized_shape") else None


def has_bias(module: nn.Module) -> bool:
    """Whether this rank adds the bias of a linear layer: where outputs are summed over ranks, one does."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    return not isinstance(module, RowParallelLinear) or module.tp_rank == 0


def logits_processors(model: nn.Module) -> list[nn.Module]:
    """The modules that apply the head."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    return [module for module in model.modules() if isinstance(module, LogitsProcessor)]


def tied_heads(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Heads that compute with the matrix of an embedding, as (head, its name, embedding).

    A model without a head of its own gives its embedding to the logits processor: that is then its head.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, VocabParallelEmbedding)]
    heads = [(name, m) for name, m in modules if isinstance(m, ParallelLMHead)]
    embeddings = [(name, m) for name, m in modules if not isinstance(m, ParallelLMHead)]
    if not heads:
        return [(m, name, m) for name, m in embeddings]
    return [(head, name, m) for name, head in heads for _, m in embeddings if _same_weight(head, m)]


def _same_weight(one: nn.Module, two: nn.Module) -> bool:
    a, b = (getattr(module, "weight", None) for module in (one, two))
    return a is not None and b is not None and (a is b or (a.numel() > 0 and a.data_ptr() == b.data_ptr()))
