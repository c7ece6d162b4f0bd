"""Models and tokenizers: from the Hub, from a folder, or the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError, require
from .checkpoint import _first_line


def load_adapter(model: Any, folder: Path) -> Any:
    """The model with a PEFT adapter on it, in evaluation mode.

    Raises:
        InputError: peft is not installed, or the adapter does not fit the model.
    """
    peft = require("peft", extra="peft")
    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, require("safetensors").SafetensorError) as e:
        raise InputError(f"--checkpoint {folder}: no usable adapter: {_first_line(e)}") from None
