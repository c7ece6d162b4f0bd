"""Real models to measure on: their configurations, the shapes of their weights, and the models themselves with random weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from ..errors import require


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A causal language model of transformers.

    Attributes:
        family: its class is ``{family}ForCausalLM``, its configuration's ``{family}Config``.
        settings: what differs from the family's defaults, from the published config.json. Settings that change neither a shape
            nor a cost, such as the base of rotary embeddings, are left out.
    """

    family: str
    settings: dict[str, Any]

    @property
    def positions(self) -> int:
        """The longest sequence that the model takes."""
        return self.settings["max_position_embeddings"]


def _opt(hidden: int, layers: int, heads: int, vocabulary: int = 50272, positions: int = 2048) -> Architecture:
    """An OPT model (Zhang et al., 2022; facebook/opt-*) with the head tied to the embedding."""
    return Architecture(
        "OPT",
        {
            "hidden_size": hidden,
            "word_embed_proj_dim": hidden,
            "ffn_dim": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": positions,
        },
    )


MODELS = {
    "opt-tiny": _opt(hidden=64, layers=2, heads=2, vocabulary=1024, positions=128),  # not published: for trying a command
    "opt-125m": _opt(hidden=768, layers=12, heads=12),
    "opt-1.3b": _opt(hidden=2048, layers=24, heads=32),
    "opt-2.7b": _opt(hidden=2560, layers=32, heads=32),
    "opt-6.7b": _opt(hidden=4096, layers=32, heads=32),
    "opt-13b": _opt(hidden=5120, layers=40, heads=40),
    "opt-30b": _opt(hidden=7168, layers=48, heads=56),
    "opt-66b": _opt(hidden=9216, layers=64, heads=72),
    "llama-3-8b": Architecture(  # meta-llama/Meta-Llama-3-8B
        "Llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-4b": Architecture(  # Qwen/Qwen3-4B
        "Qwen3",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
}
"""By name."""


def build_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Makes a model with random weights in evaluation mode, on the device and in the dtype, so that there is never a second copy.

    Raises:
        InputError: transformers is not installed.
    """
    transformers = require("transformers")
    architecture = MODELS[name]
    config = getattr(transformers, f"{architecture.family}Config")(**architecture.settings)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{architecture.family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


@functools.cache
def parameter_shapes(name: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns name and shape of every parameter of a model, tied ones once. The model is built without memory for them.

    Raises:
        InputError: transformers is not installed.
    """
    model = build_model(name, torch.bfloat16, torch.device("meta"))
    return tuple((n, tuple(p.shape)) for n, p in model.named_parameters())
