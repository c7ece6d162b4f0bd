"""What prepares images for a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import InputError, require


class ImageReader:
    """Images as a model takes them. It stands where other tasks have a tokenizer.

    Args:
        processor: an image processor of transformers.
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
        """Saves the processor beside a model."""
        self.processor.save_pretrained(folder)


def make_image_reader(path: str, config: Any, *, trusted: bool = False) -> ImageReader:
    """The reader of a checkpoint, with its processor.

    A checkpoint without one gets a processor that scales images to the model's size and pixels to -1 ... 1, as ViT's does.

    Raises:
        InputError: the model does not classify images.
    """
    transformers = require("transformers")
    if type(config) not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise InputError(f"--model {path}: {config.model_type} models do not classify images")
    channels = getattr(config, "num_channels", 3)
    try:
        return ImageReader(transformers.AutoImageProcessor.from_pretrained(path, trust_remote_code=trusted), channels)
    except (OSError, ValueError):
        height, width = image_size(config)
    half = [0.5] * channels
    size = {"height": height, "width": width}
    return ImageReader(transformers.ViTImageProcessor(size=size, image_mean=half, image_std=half), channels)


def image_size(config: Any) -> tuple[int, int]:
    """(height, width) that a model of images takes."""
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)
