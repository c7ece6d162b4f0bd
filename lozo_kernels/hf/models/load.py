"""load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import InputError, require
from ..demo import MODEL
from ..settings import Settings
from ..tasks import TASKS, Task
from .checkpoint import Checkpoint, _first_line


def open_checkpoint(settings: Settings) -> Checkpoint:
    """Configuration and tokenizer of the model that the settings name.

    Raises:
        InputError: they cannot be had.
    """
    if settings.task is not None and TASKS[settings.task].kind == "image":
        from .images import open_image_checkpoint

        return open_image_checkpoint(settings)
    transformers = require("transformers")
    transformers.utils.logging.set_verbosity_error()
    path = settings.model or str(MODEL)
    where = "in that folder" if Path(path).is_dir() else "as a folder or on the Hub"
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as e:
        raise InputError(f"--model {path}: no usable model {where}: {_first_line(e)}") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as e:
        raise InputError(f"--model {path}: no usable tokenizer {where}: {_first_line(e).rstrip(':')}") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"--model {path}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return Checkpoint(path, config, tokenizer)


def load_model(
    checkpoint: Checkpoint, objective: str, task: Task, settings: Settings, device: torch.device
) -> tuple[Any, list[str]]:
    """The model for an objective, in evaluation mode (zeroth-order training runs without dropout).

    Returns:
        The model, and notes for the user: a head that starts from random weights.

    Raises:
        InputError: the weights cannot be read, or have no such head.
    """
    if task.kind == "image":
        from .images import load_image_model

        return load_image_model(checkpoint, task, settings, device)
    transformers = require("transformers")
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "output_loading_info": True}
    auto = transformers.AutoModelForCausalLM
    if objective == "masked":
        auto = transformers.AutoModelForMaskedLM
    if objective == "classification":
        auto = transformers.AutoModelForSequenceClassification
        names = dict(enumerate(task.labels))
        options |= {
            "num_labels": len(task.labels),
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            "ignore_mismatched_sizes": True,
        }
    torch.manual_seed(settings.seed)  # a fresh head is drawn from torch's global stream
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = auto.from_pretrained(checkpoint.path, **options)
    except (OSError, ValueError, RuntimeError, require("safetensors").SafetensorError) as e:
        raise InputError(f"--model {checkpoint.path}: its weights cannot be read: {_first_line(e)}") from None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = checkpoint.tokenizer.pad_token_id
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))})
    masked = objective == "masked"
    # An encoder's weights fit a decoder of its family, which would then see what it is to predict.
    other = bool(fresh) or (checkpoint.masked and not masked)
    if other and objective != "classification" and not (checkpoint.masked if masked else checkpoint.causal):
        lack = f" (it lacks {fresh[0]})" if fresh else ""
        kind = "masked" if masked else "causal"
        raise InputError(f"--model {checkpoint.path} is no {kind} language model{lack}; use --objective classification")
    notes = [f"not in the checkpoint, starting from random weights: {', '.join(fresh)}"] if fresh else []
    return model.to(device).eval(), notes
