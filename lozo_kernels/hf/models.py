"""Models and tokenizers: from the Hub, from a folder, or the embedded one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, require
from .demo import MODEL
from .objectives import ClassificationObjective
from .settings import Settings
from .tasks import Task


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is known to exist, before its weights are read."""

    path: str
    config: Any
    tokenizer: Any

    @property
    def causal(self) -> bool:
        """It was saved as a causal language model."""
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in self.config.architectures or ())

    def max_length(self, asked: int) -> int:
        """Tokens that fit, at most ``asked``."""
        limits = (asked, getattr(self.config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        return min(int(n) for n in limits if n is not None)


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


def open_checkpoint(settings: Settings) -> Checkpoint:
    """Configuration and tokenizer of the model that the settings name.

    Raises:
        InputError: they cannot be had.
    """
    transformers = require("transformers")
    transformers.utils.logging.set_verbosity_error()
    path = settings.model or str(MODEL)
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as e:
        where = "in that folder" if Path(path).is_dir() else "as a folder or on the Hub"
        raise InputError(f"--model {path}: no usable model {where}: {_first_line(e)}") from None
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
    transformers = require("transformers")
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "output_loading_info": True}
    auto = transformers.AutoModelForCausalLM
    if objective == ClassificationObjective.name:
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
    except (OSError, ValueError) as e:
        raise InputError(f"--model {checkpoint.path}: {_first_line(e)}") from None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = checkpoint.tokenizer.pad_token_id
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))})
    if fresh and objective != ClassificationObjective.name and not checkpoint.causal:
        lack = f"--model {checkpoint.path} is no causal language model (it lacks {fresh[0]})"
        raise InputError(f"{lack}; use --objective classification")
    notes = [f"not in the checkpoint, starting from random weights: {', '.join(fresh)}"] if fresh else []
    return model.to(device).eval(), notes


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
