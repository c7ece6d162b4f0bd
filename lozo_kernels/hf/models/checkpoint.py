"""checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ...errors import InputError

POSITIONS_AFTER_PADDING = frozenset(
    {
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
        "roberta-prelayernorm",
        "camembert",
        "xmod",
        "data2vec-text",
        "mpnet",
        "longformer",
    }
)
"""Kinds of models that number the first token after the padding token, and so have that many positions fewer for tokens."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is known to exist, before its weights are read."""

    path: str
    config: Any
    tokenizer: Any

    @property
    def causal(self) -> bool:
        """It was saved as a causal language model."""
        return self._saved_as("ForCausalLM", "LMHeadModel")

    @property
    def masked(self) -> bool:
        """It was saved as a masked language model."""
        return self._saved_as("ForMaskedLM")

    def max_length(self, asked: int) -> int:
        """Tokens that fit, at most ``asked``."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions is not None and self.config.model_type in POSITIONS_AFTER_PADDING:
            positions -= (self.config.pad_token_id or 0) + 1
        limits = (asked, positions, self.tokenizer.model_max_length)
        return min(int(n) for n in limits if n is not None)

    def _saved_as(self, *endings: str) -> bool:
        return any(name.endswith(endings) for name in self.config.architectures or ())


def pick_device(name: str) -> torch.device:
    """The device of a setting; "auto" is the GPU if there is one.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # an unknown word, no such accelerator, or a torch built without it
        raise InputError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if device.type == "meta":
        raise InputError("--device meta: there is nothing to compute there")
    return device


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
