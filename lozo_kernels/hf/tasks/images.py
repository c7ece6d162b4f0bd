"""Classification of images: the classes are those of the data."""

from __future__ import annotations

from .task import Hub, Task

_IMAGE = (("image", "img"),)

IMAGES = Task("images", "image", _IMAGE, objective="image", source="this project")
"""Any folder of images, one folder for each class; or any set of the Hub with a column of images and one of classes."""

ROWS = (
    IMAGES,
    Task(
        "cifar100",
        "image",
        _IMAGE,
        label_field="fine_label",
        hub=Hub("uoft-cs/cifar100", dev="test"),
        objective="image",
        source="Krizhevsky, Learning multiple layers of features from tiny images, 2009",
    ),
)
