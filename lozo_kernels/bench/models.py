"""Real models to measure on: the shapes of their weights, and the models themselves with random weights."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..errors import require


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The numbers of an OPT model (Zhang et al., 2022; config.json of facebook/opt-*)."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int = 50272
    positions: int = 2048

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(rows, columns) of every matrix; the head is tied to the embedding."""
        h = self.hidden
        layer = [(h, h)] * 4 + [(4 * h, h), (h, 4 * h)]
        return [(self.vocabulary, h), (self.positions + 2, h), *layer * self.layers]

    @property
    def vectors(self) -> list[int]:
        """Lengths of the biases and norm weights."""
        h = self.hidden
        return [h] * 2 + ([h] * 9 + [4 * h]) * self.layers


MODELS = {
    "opt-125m": Architecture(hidden=768, layers=12, heads=12),
    "opt-1.3b": Architecture(hidden=2048, layers=24, heads=32),
    "opt-2.7b": Architecture(hidden=2560, layers=32, heads=32),
    "opt-6.7b": Architecture(hidden=4096, layers=32, heads=32),
    "opt-13b": Architecture(hidden=5120, layers=40, heads=40),
}


def build_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal language model of transformers with random weights, in evaluation mode. Nothing is downloaded.

    Raises:
        InputError: transformers is not installed.
    """
    transformers = require("transformers")
    a = MODELS[name]
    config = transformers.OPTConfig(
        hidden_size=a.hidden,
        word_embed_proj_dim=a.hidden,
        ffn_dim=4 * a.hidden,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        vocab_size=a.vocabulary,
        max_position_embeddings=a.positions,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = transformers.OPTForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.to(device).eval()
