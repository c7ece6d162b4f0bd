"""Models and what reads their inputs: from the Hub, from a folder, or the embedded one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ...errors import InputError, require
from ..demo import MODEL
from ..objectives import OBJECTIVES, ImageObjective, MaskedPromptObjective
from ..settings import Settings
from ..tasks import TASKS, Task
from .adapters import add_adapters
from .image_reader import make_image_reader
from .pretrained import first_line, open_config, read_pretrained

_ROBERTAS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod")
POSITIONS_AFTER_PADDING = (*_ROBERTAS, "data2vec-text", "mpnet", "longformer")
"""Kinds of models that number the first token after the padding token, and so have that many positions fewer for tokens."""

EMBEDDED = "the embedded model of 0.3M parameters"
"""What is trained or scored where no model is named."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is known to exist, before its weights are read. An image model has a reader in place of a tokenizer."""

    path: str
    config: Any
    tokenizer: Any

    @property
    def causal(self) -> bool:
        """Whether it was saved as a causal language model."""
        return self._saved_as("ForCausalLM", "LMHeadModel")

    @property
    def masked(self) -> bool:
        """Whether it was saved as a masked language model."""
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


def open_checkpoint(settings: Settings) -> Checkpoint:
    """Configuration and tokenizer of the model that the settings name.

    Raises:
        InputError: they cannot be had, or the model does not read what the task has.
    """
    path, trusted = settings.model or str(MODEL), settings.trust_remote_code
    if settings.task is not None and TASKS[settings.task].kind == "image":
        if settings.model is None:
            raise InputError(f"--task {settings.task} needs --model: the embedded model reads text")
        require("PIL")
        config = open_config(path, trusted=trusted)
        return Checkpoint(path, config, make_image_reader(path, config, trusted=trusted))
    config = open_config(path, trusted=trusted)
    tokenizer = read_pretrained(require("transformers").AutoTokenizer, path, "tokenizer", trusted=trusted)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"--model {path}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return Checkpoint(path, config, tokenizer)


def load_model(
    checkpoint: Checkpoint, objective: str, task: Task, settings: Settings, device: torch.device
) -> tuple[Any, list[str]]:
    """The model for an objective, in evaluation mode (zeroth-order training runs without dropout); with adapters if the settings
    say so, on quantised layers if they do.

    Returns:
        The model, and notes for the user: what starts from random weights.

    Raises:
        InputError: the weights cannot be read, have no such head, or, without ``allow_missing_weights``, lack those of a layer.
    """
    transformers = require("transformers")
    kind = OBJECTIVES[objective]
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "output_loading_info": True}
    if kind.fresh_head:
        names = dict(enumerate(task.labels))
        label2id = {name: i for i, name in names.items()}
        options |= {"num_labels": len(names), "id2label": names, "label2id": label2id, "ignore_mismatched_sizes": True}
    if settings.load_in_8bit or settings.load_in_4bit:
        options |= {"quantization_config": _quantised(settings), "device_map": {"": str(device)}}
    torch.manual_seed(settings.seed)  # a fresh head is drawn from torch's global stream
    transformers.utils.logging.disable_progress_bar()
    loader = getattr(transformers, kind.auto_model)
    model, info = read_pretrained(loader, checkpoint.path, "weights", trusted=settings.trust_remote_code, **options)
    if objective != ImageObjective.name and model.config.pad_token_id is None:
        model.config.pad_token_id = checkpoint.tokenizer.pad_token_id
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))})
    if not kind.fresh_head:
        _check_head(checkpoint, masked=objective == MaskedPromptObjective.name, fresh=fresh)
    lacking = [name for name in fresh if not kind.fresh_head or _in_body(model, name)]
    if lacking and not settings.allow_missing_weights:
        raise InputError(
            f"--model {checkpoint.path}: the checkpoint lacks {len(lacking)} of the model's weights, or has them in another shape, "
            f"e.g. {lacking[0]}; give --allow-missing-weights to start from random ones there"
        )
    notes = [f"not in the checkpoint, starting from random weights: {', '.join(fresh)}"] if fresh else []
    unused = sorted(name for name in info["unexpected_keys"] if _in_body(model, name))
    if unused:
        notes.append(f"in the checkpoint and not in the model: {len(unused)} weights, e.g. {unused[0]}")
    if "quantization_config" not in options:
        model = model.to(device)
    _keep_as_read(model)
    if settings.peft:
        model = add_adapters(model, settings.seed, settings.lora_rank)
    return model.eval(), notes


def _keep_as_read(model: Any) -> None:
    """Has bitsandbytes leave 4-bit weights alone. On CPUs with AVX512-BF16 it would repack them in the first forward pass, and fail
    where the rows of one are no multiple of 32."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantised(settings: Settings) -> Any:
    """How bitsandbytes is to quantise the linear layers while they are read. Raises InputError if it is not installed."""
    require("bitsandbytes")
    dtype = getattr(torch, settings.dtype)
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_type": "nf4"}
    return require("transformers").BitsAndBytesConfig(**(four if settings.load_in_4bit else {"load_in_8bit": True}))


def pick_device(name: str) -> torch.device:
    """The device of a setting; "auto" is the GPU if there is one.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device, dtype=torch.float32)
    except (RuntimeError, AssertionError) as e:  # an unknown word, no such accelerator, or a torch built without it
        raise InputError(f"--device {name}: {first_line(e)}") from None
    if device.type == "meta":
        raise InputError("--device meta: there is nothing to compute there")
    return device


def _check_head(checkpoint: Checkpoint, *, masked: bool, fresh: list[str]) -> None:
    """Raises InputError if a language model has no head that was trained.

    An encoder's weights fit a decoder of its family, which would then see what it is to predict.
    """
    other = bool(fresh) or (checkpoint.masked and not masked)
    if other and not (checkpoint.masked if masked else checkpoint.causal):
        lack = f" (it lacks {fresh[0]})" if fresh else ""
        kind = "masked" if masked else "causal"
        raise InputError(f"--model {checkpoint.path} is no {kind} language model{lack}; use --objective classification")


def _in_body(model: Any, name: str) -> bool:
    """Whether a weight is one that a pretrained model has: not of a new head, and not of the pooler in front of it."""
    parts = name.split(".")
    return parts[0] == model.base_model_prefix and "pooler" not in parts
