"""Models that classify images: their configuration, what prepares images for them, and the model with a head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, require
from ..settings import Settings
from ..tasks import Task
from .checkpoint import Checkpoint


class ImageReader:
    """Images as a model takes them. It stands where other tasks have a tokenizer.

    Args:
        processor: of transformers.
        channels: 3 for colour, 1 for grey.
    """

    pad_token_id: None = None
    model_max_length: None = None

    def __init__(self, processor: Any, channels: int) -> None:
        self.processor = processor
        self.channels = channels

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """(images, channels, height, width) fp32 from images of PIL."""
        if self.channels == 1:  # processors take an array of two dimensions for something else
            numpy = require("numpy")
            grey = [numpy.asarray(image.convert("L"))[:, :, None] for image in images]
            made = self.processor(images=grey, return_tensors="pt", input_data_format="channels_last")
        else:
            made = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        pixels: Tensor = made["pixel_values"]
        return pixels

    def save_pretrained(self, folder: Path) -> None:
        """Beside a model."""
        self.processor.save_pretrained(folder)


def open_image_checkpoint(settings: Settings) -> Checkpoint:
    """Configuration and image processor of the model that the settings name.

    A checkpoint without a processor gets one that scales images to the model's size and pixels to -1 ... 1, as ViT's does.

    Raises:
        InputError: no model is named, it cannot be had, or it takes no images.
    """
    if settings.model is None:
        raise InputError(f"--task {settings.task} needs --model: the embedded model reads text")
    transformers = require("transformers")
    require("PIL")
    transformers.utils.logging.set_verbosity_error()
    path = settings.model
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as e:
        where = "in that folder" if Path(path).is_dir() else "as a folder or on the Hub"
        first = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise InputError(f"--model {path}: no usable model {where}: {first}") from None
    if type(config) not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise InputError(f"--model {path}: {config.model_type} models do not classify images")
    channels = getattr(config, "num_channels", 3)
    return Checkpoint(path, config, ImageReader(_processor(transformers, path, config, channels), channels))


def _processor(transformers: Any, path: str, config: Any, channels: int) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError):
        pass
    side = getattr(config, "image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    half = [0.5] * channels
    return transformers.ViTImageProcessor(size={"height": height, "width": width}, image_mean=half, image_std=half)


def load_image_model(checkpoint: Checkpoint, task: Task, settings: Settings, device: torch.device) -> tuple[Any, list[str]]:
    """The model with a head for the task's classes, in evaluation mode; and notes for the user.

    Raises:
        InputError: the weights cannot be read.
    """
    transformers = require("transformers")
    names = dict(enumerate(task.labels))
    torch.manual_seed(settings.seed)  # a fresh head is drawn from torch's global stream
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForImageClassification.from_pretrained(
            checkpoint.path,
            dtype=getattr(torch, settings.dtype),
            output_loading_info=True,
            id2label=names,
            label2id={name: i for i, name in names.items()},
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as e:
        first = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise InputError(f"--model {checkpoint.path}: {first}") from None
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))})
    notes = [f"not in the checkpoint, starting from random weights: {', '.join(fresh)}"] if fresh else []
    return model.to(device).eval(), notes
