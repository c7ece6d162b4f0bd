"""LoRA adapters of PEFT: put into a model to be trained, or read from a folder."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import InputError, require
from .pretrained import unreadable

LORA_RANK = 8
LORA_ALPHA = 16
"""LoRA as in the papers of MeZO and LOZO: r = 8, alpha = 16, on the attention projections that PEFT knows for an architecture."""


def add_adapters(model: nn.Module, seed: int, rank: int = LORA_RANK) -> Any:
    """The model with adapters, which alone can be trained then: from PEFT's table of architectures, or on all linear layers of one
    that it does not know.

    Args:
        model: a model of transformers. A classification head is trained in full beside the adapters, as PEFT does for such models.
        seed: of the adapters' first weights.
        rank: columns of an adapter's factors; alpha is twice the rank, as in the papers.

    Raises:
        InputError: peft is not installed, or the model has no linear layer to adapt.
    """
    peft = require("peft")
    kind = "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else None
    with torch.random.fork_rng(devices=[]), _calm():
        torch.manual_seed(seed)
        for targets in (None, "all-linear"):
            alpha = LORA_ALPHA * rank // LORA_RANK
            config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type=kind)
            try:
                return peft.get_peft_model(model, config)
            except ValueError as e:
                error = e
    raise InputError(f"this model cannot have adapters: {error}")


def load_adapter(model: Any, folder: Path) -> Any:
    """The model with a PEFT adapter on it, in evaluation mode.

    Raises:
        InputError: peft is not installed, or the adapter does not fit the model.
    """
    peft = require("peft")
    try:
        with _calm():
            return peft.PeftModel.from_pretrained(model, str(folder)).eval()
    except Exception as e:  # as in read_pretrained
        raise unreadable(e, f"--checkpoint {folder}", "adapter", "there") from e


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Without what PEFT warns of that only its authors can change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
