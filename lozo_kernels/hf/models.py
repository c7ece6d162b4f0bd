"""Models and tokenizers: from the Hub, from a folder, or the embedded one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, require
from .demo import MODEL
from .objectives import ClassificationObjective, MaskedPromptObjective
from .settings import Settings
from .tasks import TASKS, Task

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


def open_checkpoint(settings: Settings) -> Checkpoint:
    """Configuration and tokenizer of the model that the settings name.

    Raises:
        InputError: they cannot be had.
    """
    if settings.task is not None and TASKS[settings.task].kind == "image":
        from .vision import open_image_checkpoint

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
        from .vision import load_image_model

        return load_image_model(checkpoint, task, settings, device)
    transformers = require("transformers")
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "output_loading_info": True}
    auto = transformers.AutoModelForCausalLM
    if objective == MaskedPromptObjective.name:
        auto = transformers.AutoModelForMaskedLM
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
    except (OSError, ValueError, RuntimeError, require("safetensors").SafetensorError) as e:
        raise InputError(f"--model {checkpoint.path}: its weights cannot be read: {_first_line(e)}") from None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = checkpoint.tokenizer.pad_token_id
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))})
    masked = objective == MaskedPromptObjective.name
    # An encoder's weights fit a decoder of its family, which would then see what it is to predict.
    other = bool(fresh) or (checkpoint.masked and not masked)
    if other and objective != ClassificationObjective.name and not (checkpoint.masked if masked else checkpoint.causal):
        lack = f" (it lacks {fresh[0]})" if fresh else ""
        kind = "masked" if masked else "causal"
        raise InputError(f"--model {checkpoint.path} is no {kind} language model{lack}; use --objective classification")
    notes = [f"not in the checkpoint, starting from random weights: {', '.join(fresh)}"] if fresh else []
    return model.to(device).eval(), notes


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


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
